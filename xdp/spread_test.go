package xdp

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSpread(t *testing.T) {
	table := spread(7, []int{1, 3})
	for i, q := range table {
		if want := uint32(1 + 2*(i%2)); q != want {
			t.Errorf("entry %d is %d, want %d", i, q, want)
		}
	}
}

// A device without RSS indirection gets fewer queues, and its own back.
func TestConcentrate(t *testing.T) {
	newLab(t, 4, 1500)
	receive := func() int {
		t.Helper()
		c, err := Probe("nic0")
		if err != nil {
			t.Fatal(err)
		}
		return c.RXQueues
	}
	if _, err := indirection("nic0"); !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("the indirection table of a veth: %v", err)
	}
	how, restore, err := Concentrate("nic0", []int{1, 0})
	if err != nil {
		t.Fatal(err)
	}
	if n := receive(); n != 2 || how != "2 receive queues instead of 4" {
		t.Errorf("%d queues: %s", n, how)
	}
	if err := restore(); err != nil {
		t.Fatal(err)
	}
	if n := receive(); n != 4 {
		t.Errorf("%d queues after restore", n)
	}
	for _, queues := range [][]int{{1, 2}, {0, 3}, {}} {
		if _, _, err := Concentrate("nic0", queues); err == nil {
			t.Errorf("queues %v of a device without RSS indirection were chosen", queues)
		}
	}
	if n := receive(); n != 4 {
		t.Errorf("%d queues after refusals", n)
	}
	if _, err := indirection("nosuch0"); !errors.Is(err, unix.ENODEV) {
		t.Errorf("a device that does not exist: %v", err)
	}
}
