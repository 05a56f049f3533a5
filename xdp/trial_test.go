package xdp

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// What a veth can and cannot do is found by trying, and nothing stays attached.
func TestTry(t *testing.T) {
	for _, mtu := range []int{1500, 9000} {
		l := newLab(t, 2, mtu)
		trial, err := Try("nic0")
		if err != nil {
			t.Fatal(err)
		}
		if trial.Native != nil || trial.Generic != nil || trial.Fragments != (mtu == 9000) || len(trial.Queues) != 2 {
			t.Fatalf("MTU %d: %+v", mtu, trial)
		}
		for i, q := range trial.Queues {
			if q.Queue != i || q.Mode != ModeCopy || !errors.Is(q.ZeroCopy, unix.EOPNOTSUPP) || q.Copy != nil || q.MultiBuffer != nil || !q.TXChecksum {
				t.Errorf("MTU %d: %+v", mtu, q)
			}
		}
		if id, name := xdpProgram(l.nic); id != 0 {
			t.Errorf("program %d %s is still attached", id, name)
		}
		// All queues are free again.
		u, err := NewUmem(UmemConfig{Chunks: 64, ChunkSize: 2048})
		if err != nil {
			t.Fatal(err)
		}
		for q := range 2 {
			s, err := NewSocket(u, SocketConfig{Ifindex: l.nic.Attrs().Index, Queue: q, FillSize: 16, CompletionSize: 16, RXSize: 16, TXSize: 16})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
		}
	}
}

// A device with a program is left alone.
func TestTryBusy(t *testing.T) {
	l := newLab(t, 1, 1500)
	tap, err := OpenTAP(TAPConfig{Queues: 1, MTU: 1500})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tap.Close() })
	d, err := AttachHost(HostAttachConfig{Ifindex: l.nic.Attrs().Index, TAPIfindex: tap.Ifindex(), Mode: ModeCopy})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	if _, err := Try("nic0"); !errors.Is(err, ErrXDPBusy) {
		t.Errorf("tried a busy device: %v", err)
	}
	if id, _ := xdpProgram(l.nic); id != d.program {
		t.Error("the program was replaced")
	}
	if _, err := Try("nosuch"); err == nil {
		t.Error("tried a device that does not exist")
	}
}
