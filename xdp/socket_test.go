package xdp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// testProto is an EtherType that no stack answers (local experimental).
const testProto = 0x88b5

func testUmem(t testing.TB, chunks, size int) *Umem {
	t.Helper()
	u, err := NewUmem(UmemConfig{Chunks: chunks, ChunkSize: size, TXMetadata: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if u.mem == nil {
			return
		}
		if err := u.Close(); err != nil {
			t.Error(err)
		}
	})
	return u
}

func testSocket(t testing.TB, u *Umem, cfg SocketConfig) *Socket {
	t.Helper()
	s, err := NewSocket(u, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// numbered is a test frame of length n.
func numbered(number uint32, n int) []byte {
	f := append(append(append([]byte(nil), hostMAC...), peerMAC...), testProto>>8, testProto&0xff)
	f = binary.BigEndian.AppendUint32(f, number)
	for len(f) < n {
		f = append(f, byte(len(f)))
	}
	return f
}

func number(frame []byte) uint32 { return binary.BigEndian.Uint32(frame[14:]) }

// put writes a frame into a fresh chunk.
func put(t testing.TB, u *Umem, frame []byte) Desc {
	t.Helper()
	addr, ok := u.Alloc()
	if !ok {
		t.Fatal("no chunk left")
	}
	copy(u.Bytes(addr+Headroom, len(frame)), frame)
	return Desc{Addr: addr + Headroom, Len: uint32(len(frame))}
}

// drain kicks until all is sent.
func drain(t testing.TB, s *Socket) {
	t.Helper()
	for deadline := time.Now().Add(testDeadline); s.Pending() > 0; s.Complete() {
		if err := s.Kick(); err != nil {
			t.Fatal(err)
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d frames pending", s.Pending())
		}
	}
}

func TestSocketReceive(t *testing.T) {
	for _, tc := range []struct {
		name  string
		mode  Mode
		flags link.XDPAttachFlags
		want  Mode
	}{
		{"auto", ModeAuto, link.XDPDriverMode, ModeCopy},
		{"copy", ModeCopy, link.XDPDriverMode, ModeCopy},
		{"generic", ModeGeneric, link.XDPGenericMode, ModeGeneric},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newQuietLab(t, 1, 1500)
			u := testUmem(t, 256, 2048)
			s := testSocket(t, u, SocketConfig{Ifindex: l.nic.Attrs().Index, Mode: tc.mode, FillSize: 64, RXSize: 64, TXSize: 64, CompletionSize: 64, Reserve: 200})
			if s.Mode() != tc.want {
				t.Errorf("mode %v, want %v", s.Mode(), tc.want)
			}
			if tc.mode == ModeAuto && s.Fallback() == nil {
				t.Error("no reason for not being zero-copy")
			}
			if n := s.Refill(); n != 56 || u.Available() != 200 {
				t.Fatalf("filled %d, %d left, want the reserve of 200", n, u.Available())
			}
			redirectAll(t, l.nic.Attrs().Index, tc.flags, false, s)
			wire := l.openPacket(testProto)
			const frames = 1000 // the rings go round several times
			descs := make([]Desc, 8)
			next := uint32(0)
			for i := range uint32(frames) {
				wire.send(numbered(i, 60+int(i)%1400))
				if i%16 != 15 && i != frames-1 {
					continue
				}
				for next <= i {
					pollIn(t, s.FD())
					for _, d := range descs[:s.Receive(descs)] {
						want := numbered(next, 60+int(next)%1400)
						if got := u.Bytes(d.Addr, int(d.Len)); !bytes.Equal(got, want) {
							t.Fatalf("frame %d: % x", next, got)
						}
						if d.Addr%2048 != Headroom {
							t.Fatalf("data at %d in the chunk", d.Addr%2048)
						}
						next++
						u.Free(d.Addr)
					}
					s.Refill()
				}
			}
			st, err := s.Statistics()
			if err != nil {
				t.Fatal(err)
			}
			if st.Received != frames || st.RXDropped+st.RXRingFull+st.FillRingEmpty != 0 {
				t.Errorf("%+v", st)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if u.Available() != u.Chunks() {
				t.Errorf("%d of %d chunks came back", u.Available(), u.Chunks())
			}
		})
	}
}

func TestSocketTransmit(t *testing.T) {
	l := newQuietLab(t, 1, 1500)
	u := testUmem(t, 512, 2048)
	s := testSocket(t, u, SocketConfig{Ifindex: l.nic.Attrs().Index, Mode: ModeCopy, FillSize: 64, RXSize: 64, TXSize: 128, CompletionSize: 128})
	wire := l.openPacket(testProto)
	const frames = 2000
	sent, received := uint32(0), uint32(0)
	for received < frames {
		var batch []Desc
		for n := sent; n < frames && len(batch) < 200; n++ {
			batch = append(batch, put(t, u, numbered(n, 64+int(n)%1400)))
		}
		n := s.Transmit(batch)
		if n > 128 || n == 0 && len(batch) > 0 {
			t.Fatalf("took %d of %d", n, len(batch))
		}
		for _, d := range batch[n:] {
			u.Free(d.Addr)
		}
		sent += uint32(n)
		drain(t, s)
		for received < sent {
			if got, want := wire.receive(), numbered(received, 64+int(received)%1400); !bytes.Equal(got, want) {
				t.Fatalf("frame %d: % x", received, got)
			}
			received++
		}
	}
	st, err := s.Statistics()
	if err != nil {
		t.Fatal(err)
	}
	if st.Transmitted != frames || st.Completed != frames || st.TXInvalid != 0 || st.Refused != 0 {
		t.Errorf("%+v", st)
	}
	if u.Available() != u.Chunks() {
		t.Errorf("%d of %d chunks in the pool", u.Available(), u.Chunks())
	}
}

// A retained chunk comes back to who retains it, or to the pool if that one has
// let go of it meanwhile.
func TestRetain(t *testing.T) {
	l := newQuietLab(t, 1, 1500)
	u := testUmem(t, 64, 2048)
	s := testSocket(t, u, SocketConfig{Ifindex: l.nic.Attrs().Index, Mode: ModeCopy, FillSize: 64, RXSize: 64, TXSize: 64, CompletionSize: 64, Reserve: 64})
	wire := l.openPacket(testProto)
	var d []Desc
	for n := range uint32(3) {
		d = append(d, put(t, u, numbered(n, 100)))
		if n < 2 {
			u.Retain(d[n].Addr)
		}
	}
	if n := s.Transmit(d); n != 3 {
		t.Fatalf("took %d", n)
	}
	if !u.Sending(d[0].Addr) || u.Available() != u.Chunks()-3 {
		t.Fatalf("sending %v, %d chunks in the pool", u.Sending(d[0].Addr), u.Available())
	}
	u.Free(d[1].Addr)
	if u.Available() != u.Chunks()-3 {
		t.Error("a chunk in a ring is in the pool, too")
	}
	drain(t, s)
	for n := range uint32(3) {
		if got := wire.receive(); !bytes.Equal(got, numbered(n, 100)) {
			t.Errorf("frame %d: % x", n, got)
		}
	}
	if u.Sending(d[0].Addr) || u.Available() != u.Chunks()-1 {
		t.Errorf("sending %v, %d of %d chunks in the pool", u.Sending(d[0].Addr), u.Available(), u.Chunks())
	}
	if got := u.Bytes(d[0].Addr, 100); !bytes.Equal(got, numbered(0, 100)) {
		t.Errorf("the retained chunk has % x", got)
	}
	u.Retain(d[0].Addr)
	u.Discard(d[0].Addr)
	if u.Available() != u.Chunks()-1 || u.Sending(d[0].Addr) {
		t.Error("discarded although retained")
	}
	u.Retain(d[0].Addr)
	u.Free(d[0].Addr)
	if u.Available() != u.Chunks()-1 {
		t.Error("in the pool before it was discarded")
	}
	u.Discard(d[0].Addr)
	if u.Available() != u.Chunks() {
		t.Errorf("%d of %d chunks in the pool", u.Available(), u.Chunks())
	}
}

// Without a carrier the device drops each frame, which ends the batch: all
// chunks come back nevertheless.
func TestSocketTransmitBusy(t *testing.T) {
	l := newQuietLab(t, 1, 1500)
	u := testUmem(t, 1024, 2048)
	s := testSocket(t, u, SocketConfig{Ifindex: l.nic.Attrs().Index, Mode: ModeCopy, FillSize: 64, RXSize: 64, TXSize: 1024, CompletionSize: 1024})
	l.inPeer(func() error { return netlink.LinkSetDown(l.wire) })
	var batch []Desc
	for n := range uint32(600) {
		batch = append(batch, put(t, u, numbered(n, 60)))
	}
	if n := s.Transmit(batch); n != len(batch) {
		t.Fatalf("took %d of %d", n, len(batch))
	}
	drain(t, s)
	st, err := s.Statistics()
	if err != nil {
		t.Fatal(err)
	}
	if u.Available() != u.Chunks() || st.Completed != 600 || st.KickBusy < 600 || st.KickStalls < 2 {
		t.Errorf("%d of %d chunks in the pool, %+v", u.Available(), u.Chunks(), st)
	}
}

func TestSocketTransmitInvalid(t *testing.T) {
	l := newQuietLab(t, 1, 1500)
	u := testUmem(t, 64, 2048)
	s := testSocket(t, u, SocketConfig{Ifindex: l.nic.Attrs().Index, Mode: ModeCopy, FillSize: 64, RXSize: 64, TXSize: 64, CompletionSize: 64})
	wire := l.openPacket(testProto)
	good := put(t, u, numbered(1, 64))
	long := make([]Desc, 0, maxSegments+1)
	for range maxSegments + 1 {
		d := put(t, u, numbered(0, 64))
		d.Options = OptionContinued
		long = append(long, d)
	}
	long[maxSegments].Options = 0
	alter := func(f func(*Desc)) Desc {
		d := put(t, u, numbered(0, 64))
		f(&d)
		return d
	}
	batch := append(long,
		alter(func(d *Desc) { d.Len = 0 }),
		alter(func(d *Desc) { d.Addr += 1792 - 63 }),
		alter(func(d *Desc) { d.Addr -= Headroom - 8 }),
		alter(func(d *Desc) { d.Options = 1 << 7 }),
		good)
	unfinished := put(t, u, numbered(0, 64))
	unfinished.Options = OptionContinued
	batch = append(batch, unfinished)
	if n := s.Transmit(batch); n != len(batch)-1 {
		t.Fatalf("took %d of %d", n, len(batch))
	}
	u.Free(unfinished.Addr)
	if s.Pending() != 1 {
		t.Fatalf("%d pending", s.Pending())
	}
	drain(t, s)
	if f := wire.receive(); number(f) != 1 {
		t.Errorf("% x", f)
	}
	st, err := s.Statistics()
	if err != nil {
		t.Fatal(err)
	}
	if st.TXInvalid != 0 || st.Refused != uint64(len(batch)-2) {
		t.Errorf("%+v", st)
	}
	if u.Available() != u.Chunks() {
		t.Errorf("%d of %d chunks in the pool", u.Available(), u.Chunks())
	}
}

func TestSharedUmem(t *testing.T) {
	l := newQuietLab(t, 2, 1500)
	u := testUmem(t, 512, 2048)
	cfg := SocketConfig{Ifindex: l.nic.Attrs().Index, Mode: ModeCopy, FillSize: 64, RXSize: 64, TXSize: 64, CompletionSize: 64}
	first := testSocket(t, u, cfg)
	cfg.Queue, cfg.Mode = 1, ModeAuto
	second := testSocket(t, u, cfg)
	sockets := []*Socket{first, second}
	if second.Mode() != ModeCopy || !second.ChecksumOffload() {
		t.Errorf("second socket: mode %v, offload %v", second.Mode(), second.ChecksumOffload())
	}
	cfg.Queue, cfg.Mode = 0, ModeZeroCopy
	if s, err := NewSocket(u, cfg); err == nil {
		s.Close()
		t.Error("a zero-copy socket on a UMEM in copy mode")
	}
	redirectAll(t, l.nic.Attrs().Index, link.XDPDriverMode, false, sockets...)
	wire := l.openPacket(testProto)
	seen := make(map[uint32]bool)
	descs := make([]Desc, 64)
	for i := range uint32(64) {
		first.Refill()
		second.Refill()
		wire.send(numbered(i, 100))
		pollIn(t, first.FD(), second.FD())
		// What one queue brings, the other sends back.
		for q, s := range sockets {
			got := descs[:s.Receive(descs)]
			for _, d := range got {
				seen[number(u.Bytes(d.Addr, int(d.Len)))] = true
			}
			other := sockets[1-q]
			if n := other.Transmit(got); n != len(got) {
				t.Fatalf("took %d of %d", n, len(got))
			}
			drain(t, other)
		}
		if n := number(wire.receive()); n != i {
			t.Fatalf("frame %d came back as %d", i, n)
		}
	}
	if len(seen) != 64 {
		t.Errorf("%d frames", len(seen))
	}

	// The first socket goes; the second keeps the UMEM registered.
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	cfg.Mode = ModeCopy
	again := testSocket(t, u, cfg)
	d := put(t, u, numbered(7, 80))
	again.Transmit([]Desc{d})
	drain(t, again)
	if n := number(wire.receive()); n != 7 {
		t.Errorf("frame %d", n)
	}
	again.Close()
	second.Close()
	if u.Available() != u.Chunks() {
		t.Errorf("%d of %d chunks came back", u.Available(), u.Chunks())
	}
}

func TestQueueBusy(t *testing.T) {
	l := newQuietLab(t, 1, 1500)
	cfg := SocketConfig{Ifindex: l.nic.Attrs().Index, Mode: ModeCopy, FillSize: 64, RXSize: 64, TXSize: 64, CompletionSize: 64, BindTimeout: time.Millisecond}
	u1, u2 := testUmem(t, 64, 2048), testUmem(t, 64, 2048)
	s := testSocket(t, u1, cfg)
	if _, err := NewSocket(u2, cfg); !errors.Is(err, ErrQueueBusy) {
		t.Fatalf("second bind: %v", err)
	}
	s.Refill()
	cfg.BindTimeout = testDeadline
	for range 5 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = testSocket(t, u2, cfg)
		s.Refill()
	}
	if u1.Available() != 64 {
		t.Errorf("%d chunks came back", u1.Available())
	}
	cfg.Queue = 5
	if _, err := NewSocket(u1, cfg); err == nil {
		t.Error("bound to a queue that is not there")
	}
	s.Close()
	cfg.Queue, cfg.Mode = 0, ModeZeroCopy
	if _, err := NewSocket(u1, cfg); !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("zero-copy on veth: %v", err)
	}
}

func TestChecksumRequest(t *testing.T) {
	l := newQuietLab(t, 1, 1500)
	u := testUmem(t, 64, 2048)
	s := testSocket(t, u, SocketConfig{Ifindex: l.nic.Attrs().Index, Mode: ModeCopy, FillSize: 64, RXSize: 64, TXSize: 64, CompletionSize: 64})
	if !s.ChecksumOffload() {
		t.Skip("the kernel has no TX metadata (before 6.11)")
	}
	var conn net.PacketConn
	l.inPeer(func() (err error) {
		conn, err = net.ListenPacket("udp", netip.AddrPortFrom(peerAddr4, 7000).String())
		return err
	})
	defer conn.Close()
	datagram := func(text string) []byte {
		udp := binary.BigEndian.AppendUint16(nil, 6000)
		udp = binary.BigEndian.AppendUint16(udp, 7000)
		udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(text)))
		udp = append(append(udp, 0, 0), text...)
		f := append(append(append([]byte(nil), peerMAC...), hostMAC...), 8, 0)
		f = append(f, segment{src: netip.AddrPortFrom(hostAddr4, 0), dst: netip.AddrPortFrom(peerAddr4, 0)}.ip(17, udp)...)
		pseudo, l4 := pseudoSum(f)
		binary.BigEndian.PutUint16(f[l4+6:], pseudo)
		return f
	}
	plain := put(t, u, datagram("not summed"))
	asked := put(t, u, datagram("summed by the device"))
	s.RequestChecksum(&asked, 34, 6)
	outside := put(t, u, datagram("also not summed"))
	s.RequestChecksum(&outside, 34, 60000)
	if plain.Options|outside.Options != 0 || asked.Options != OptionTXMetadata {
		t.Fatalf("options %x %x %x", plain.Options, asked.Options, outside.Options)
	}
	if n := s.Transmit([]Desc{plain, outside, asked}); n != 3 {
		t.Fatal(n)
	}
	drain(t, s)
	conn.SetReadDeadline(time.Now().Add(testDeadline))
	buf := make([]byte, 100)
	n, _, err := conn.ReadFrom(buf)
	if err != nil || string(buf[:n]) != "summed by the device" {
		t.Errorf("%q, %v", buf[:n], err)
	}
}

func TestMultiBuffer(t *testing.T) {
	l := newQuietLab(t, 1, 9000)
	u := testUmem(t, 256, 2048)
	s := testSocket(t, u, SocketConfig{Ifindex: l.nic.Attrs().Index, Mode: ModeCopy, MultiBuffer: true, FillSize: 128, RXSize: 128, TXSize: 64, CompletionSize: 64, Reserve: 100})
	redirectAll(t, l.nic.Attrs().Index, link.XDPDriverMode, true, s)
	s.Refill()
	wire := l.openPacket(testProto)
	want := numbered(3, 8900)
	wire.send(want)
	pollIn(t, s.FD())
	var packet []Desc
	one := make([]Desc, 1) // so that the packet straddles calls
	for s.Receive(one) == 1 {
		packet = append(packet, one[0])
		if one[0].Options&OptionContinued == 0 {
			break
		}
	}
	var got []byte
	for _, d := range packet {
		got = append(got, u.Bytes(d.Addr, int(d.Len))...)
	}
	if len(packet) < 5 || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes in %d descriptors", len(got), len(packet))
	}
	if n := s.Transmit(packet); n != len(packet) {
		t.Fatalf("took %d of %d", n, len(packet))
	}
	drain(t, s)
	if got := wire.receive(); !bytes.Equal(got, want) {
		t.Errorf("%d bytes came back", len(got))
	}
}

func TestDeviceGone(t *testing.T) {
	l := newQuietLab(t, 1, 1500)
	u := testUmem(t, 64, 2048)
	s := testSocket(t, u, SocketConfig{Ifindex: l.nic.Attrs().Index, Mode: ModeCopy, FillSize: 64, RXSize: 64, TXSize: 64, CompletionSize: 64, Reserve: 32})
	s.Refill()
	events := make(chan error, 4)
	stop, err := WatchLink(l.nic.Attrs().Index, events)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	event := func() error {
		select {
		case err := <-events:
			return err
		case <-time.After(testDeadline):
			t.Fatal("no event")
			return nil
		}
	}
	kick := func() error {
		if n := s.Transmit([]Desc{put(t, u, shortFrame)}); n != 1 {
			t.Fatal("no room")
		}
		return s.Kick()
	}
	if err := netlink.LinkSetDown(l.nic); err != nil {
		t.Fatal(err)
	}
	if err := event(); !errors.Is(err, ErrDeviceDown) {
		t.Errorf("watch: %v", err)
	}
	if err := kick(); !errors.Is(err, ErrDeviceDown) {
		t.Errorf("kick on a device that is down: %v", err)
	}
	if err := netlink.LinkSetUp(l.nic); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetMTU(l.nic, 1400); err != nil {
		t.Fatal(err)
	}
	if err := event(); err != DeviceMTU(1400) {
		t.Errorf("watch: %v", err)
	}
	if err := netlink.LinkDel(l.nic); err != nil {
		t.Fatal(err)
	}
	for err := event(); !errors.Is(err, ErrDeviceGone); err = event() {
		if !errors.Is(err, ErrDeviceDown) {
			t.Fatalf("watch: %v", err)
		}
	}
	if err := kick(); !errors.Is(err, ErrDeviceGone) {
		t.Errorf("kick on a removed device: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	// The frames that were not sent stay out of the pool.
	if n := u.Chunks() - u.Available(); n != 2 || len(u.quarantine) != 1 {
		t.Errorf("%d chunks are out, quarantine %v", n, u.quarantine)
	}
}

// More changes than the kernel keeps for one who does not receive them: the last
// ones are reported all the same, and that the device goes.
func TestWatchLinkOverflow(t *testing.T) {
	l := newLab(t, 1, 1500)
	events := make(chan error)
	stop, err := WatchLink(l.nic.Attrs().Index, events)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	until := func(want error) {
		t.Helper()
		for deadline := time.After(testDeadline); ; {
			select {
			case err := <-events:
				if err == want {
					return
				}
				if _, ok := err.(DeviceMTU); !ok && err != ErrDeviceDown {
					t.Fatal(err)
				}
			case <-deadline:
				t.Fatalf("%v is not reported", want)
			}
		}
	}
	storm := func() {
		t.Helper()
		for range 1000 {
			for _, mtu := range []int{1400, 1401} {
				if err := netlink.LinkSetMTU(l.nic, mtu); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	storm()
	if err := netlink.LinkSetMTU(l.nic, 1402); err != nil {
		t.Fatal(err)
	}
	until(DeviceMTU(1402))
	storm()
	if err := netlink.LinkDel(l.nic); err != nil {
		t.Fatal(err)
	}
	until(ErrDeviceGone)
}

func TestSocketAllocs(t *testing.T) {
	l := newQuietLab(t, 1, 1500)
	u := testUmem(t, 64, 2048)
	s := testSocket(t, u, SocketConfig{Ifindex: l.nic.Attrs().Index, Mode: ModeCopy, FillSize: 64, RXSize: 64, TXSize: 64, CompletionSize: 64, Reserve: 32})
	descs := make([]Desc, 8)
	if n := testing.AllocsPerRun(100, func() {
		s.Refill()
		s.Receive(descs)
		d := put(t, u, shortFrame)
		s.RequestChecksum(&d, 14, 2)
		descs[0] = d
		s.Transmit(descs[:1])
		s.Kick()
		s.Complete()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

var shortFrame = numbered(0, 100)
