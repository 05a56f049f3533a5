package xdp

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// NeededCapabilities are what a process has to have, in its effective set, to
// divert connections and to guard them. CAP_SYS_ADMIN is what the kernel wants
// of a process that opens the programs of an earlier one by their ids; it includes
// CAP_BPF and CAP_PERFMON.
var NeededCapabilities = []struct {
	Bit  uint
	Name string
}{
	{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"},
	{unix.CAP_NET_RAW, "CAP_NET_RAW"},
	{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"},
}

// CheckPrivileges tells in one line what the calling thread lacks of what
// AttachHost, AttachGateway and OpenGuard need, or returns nil.
func CheckPrivileges() error {
	var data [2]unix.CapUserData
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("xdp: read capabilities: %w", err)
	}
	users, _ := os.ReadFile("/proc/self/uid_map")
	return privileges(uint64(data[0].Effective)|uint64(data[1].Effective)<<32, string(users))
}

func privileges(effective uint64, uidMap string) error {
	var missing []string
	for _, c := range NeededCapabilities {
		if effective&(1<<c.Bit) == 0 {
			missing = append(missing, c.Name)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("needs root, and is without %s: use sudo, or add them to the container", strings.Join(missing, ", "))
	}
	if OtherUsers(uidMap) {
		return errors.New("needs root of the machine: that of a user namespace, as in a rootless container, may not load BPF programs")
	}
	return nil
}

// OtherUsers tells from /proc/self/uid_map whether the process is in a user
// namespace of its own, where its capabilities do not count for BPF. What cannot
// be read is taken for the machine's.
func OtherUsers(uidMap string) bool {
	f := strings.Fields(uidMap)
	return len(f) > 0 && (len(f) != 3 || f[0] != "0" || f[1] != "0" || f[2] != "4294967295")
}

// FindLink returns the device of a name in the calling thread's network
// namespace. The error says so when there is none.
func FindLink(name string) (netlink.Link, error) {
	l, err := netlink.LinkByName(name)
	if none := (netlink.LinkNotFoundError{}); errors.As(err, &none) {
		return nil, fmt.Errorf("there is no interface %s in this network namespace: ip link lists those that are", name)
	}
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", name, err)
	}
	return l, nil
}
