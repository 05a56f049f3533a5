package xdp

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// testDeadline bounds waits for packets that come at once if they come.
const testDeadline = 10 * time.Second

// A lab is two network namespaces joined by a veth pair. The test's goroutine
// is in the host's.
type lab struct {
	t          testing.TB
	host, peer netns.NsHandle
	nic, wire  netlink.Link // the ends in host and peer
	ipv6       bool
}

var (
	hostAddr4 = netip.MustParseAddr("10.99.0.1")
	peerAddr4 = netip.MustParseAddr("10.99.0.2")
	hostAddr6 = netip.MustParseAddr("fd99::1")
	peerAddr6 = netip.MustParseAddr("fd99::2")
	hostMAC   = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	peerMAC   = net.HardwareAddr{2, 0, 0, 0, 0, 2}
)

func newLab(t testing.TB, queues, mtu int) *lab {
	t.Helper()
	return makeLab(t, queues, mtu, true)
}

// newQuietLab has no IPv6, whose multicast reports are frames that a test did
// not send.
func newQuietLab(t testing.TB, queues, mtu int) *lab {
	t.Helper()
	return makeLab(t, queues, mtu, false)
}

func makeLab(t testing.TB, queues, mtu int, ipv6 bool) *lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, devices and eBPF programs")
	}
	runtime.LockOSThread()
	orig, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t, ipv6: ipv6}
	// The thread goes back only if that worked; else it ends with the goroutine.
	t.Cleanup(func() {
		if l.peer != 0 {
			l.peer.Close()
		}
		if l.host != 0 {
			l.host.Close()
		}
		if netns.Set(orig) == nil {
			runtime.UnlockOSThread()
		}
		orig.Close()
	})
	if l.peer, err = netns.New(); err != nil {
		t.Fatalf("make network namespace: %v", err)
	}
	if l.host, err = netns.New(); err != nil {
		t.Fatalf("make network namespace: %v", err)
	}
	l.setup(queues, mtu)
	return l
}

func (l *lab) setup(queues, mtu int) {
	t := l.t
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = "nic0", mtu, hostMAC
	attrs.NumTxQueues, attrs.NumRxQueues = queues, queues
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerHardwareAddr = "wire0", peerMAC
	veth.PeerNumTxQueues, veth.PeerNumRxQueues = uint32(queues), uint32(queues)
	veth.PeerMTU = uint32(mtu)
	veth.PeerNamespace = netlink.NsFd(int(l.peer))
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatalf("make veth pair: %v", err)
	}
	l.nic = l.configure("nic0", hostAddr4, hostAddr6)
	l.inPeer(func() error {
		l.wire = l.configure("wire0", peerAddr4, peerAddr6)
		return nil
	})
}

// configure runs in the device's namespace.
func (l *lab) configure(name string, v4, v6 netip.Addr) netlink.Link {
	l.t.Helper()
	check := func(err error) {
		if err != nil {
			l.t.Errorf("configure %s: %v", name, err)
			panic(err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	check(err)
	check(netlink.LinkSetUp(lo))
	dev, err := netlink.LinkByName(name)
	check(err)
	check(netlink.AddrAdd(dev, &netlink.Addr{IPNet: &net.IPNet{IP: v4.AsSlice(), Mask: net.CIDRMask(24, 32)}}))
	if l.ipv6 {
		check(netlink.AddrAdd(dev, &netlink.Addr{IPNet: &net.IPNet{IP: v6.AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}))
	} else {
		check(disableIPv6(dev))
	}
	check(netlink.LinkSetUp(dev))
	for _, n := range []struct {
		ip  netip.Addr
		mac net.HardwareAddr
	}{{hostAddr4, hostMAC}, {peerAddr4, peerMAC}, {hostAddr6, hostMAC}, {peerAddr6, peerMAC}} {
		if n.ip != v4 && n.ip != v6 && (l.ipv6 || n.ip.Is4()) {
			check(netlink.NeighSet(&netlink.Neigh{LinkIndex: dev.Attrs().Index, State: netlink.NUD_PERMANENT, IP: n.ip.AsSlice(), HardwareAddr: n.mac}))
		}
	}
	dev, err = netlink.LinkByName(name)
	check(err)
	return dev
}

// inPeer runs f on a thread in the peer's namespace.
func (l *lab) inPeer(f func() error) {
	l.t.Helper()
	if err := inNamespace(l.peer, f); err != nil {
		l.t.Fatal(err)
	}
}

// inNamespace runs f on a thread of its own, which ends with it.
func inNamespace(ns netns.NsHandle, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer func() {
			if p := recover(); p != nil {
				done <- fmt.Errorf("in namespace: %v", p)
			}
		}()
		if err := netns.Set(ns); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// A packetSocket sends and receives frames at the peer's end of the wire.
type packetSocket struct {
	t  testing.TB
	fd int
}

// openPacket makes a packet socket for one EtherType on the peer's end.
func (l *lab) openPacket(proto uint16) *packetSocket {
	l.t.Helper()
	p := &packetSocket{t: l.t}
	l.inPeer(func() (err error) {
		p.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(p.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20); err != nil {
			return err
		}
		timeout := unix.NsecToTimeval(int64(testDeadline))
		if err := unix.SetsockoptTimeval(p.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
			return err
		}
		return unix.Bind(p.fd, &unix.SockaddrLinklayer{Protocol: proto<<8 | proto>>8, Ifindex: l.wire.Attrs().Index})
	})
	l.t.Cleanup(func() { unix.Close(p.fd) })
	return p
}

func (p *packetSocket) send(frame []byte) {
	p.t.Helper()
	if _, err := unix.Write(p.fd, frame); err != nil {
		p.t.Fatalf("send frame: %v", err)
	}
}

// receive waits for a frame that came in from the wire.
func (p *packetSocket) receive() []byte {
	p.t.Helper()
	buf := make([]byte, 70000)
	for {
		n, from, err := unix.Recvfrom(p.fd, buf, 0)
		if err != nil {
			p.t.Fatalf("receive frame: %v", err)
		}
		if a, ok := from.(*unix.SockaddrLinklayer); ok && a.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		return buf[:n]
	}
}

// redirectAll attaches a program that gives all packets to the sockets, by
// queue.
func redirectAll(t testing.TB, ifindex int, flags link.XDPAttachFlags, frags bool, sockets ...*Socket) {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.XSKMap, KeySize: 4, ValueSize: 4, MaxEntries: 64})
	if err != nil {
		t.Fatal(err)
	}
	spec := &ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, 16, asm.Word), // rx_queue_index
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Imm(asm.R3, verdictPass),
		asm.FnRedirectMap.Call(),
		asm.Return(),
	}}
	if frags {
		spec.Flags = unix.BPF_F_XDP_HAS_FRAGS
	}
	program, err := ebpf.NewProgram(spec)
	if err != nil {
		t.Fatal(err)
	}
	x, err := link.AttachXDP(link.XDPOptions{Program: program, Interface: ifindex, Flags: flags})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.Close(); program.Close(); m.Close() })
	for _, s := range sockets {
		if err := m.Put(uint32(s.config.Queue), uint32(s.FD())); err != nil {
			t.Fatal(err)
		}
	}
}

// pollIn waits until one of the descriptors can be read.
func pollIn(t testing.TB, fds ...int) {
	t.Helper()
	set := make([]unix.PollFd, len(fds))
	for i, fd := range fds {
		set[i] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	}
	for {
		n, err := unix.Poll(set, int(testDeadline/time.Millisecond))
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			t.Fatalf("poll: %d ready, %v", n, err)
		}
		return
	}
}

// background runs f until the test ends, and waits for its end.
func background(t testing.TB, f func(stop <-chan struct{})) {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { f(stop) })
	t.Cleanup(func() { close(stop); wg.Wait() })
}
