package xdp

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestTAPDevice(t *testing.T) {
	newLab(t, 1, 1500)
	tap, err := OpenTAP(TAPConfig{Queues: 3, MTU: 9000})
	if err != nil {
		t.Fatal(err)
	}
	dev, err := netlink.LinkByName(tap.Name())
	if err != nil {
		t.Fatal(err)
	}
	a := dev.Attrs()
	if a.Name != "tcpcrypt0" || a.Index != tap.Ifindex() || a.MTU != 9000 || a.TxQLen != TAPQueueLen || a.RawFlags&unix.IFF_UP == 0 {
		t.Errorf("%+v", a)
	}
	if b, err := os.ReadFile("/proc/sys/net/ipv6/conf/tcpcrypt0/disable_ipv6"); err != nil || string(b) != "1\n" {
		t.Errorf("disable_ipv6: %q, %v", b, err)
	}
	addrs, err := netlink.AddrList(dev, netlink.FAMILY_ALL)
	if err != nil || len(addrs) != 0 {
		t.Errorf("addresses: %v, %v", addrs, err)
	}
	if _, err := OpenTAP(TAPConfig{Name: "tcpcrypt0"}); !errors.Is(err, unix.EBUSY) {
		t.Errorf("the same name again: %v", err)
	}
	for _, cfg := range []TAPConfig{{Queues: -1}, {Queues: 257}, {Name: "a-name-that-is-too-long"}} {
		if tap, err := OpenTAP(cfg); err == nil {
			tap.Close()
			t.Errorf("%+v was accepted", cfg)
		}
	}
	if err := tap.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := netlink.LinkByName("tcpcrypt0"); err == nil {
		t.Error("the device is still there")
	}
}

func TestTAPReadWrite(t *testing.T) {
	newLab(t, 1, 1500)
	tap, err := OpenTAP(TAPConfig{Name: "inner", Queues: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	for i := range tap.Queues() {
		if _, err := tap.Queue(i).Read(make([]byte, 100)); !errors.Is(err, unix.EAGAIN) {
			t.Fatalf("read from empty queue %d: %v", i, err)
		}
	}
	// Packets written come in on the device, those sent there can be read.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: testProto>>8 | testProto&0xff<<8, Ifindex: tap.Ifindex()}); err != nil {
		t.Fatal(err)
	}
	want := numbered(1, 1000)
	hdr := make([]byte, VnetHdrLen+20)
	VnetHdr{}.Put(hdr)
	copy(hdr[VnetHdrLen:], want)
	pieces := [][]byte{want[20:500], nil, want[500:501], want[501:]}
	if err := tap.Queue(1).Writev(hdr, pieces); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, MaxTAPPacket)
	pollIn(t, fd)
	n, err := unix.Read(fd, buf)
	if err != nil || !bytes.Equal(buf[:n], want) {
		t.Fatalf("written packet: %d bytes, %v", n, err)
	}
	if err := tap.Queue(0).Writev(hdr, make([][]byte, maxPieces+1)); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("too many pieces: %v", err)
	}
	if err := tap.Queue(0).Writev(hdr[:3], nil); !errors.Is(err, unix.EINVAL) {
		t.Errorf("part of a header: %v", err)
	}

	for q := range uint32(2) {
		steer, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SocketFilter, License: "GPL", Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R0, int32(q)), asm.Return(),
		}})
		if err != nil {
			t.Fatal(err)
		}
		if err := tap.SetSteering(steer); err != nil {
			t.Fatal(err)
		}
		steer.Close()
		if _, err := unix.Write(fd, want); err != nil {
			t.Fatal(err)
		}
		pollIn(t, tap.Queue(int(q)).FD())
		n, err := tap.Queue(int(q)).Read(buf)
		if err != nil || !bytes.Equal(buf[VnetHdrLen:n], want) {
			t.Fatalf("read packet: %d bytes, %v", n, err)
		}
	}
	if err := tap.SetSteering(nil); err != nil {
		t.Fatal(err)
	}
	q := tap.Queue(0)
	if n := testing.AllocsPerRun(100, func() {
		if q.Writev(hdr, pieces) != nil {
			t.Fatal("write")
		}
		q.Read(buf)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
