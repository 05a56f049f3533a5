package xdp

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A relay is a diverter whose process changes nothing: what it takes off the
// wire goes to the kernel and the other way round.
type relay struct {
	*lab
	umem     *Umem
	tap      *TAP
	sockets  []*Socket
	diverter *Diverter
}

func newRelay(l *lab, queues int, cfg HostAttachConfig) *relay {
	t := l.t
	t.Helper()
	// Generic XDP on veth sees what the peer's stack leaves uncut, up to 64 KiB.
	size := 2048
	if cfg.Mode == ModeGeneric {
		size, cfg.Frags = 4096, true
	}
	r := &relay{lab: l, umem: testUmem(t, 2048, size)}
	var err error
	if r.tap, err = OpenTAP(TAPConfig{Queues: 1, MTU: l.nic.Attrs().MTU}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.tap.Close() })
	// Without TSO, as the relay cuts nothing.
	if err := unix.IoctlSetInt(r.tap.Queue(0).FD(), unix.TUNSETOFFLOAD, unix.TUN_F_CSUM); err != nil {
		t.Fatal(err)
	}
	cfg.Ifindex, cfg.TAPIfindex = l.nic.Attrs().Index, r.tap.Ifindex()
	if r.diverter, err = AttachHost(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.diverter.Close() })
	for q := range queues {
		s := testSocket(t, r.umem, SocketConfig{Ifindex: cfg.Ifindex, Queue: q, Mode: cfg.Mode, MultiBuffer: cfg.Frags, FillSize: 512, RXSize: 512, TXSize: 512, CompletionSize: 512, Reserve: 512})
		s.Refill()
		if err := r.diverter.RegisterSocket(q, s); err != nil {
			t.Fatal(err)
		}
		r.sockets = append(r.sockets, s)
	}
	if err := r.diverter.Enable(true); err != nil {
		t.Fatal(err)
	}
	background(t, r.run)
	return r
}

func (r *relay) run(stop <-chan struct{}) {
	q := r.tap.Queue(0)
	fds := []unix.PollFd{{Fd: int32(q.FD()), Events: unix.POLLIN}}
	for _, s := range r.sockets {
		fds = append(fds, unix.PollFd{Fd: int32(s.FD()), Events: unix.POLLIN})
	}
	hdr, buf, descs := make([]byte, VnetHdrLen), make([]byte, MaxTAPPacket), make([]Desc, 64)
	packets := make([][]Desc, len(r.sockets)) // not complete yet
	for {
		select {
		case <-stop:
			return
		default:
		}
		unix.Poll(fds, 20)
		for i, s := range r.sockets {
			for n := s.Receive(descs); n > 0; n = s.Receive(descs) {
				for _, d := range descs[:n] {
					packets[i] = append(packets[i], d)
					if d.Options&OptionContinued == 0 {
						r.inject(q, hdr, packets[i])
						packets[i] = packets[i][:0]
					}
				}
			}
			s.Refill()
		}
		out := r.sockets[0]
		for n, err := q.Read(buf); err == nil; n, err = q.Read(buf) {
			v, f := ParseVnetHdr(buf), buf[VnetHdrLen:n]
			if v.GSOType != VnetGSONone {
				r.t.Errorf("a packet to be cut: %+v", v)
				continue
			}
			for out.Complete(); r.umem.Available() == 0; out.Complete() {
				out.Kick()
			}
			d := put(r.t, r.umem, f)
			if v.Flags&VnetNeedsCsum != 0 {
				out.RequestChecksum(&d, v.CsumStart, v.CsumOffset)
			}
			for out.Transmit([]Desc{d}) == 0 {
				out.Kick()
				out.Complete()
			}
			out.Kick()
		}
		out.Kick()
		out.Complete()
	}
}

func (r *relay) inject(q *TAPQueue, hdr []byte, packet []Desc) {
	var data [][]byte
	length := 0
	for _, d := range packet {
		data = append(data, r.umem.Bytes(d.Addr, int(d.Len)))
		length += int(d.Len)
	}
	f := data[0]
	pseudo, l4 := pseudoSum(f)
	binary.BigEndian.PutUint16(f[l4+16:], pseudo)
	v := VnetHdr{Flags: VnetNeedsCsum, CsumStart: uint16(l4), CsumOffset: 16}
	if length > 1514 {
		v.GSOType, v.GSOSize, v.HdrLen = VnetGSOTCPv4, 1400, uint16(l4+32)
		if f[14]>>4 == 6 {
			v.GSOType = VnetGSOTCPv6
		}
	}
	v.Put(hdr)
	if err := q.Writev(hdr, data); err != nil {
		r.t.Errorf("write to TAP: %v", err)
	}
	for _, d := range packet {
		r.umem.Free(d.Addr)
	}
}

// exchange sends n bytes from one end to the other, compares their hashes, and
// then the same in the other direction.
func exchange(a, b net.Conn, n int) error {
	message := make([]byte, n)
	for i := range message {
		message[i] = byte(i * 7 >> 3)
	}
	want := sha256.Sum256(message)
	for _, dir := range [][2]net.Conn{{a, b}, {b, a}} {
		written := make(chan error, 1)
		dir[0].SetDeadline(time.Now().Add(testDeadline))
		dir[1].SetDeadline(time.Now().Add(testDeadline))
		go func() {
			_, err := dir[0].Write(message)
			written <- err
		}()
		got := sha256.New()
		if m, err := io.CopyN(got, dir[1], int64(n)); err != nil {
			return fmt.Errorf("read after %d bytes: %w", m, err)
		}
		if err := <-written; err != nil {
			return err
		}
		if !bytes.Equal(got.Sum(nil), want[:]) {
			return errors.New("the bytes changed")
		}
	}
	return nil
}

func listen(l *lab, addr netip.Addr, inPeer bool) net.Listener {
	l.t.Helper()
	var ln net.Listener
	open := func() (err error) {
		ln, err = net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
		return err
	}
	if inPeer {
		l.inPeer(open)
	} else if err := open(); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { ln.Close() })
	return ln
}

// connect makes a connection to a listener from a given address of the other
// namespace, and accepts it.
func connect(l *lab, from netip.AddrPort, ln net.Listener, fromPeer bool) (client, server net.Conn) {
	l.t.Helper()
	dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(from), Timeout: testDeadline}
	dial := func() (err error) {
		client, err = dialer.Dial("tcp", ln.Addr().String())
		return err
	}
	if fromPeer {
		l.inPeer(dial)
	} else if err := dial(); err != nil {
		l.t.Fatal(err)
	}
	server, err := ln.Accept()
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func addrPort(a net.Addr) netip.AddrPort { return a.(*net.TCPAddr).AddrPort() }

func TestDiverterRelay(t *testing.T) {
	for _, mode := range []Mode{ModeCopy, ModeGeneric} {
		for _, v6 := range []bool{false, true} {
			for _, queues := range []int{1, 2} {
				name := fmt.Sprintf("%v/v6=%v/queues=%d", mode, v6, queues)
				t.Run(name, func(t *testing.T) {
					l := newLab(t, queues, 1500)
					r := newRelay(l, queues, HostAttachConfig{Mode: mode})
					if got := r.diverter.Mode(); got != mode {
						t.Errorf("mode %v", got)
					}
					host, peer := hostAddr4, peerAddr4
					if v6 {
						host, peer = hostAddr6, peerAddr6
					}
					guard, leftovers, err := OpenGuard(guardOf(t, l.nic.Attrs().Index, r.diverter.Mark()))
					if err != nil || len(leftovers) != 0 {
						t.Fatalf("guard: %v, %v", leftovers, err)
					}
					t.Cleanup(func() { guard.Remove() })

					// One connection that the host opens, one that the peer does.
					out, in := listen(l, peer, true), listen(l, host, false)
					from := netip.AddrPortFrom(host, 45001)
					peerFrom := netip.AddrPortFrom(peer, 45002)
					for _, key := range []FlowKey{
						NewFlowKey(from, addrPort(out.Addr()), 0), NewFlowKey(addrPort(in.Addr()), peerFrom, 0),
					} {
						if err := errors.Join(r.diverter.Insert(key), guard.Insert(key)); err != nil {
							t.Fatal(err)
						}
					}
					a, b := connect(l, from, out, false)
					c, d := connect(l, peerFrom, in, true)
					for _, pair := range [][2]net.Conn{{a, b}, {c, d}} {
						if err := exchange(pair[0], pair[1], 300_000); err != nil {
							t.Fatal(err)
						}
					}
					// The kernel's own path stays open to others.
					e, f := connect(l, netip.AddrPortFrom(peer, 45003), in, true)
					if err := exchange(e, f, 100_000); err != nil {
						t.Fatal(err)
					}

					counters, err := r.diverter.Counters()
					if err != nil {
						t.Fatal(err)
					}
					guarded, err := guard.Counters()
					if err != nil {
						t.Fatal(err)
					}
					if counters["xdp_flow_redirected"] < 20 || counters["egress_flow_redirected"] < 20 || counters["xdp_passed"] == 0 ||
						(counters["xdp_passed_injected"] > 0) != (mode == ModeGeneric) {
						t.Errorf("%v", counters)
					}
					if guarded["guard_in_injected"] < 20 || guarded["guard_in_flow_dropped"] != 0 || guarded["guard_out_flow_dropped"] != 0 {
						t.Errorf("%v, injected %d", guarded, counters["tap_injected"])
					}
				})
			}
		}
	}
}

// A SYN of the host goes to the TAP device when its port is selected, and from
// there nowhere unless the process sends it.
func TestDiverterSYN(t *testing.T) {
	l := newLab(t, 1, 1500)
	tap, err := OpenTAP(TAPConfig{MTU: 1500})
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	d, err := AttachHost(HostAttachConfig{Ifindex: l.nic.Attrs().Index, TAPIfindex: tap.Ifindex(), Mode: ModeAuto, Policy: Policy{Ports: [][2]uint16{{8000, 8010}}, Exclude: [][2]uint16{{8005, 8005}}}})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if d.Mode() != ModeCopy || d.Fallback() != nil {
		t.Errorf("mode %v: %v", d.Mode(), d.Fallback())
	}
	if err := tap.SetSteering(d.SteeringProgram()); err != nil {
		t.Fatal(err)
	}
	syn := func(port int) {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: peerAddr4.As4()}); err != unix.EINPROGRESS {
			t.Fatal(err)
		}
	}
	syn(8000) // not yet
	if err := d.Enable(true); err != nil {
		t.Fatal(err)
	}
	syn(8005) // excluded
	syn(7999) // not selected
	syn(8001)
	pollIn(t, tap.Queue(0).FD())
	buf := make([]byte, MaxTAPPacket)
	n, err := tap.Queue(0).Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	tcp := buf[VnetHdrLen+34 : n]
	if port := binary.BigEndian.Uint16(tcp[2:]); port != 8001 || tcp[13] != flagSYN {
		t.Errorf("a segment with flags %x to port %d", tcp[13], port)
	}
	if _, err := tap.Queue(0).Read(buf); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("another packet: %v", err)
	}
}

// Of a tag in a buffer's metadata, where VLAN devices put it, the diverter makes
// a part of the key, and the TAP device bytes.
func TestDiverterVLAN(t *testing.T) {
	l := newLab(t, 1, 1500)
	tap, err := OpenTAP(TAPConfig{MTU: 1500})
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	index := l.nic.Attrs().Index
	push, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Imm(asm.R2, 0x0081), // ETH_P_8021Q in network order
		asm.Mov.Imm(asm.R3, 0x6007), // priority 3, VLAN 7
		asm.FnSkbVlanPush.Call(),
		asm.Mov.Imm(asm.R0, -1),
		asm.Return(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer push.Close()
	first, err := link.AttachTCX(link.TCXOptions{Program: push, Interface: index, Attach: ebpf.AttachTCXEgress})
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	d, err := AttachHost(HostAttachConfig{Ifindex: index, TAPIfindex: tap.Ifindex()})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	conn, err := net.ListenPacket("ip4:tcp", hostAddr4.String()) // a raw socket
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s := segment{src: netip.AddrPortFrom(hostAddr4, 1000), dst: netip.AddrPortFrom(peerAddr4, 2000), flags: flagACK}
	for _, vlan := range []uint16{0, 7} {
		if err := d.Insert(NewFlowKey(s.src, s.dst, vlan)); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.WriteTo(s.tcp(), &net.IPAddr{IP: peerAddr4.AsSlice()}); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, MaxTAPPacket)
		if vlan == 0 {
			if _, err := tap.Queue(0).Read(buf); !errors.Is(err, unix.EAGAIN) {
				t.Errorf("a packet of another VLAN was diverted: %v", err)
			}
			continue
		}
		pollIn(t, tap.Queue(0).FD())
		n, err := tap.Queue(0).Read(buf)
		if err != nil || !bytes.Equal(buf[VnetHdrLen+12:VnetHdrLen+18], []byte{0x81, 0, 0x60, 7, 8, 0}) {
			t.Errorf("% x, %v", buf[:n], err)
		}
	}
}

func TestDiverterSteering(t *testing.T) {
	c := hostPrograms(t, 0)
	d := &Diverter{diversion: diversion{collection: c, flows: newFlowMap(c.Maps["flows"], c.Maps["pairs"])}}
	for queue := range 4 {
		for _, key := range []FlowKey{NewFlowKey(local4, remote4, 0), NewFlowKey(local6, remote6, 0), NewFlowKey(local4, remote4, 7)} {
			if err := d.InsertSteered(key, queue); err != nil {
				t.Fatal(err)
			}
		}
		for _, s := range []segment{{src: local4, dst: remote4}, {src: local6, dst: remote6}, {src: local4, dst: remote4, vlans: []uint16{7}}} {
			// The test run takes off an Ethernet header; on the TAP device
			// the program starts at it.
			got, _, err := c.Programs["tap_steer"].Test(append(make([]byte, 14), s.frame()...))
			if err != nil || int(got) != queue {
				t.Errorf("%v: queue %d, want %d (%v)", s, got, queue, err)
			}
		}
	}
}

func TestAttachErrors(t *testing.T) {
	l := newLab(t, 1, 1500)
	tap, err := OpenTAP(TAPConfig{})
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	cfg := HostAttachConfig{Ifindex: l.nic.Attrs().Index, TAPIfindex: tap.Ifindex(), Mode: ModeCopy}
	d, err := AttachHost(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, mode := range []Mode{ModeAuto, ModeZeroCopy, ModeCopy, ModeGeneric} {
		cfg.Mode = mode
		if second, err := AttachHost(cfg); !errors.Is(err, ErrXDPBusy) {
			if err == nil {
				second.Close()
			}
			t.Errorf("second diverter, mode %v: %v", mode, err)
		} else {
			t.Log(err)
		}
	}
	// As if the program were another process's.
	attached.Lock()
	delete(attached.programs, d.program)
	attached.Unlock()
	if g, _, err := OpenGuard(guardOf(t, cfg.Ifindex, 1)); !errors.Is(err, ErrGuardBusy) {
		if err == nil {
			g.Remove()
		}
		t.Errorf("guard beside another process: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	for _, cfg := range []HostAttachConfig{
		{Ifindex: 9999, TAPIfindex: tap.Ifindex()}, {Ifindex: l.nic.Attrs().Index, TAPIfindex: 9999},
		{Ifindex: l.nic.Attrs().Index, TAPIfindex: tap.Ifindex(), Policy: Policy{Ports: [][2]uint16{{2, 1}}}},
	} {
		if d, err := AttachHost(cfg); err == nil {
			d.Close()
			t.Errorf("%+v was accepted", cfg)
		}
	}
	// Devices without native XDP fall back, or say so.
	plain := &netlink.Ifb{LinkAttrs: netlink.LinkAttrs{Name: "plain0"}}
	if err := netlink.LinkAdd(plain); err != nil {
		t.Fatal(err)
	}
	cfg = HostAttachConfig{Ifindex: plain.Attrs().Index, TAPIfindex: tap.Ifindex(), Mode: ModeCopy}
	if d, err := AttachHost(cfg); !errors.Is(err, unix.EOPNOTSUPP) {
		if err == nil {
			d.Close()
		}
		t.Errorf("native XDP on ifb: %v", err)
	}
	cfg.Mode = ModeAuto
	d, err = AttachHost(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if d.Mode() != ModeGeneric || d.Fallback() == nil {
		t.Errorf("mode %v: %v", d.Mode(), d.Fallback())
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

func TestFlowMapPairs(t *testing.T) {
	c := hostPrograms(t, 0)
	m := newFlowMap(c.Maps["flows"], c.Maps["pairs"])
	key := func(port uint16) FlowKey {
		return NewFlowKey(netip.AddrPortFrom(hostAddr4, port), netip.AddrPortFrom(peerAddr4, 1), 0)
	}
	pair := func() bool {
		k := key(0)
		var v uint32
		return m.pairs.Lookup([32]byte(k[:32]), &v) == nil
	}
	steps := []struct {
		insert bool
		port   uint16
		pair   bool
	}{
		{false, 1, false}, {true, 1, true}, {true, 1, true}, {true, 2, true}, {false, 1, true}, {false, 1, true}, {false, 2, false}, {true, 3, true}, {false, 3, false},
	}
	for i, s := range steps {
		f := m.delete
		if s.insert {
			f = func(k FlowKey) error { return m.insert(k, 0) }
		}
		if err := f(key(s.port)); err != nil {
			t.Fatal(err)
		}
		if pair() != s.pair {
			t.Errorf("step %d: pair listed: %v", i, !s.pair)
		}
	}
}
