package xdp

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestPrivileges(t *testing.T) {
	const initial = "         0          0 4294967295\n"
	all := ^uint64(0)
	for _, c := range []struct {
		name      string
		effective uint64
		uidMap    string
		want      string // part of the error; empty: none
	}{
		{"root", all, initial, ""},
		{"procfs is not there", all, "", ""},
		{"what is needed alone", 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_SYS_ADMIN, initial, ""},
		{"nobody", 0, initial, "without CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN:"},
		{"a container", all &^ (1 << unix.CAP_SYS_ADMIN), initial, "without CAP_SYS_ADMIN:"},
		{"root of a user namespace", all, "         0       1000          1\n", "of a user namespace"},
		{"the same with subordinate users", all, "0 1000 1\n1 100000 65536\n", "of a user namespace"},
	} {
		err := privileges(c.effective, c.uidMap)
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", c.name, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: got %v, want %q", c.name, err, c.want)
		}
	}
}

func TestFindLink(t *testing.T) {
	if l, err := FindLink("lo"); err != nil || l.Attrs().Name != "lo" {
		t.Errorf("got %v, %v", l, err)
	}
	for _, name := range []string{"nosuch0", "not/a/name", "longer-than-a-name-of-the-kernel-may-be"} {
		if _, err := FindLink(name); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}
