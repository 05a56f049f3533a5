package xdp

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// needRoot skips what takes namespaces, devices and eBPF.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, devices and eBPF programs")
	}
}

// A place is where the guards of the tests are attached and pinned: a cgroup
// that only this process is in, and a BPF file system.
type place struct{ parent, cgroup, pins string }

// They hand the place to a child process.
const (
	placeEnv  = "XDP_TEST_PLACE"
	cgroupEnv = "XDP_TEST_CGROUP"
)

var testPlace = sync.OnceValues(func() (p place, err error) {
	if base := os.Getenv(placeEnv); base != "" {
		return place{cgroup: os.Getenv(cgroupEnv), pins: filepath.Join(base, "bpf")}, nil
	}
	root, err := cgroupMount("/proc/self/mountinfo")
	if err != nil {
		return p, fmt.Errorf("cgroup version 2: %w", err)
	}
	p.parent, p.cgroup = root, filepath.Join(root, "tcpcrypt-xdp-test-"+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(p.cgroup, 0o755); err != nil {
		return p, err
	}
	if err := enterCgroup(p.cgroup); err != nil {
		return p, err
	}
	base, err := os.MkdirTemp("", "tcpcrypt-xdp-test")
	if err != nil {
		return p, err
	}
	p.pins = filepath.Join(base, "bpf")
	if err := os.Mkdir(p.pins, 0o700); err != nil {
		return p, err
	}
	if err := unix.Mount("bpf", p.pins, "bpf", 0, ""); err != nil {
		return p, fmt.Errorf("mount BPF file system: %w", err)
	}
	placed = &p
	return p, errors.Join(os.Setenv(placeEnv, base), os.Setenv(cgroupEnv, p.cgroup))
})

// placed is what is to be removed.
var placed *place

// enterCgroup moves this process.
func enterCgroup(dir string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
}

func (p *place) remove() error {
	err := errors.Join(enterCgroup(p.parent), os.Remove(p.cgroup), unix.Unmount(p.pins, 0))
	if err != nil {
		return err
	}
	return os.RemoveAll(filepath.Dir(p.pins))
}

// guardOf is the configuration of a guard at the place of the tests.
func guardOf(t *testing.T, ifindex int, mark uint32) GuardConfig {
	t.Helper()
	p, err := testPlace()
	if err != nil {
		t.Fatal(err)
	}
	return GuardConfig{Ifindex: ifindex, Mark: mark, Cgroup: p.cgroup, Pins: p.pins, Complete: true}
}

func TestMain(m *testing.M) {
	code := m.Run()
	if placed != nil {
		if err := placed.remove(); err != nil {
			fmt.Fprintln(os.Stderr, "remove the guards' place:", err)
			code = 1
		}
	}
	os.Exit(code)
}
