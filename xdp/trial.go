package xdp

import (
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Trial is what a network device did when it was tried, instead of what its
// driver announces.
type Trial struct {
	Native  error // nil: an XDP program could be attached to the driver
	Generic error // tried where Native failed

	// Fragments: the program had to accept packets of several buffers, as the
	// MTU is above what drivers take without.
	Fragments bool

	Queues []QueueTrial // in order; empty where no program could be attached
}

// QueueTrial is what one receive queue did.
type QueueTrial struct {
	Queue       int
	Mode        Mode  // the best that it could be bound in; ModeAuto: none
	ZeroCopy    error // why it is not ModeZeroCopy
	Copy        error // why it could not be bound in copy mode either
	MultiBuffer error // nil: packets of several buffers are possible in Mode
	TXChecksum  bool  // the device or the kernel adds checksums on request in Mode
}

// Try attaches an XDP program that passes everything to a device of the calling
// thread's network namespace, binds AF_XDP sockets to its queues one after the
// other, and takes everything away again. Traffic goes on, but many drivers
// reset the link at each of these steps. It does not touch a device that has an
// XDP program: ErrXDPBusy.
func Try(ifname string) (t Trial, err error) {
	c, err := Probe(ifname)
	if err != nil {
		return t, err
	}
	nic, err := netlink.LinkByIndex(c.Ifindex)
	if err != nil {
		return t, fmt.Errorf("xdp: interface %s: %w", ifname, err)
	}
	if id, _ := xdpProgram(nic); id != 0 {
		return t, fmt.Errorf("%w (%s)", ErrXDPBusy, describeXDP(nic))
	}
	t.Fragments = c.MTU > maxPlainMTU
	program, err := passProgram(t.Fragments)
	if err != nil {
		return t, loadError(err)
	}
	defer program.Close()
	attach := func(flags link.XDPAttachFlags) (link.Link, error) {
		l, err := link.AttachXDP(link.XDPOptions{Program: program, Interface: c.Ifindex, Flags: flags})
		return l, attachError(err)
	}
	var l link.Link
	if t.Native = nativeAllowed(nic); t.Native == nil {
		l, t.Native = attach(link.XDPDriverMode)
	}
	if t.Native != nil {
		if l, err = attach(link.XDPGenericMode); err != nil {
			t.Generic = err
			return t, nil
		}
	}
	defer l.Close()
	for q := range c.RXQueues {
		t.Queues = append(t.Queues, tryQueue(c, q, t.Native == nil))
	}
	return t, nil
}

func passProgram(fragments bool) (*ebpf.Program, error) {
	spec := &ebpf.ProgramSpec{
		Name: "doctor_pass", Type: ebpf.XDP, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2 /* XDP_PASS */), asm.Return()},
	}
	if fragments {
		spec.Flags = unix.BPF_F_XDP_HAS_FRAGS
	}
	return ebpf.NewProgram(spec)
}

func tryQueue(c Capabilities, queue int, native bool) QueueTrial {
	const chunk = 4096
	t := QueueTrial{Queue: queue}
	try := func(mode Mode, multiBuffer bool) (checksum bool, err error) {
		u, err := NewUmem(UmemConfig{Chunks: 256, ChunkSize: chunk, TXMetadata: true})
		if err != nil {
			return false, err
		}
		defer u.Close()
		s, err := newSocket(u, SocketConfig{
			Ifindex: c.Ifindex, Queue: queue, Mode: mode, MultiBuffer: multiBuffer,
			FillSize: 128, CompletionSize: 128, RXSize: 128, TXSize: 128, Reserve: 128, BindTimeout: 2 * time.Second,
		}, nil)
		if err != nil {
			return false, err
		}
		s.Refill()
		return s.ChecksumOffload(), s.Close()
	}
	// As host mode does: several buffers only where one does not hold a packet
	// with its Ethernet header and VLAN tag.
	large := c.MTU+18 > chunk-Headroom
	if native {
		if t.TXChecksum, t.ZeroCopy = try(ModeZeroCopy, large); t.ZeroCopy == nil {
			t.Mode = ModeZeroCopy
		}
	} else {
		t.ZeroCopy = errors.New("zero-copy needs native XDP")
	}
	weaker := ModeCopy
	if !native {
		weaker = ModeGeneric
	}
	if t.Mode == ModeAuto {
		if t.TXChecksum, t.Copy = try(weaker, large); t.Copy == nil {
			t.Mode = weaker
		}
	}
	if t.Mode != ModeAuto {
		_, t.MultiBuffer = try(t.Mode, true)
	}
	return t
}
