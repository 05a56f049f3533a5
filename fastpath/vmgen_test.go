package fastpath

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestVMGenerationEvent(t *testing.T) {
	for msg, want := range map[string]bool{
		"change@/devices/x\x00ACTION=change\x00SUBSYSTEM=acpi\x00NEW_VMGENID=1\x00SEQNUM=9\x00": true,
		"change@/devices/x\x00ACTION=change\x00SYNTH_ARG_NEW_VMGENID=1\x00":                     false,
		"NEW_VMGENID=10\x00": false,
		"":                   false,
	} {
		if got := isNewVMGeneration([]byte(msg)); got != want {
			t.Errorf("%q: %v", msg, got)
		}
	}
}

// Events of the kernel arrive; those that a program sends do not.
func TestUevents(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("writing to a uevent file needs root")
	}
	got := make(chan string, 100)
	stop, err := watchUevents(func(msg []byte) {
		if strings.Contains(string(msg), "5b0f8a52-4f9d-4f6c-8a4c-0f2a3a0c1d11") || strings.Contains(string(msg), vmGenerationEvent) {
			got <- string(msg)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	forged := []byte("change@/forged\x00" + vmGenerationEvent + "\x00")
	if err := unix.Sendto(fd, forged, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
		t.Fatal(err)
	}
	if err := os.WriteFile("/sys/devices/virtual/mem/null/uevent", []byte("change 5b0f8a52-4f9d-4f6c-8a4c-0f2a3a0c1d11"), 0o200); err != nil {
		t.Fatal(err)
	}
	if msg := <-got; strings.Contains(msg, "forged") || isNewVMGeneration([]byte(msg)) {
		t.Errorf("first came %q", msg)
	}
}
