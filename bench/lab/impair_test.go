package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
)

// newHalf returns one direction without sockets.
func newHalf(seed uint64, im Impair) *half {
	f := &Forwarder{}
	h := &half{f: f, mtu: 1500, rng: rand.New(rand.NewPCG(seed, 0))}
	f.half[AtoB] = h
	f.Set(AtoB, im)
	h.im = h.impair.Load()
	return h
}

// stream returns n in-order segments of size bytes each.
func stream(n, size int) [][]byte {
	var out [][]byte
	for i := range n {
		s := frame.Segment{
			SrcMAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, DstMAC: net.HardwareAddr{2, 0, 0, 0, 0, 2},
			Src: netip.MustParseAddrPort("10.0.0.1:1"), Dst: netip.MustParseAddrPort("10.0.0.2:2"),
			Seq: uint32(i * size), Flags: frame.ACK, Payload: bytes.Repeat([]byte{byte(i)}, size),
			Options: []byte{frame.OptENO, 2, frame.OptNOP, frame.OptNOP},
		}
		out = append(out, s.Append(nil))
	}
	return out
}

// through passes frames through a direction and returns what it would send.
func through(h *half, frames [][]byte) [][]byte {
	for _, b := range frames {
		h.receive(slices.Clone(b))
	}
	if h.merge != nil {
		h.unmerge()
	}
	for len(h.held) > 0 {
		h.release(0)
	}
	return h.ready
}

// assemble puts the payloads in order and returns the stream.
func assemble(t *testing.T, frames [][]byte) []byte {
	t.Helper()
	var out []byte
	for _, b := range frames {
		x, ok := frame.Parse(b)
		if !ok || !x.TCP || !x.ChecksumOK(b) {
			t.Fatalf("bad frame %x", b)
		}
		seq := int(x.Seq(b))
		if n := seq + len(x.Payload(b)); n > len(out) {
			out = append(out, make([]byte, n-len(out))...)
		}
		copy(out[seq:], x.Payload(b))
	}
	return out
}

func TestImpairStages(t *testing.T) {
	const n = 2000
	in := stream(n, 300)
	want := assemble(t, in)
	near := func(got uint64, p float64) bool {
		return float64(got) > n*p*0.8 && float64(got) < n*p*1.2
	}
	for _, c := range []struct {
		name  string
		im    Impair
		check func(t *testing.T, h *half, out [][]byte)
	}{
		{"nothing", Impair{}, func(t *testing.T, h *half, out [][]byte) {
			if !slices.EqualFunc(in, out, bytes.Equal) {
				t.Error("a perfect wire changed frames")
			}
		}},
		{"drop", Impair{Drop: 0.1}, func(t *testing.T, h *half, out [][]byte) {
			if d := h.c.dropped.Load(); !near(d, 0.1) || len(out) != n-int(d) {
				t.Errorf("dropped %d, %d came out", d, len(out))
			}
		}},
		{"duplicate", Impair{Duplicate: 0.2}, func(t *testing.T, h *half, out [][]byte) {
			if d := h.c.duplicated.Load(); !near(d, 0.2) || len(out) != n+int(d) {
				t.Errorf("duplicated %d, %d came out", d, len(out))
			}
		}},
		{"reorder", Impair{Reorder: 0.1, ReorderPackets: 2}, func(t *testing.T, h *half, out [][]byte) {
			late := 0
			for i := 1; i < len(out); i++ {
				x, _ := frame.Parse(out[i-1])
				y, _ := frame.Parse(out[i])
				if x.Seq(out[i-1]) > y.Seq(out[i]) {
					late++
				}
			}
			if d := h.c.reordered.Load(); !near(d, 0.1) || len(out) != n || late == 0 {
				t.Errorf("reordered %d, %d came out, %d late", d, len(out), late)
			}
			if !bytes.Equal(assemble(t, out), want) {
				t.Error("stream changed")
			}
		}},
		{"corrupt", Impair{Corrupt: 0.1}, func(t *testing.T, h *half, out [][]byte) {
			bad := 0
			for _, b := range out {
				if x, ok := frame.Parse(b); !ok || !x.TCP || !x.ChecksumOK(b) {
					bad++
				}
			}
			if d := h.c.corrupted.Load(); !near(d, 0.1) || bad != int(d) {
				t.Errorf("corrupted %d, %d have a wrong checksum", d, bad)
			}
		}},
		{"corrupt hidden", Impair{Corrupt: 0.1, CorruptHidden: true}, func(t *testing.T, h *half, out [][]byte) {
			if !near(h.c.corrupted.Load(), 0.1) || bytes.Equal(assemble(t, out), want) {
				t.Errorf("corrupted %d", h.c.corrupted.Load())
			}
		}},
		{"cut", Impair{Cut: 0.5, CutPieces: 5}, func(t *testing.T, h *half, out [][]byte) {
			if d := h.c.cut.Load(); !near(d, 0.5) || len(out) < n+int(d) {
				t.Errorf("cut %d, %d came out", d, len(out))
			}
			if !bytes.Equal(assemble(t, out), want) {
				t.Error("stream changed")
			}
		}},
		{"coalesce", Impair{Coalesce: 0.5}, func(t *testing.T, h *half, out [][]byte) {
			d := h.c.coalesced.Load()
			if d == 0 || len(out) != n-int(d) || !bytes.Equal(assemble(t, out), want) {
				t.Errorf("coalesced %d, %d came out", d, len(out))
			}
			for _, b := range out {
				if len(b) > 1514 {
					t.Fatalf("%d bytes exceed the MTU", len(b))
				}
			}
		}},
		{"cut and coalesce", Impair{Cut: 0.5, Coalesce: 0.5}, func(t *testing.T, h *half, out [][]byte) {
			if h.c.cut.Load() == 0 || h.c.coalesced.Load() == 0 || !bytes.Equal(assemble(t, out), want) {
				t.Error("stream changed")
			}
		}},
		{"strip", Impair{Strip: []Strip{{Kind: frame.OptENO}}}, func(t *testing.T, h *half, out [][]byte) {
			for _, b := range out {
				x, _ := frame.Parse(b)
				if _, ok := frame.FindOption(x.Options(b), frame.OptENO); ok || !x.ChecksumOK(b) {
					t.Fatal("option still there, or bad checksum")
				}
			}
		}},
		{"strip SYN only", Impair{Strip: []Strip{{frame.OptENO, SYNs}}}, func(t *testing.T, h *half, out [][]byte) {
			if h.c.stripped.Load() != 0 || !slices.EqualFunc(in, out, bytes.Equal) {
				t.Error("other segments were touched")
			}
		}},
		{"queue limit", Impair{Delay: time.Hour, QueueBytes: 10_000}, func(t *testing.T, h *half, out [][]byte) {
			if h.c.overflow.Load() != uint64(n-len(h.queue)) || h.queued > 10_000 || len(out) != 0 {
				t.Errorf("overflow %d, %d wait", h.c.overflow.Load(), len(h.queue))
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHalf(1, c.im)
			out := through(h, in)
			c.check(t, h, out)
			// The same seed gives the same result, another seed another.
			if again := through(newHalf(1, c.im), in); !slices.EqualFunc(out, again, bytes.Equal) {
				t.Error("two runs with one seed differ")
			}
			random := c.im.Drop+c.im.Duplicate+c.im.Reorder+c.im.Corrupt+c.im.Cut+c.im.Coalesce > 0
			if other := through(newHalf(2, c.im), in); random && slices.EqualFunc(out, other, bytes.Equal) {
				t.Error("the seed makes no difference")
			}
		})
	}
}

func TestSegmentOversize(t *testing.T) {
	big := frame.Segment{
		SrcMAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, DstMAC: net.HardwareAddr{2, 0, 0, 0, 0, 2},
		Src: netip.MustParseAddrPort("[fd00::1]:1"), Dst: netip.MustParseAddrPort("[fd00::2]:2"),
		Flags: frame.ACK | frame.PSH, Payload: bytes.Repeat([]byte("0123456789"), 6000),
	}
	out := through(newHalf(1, Impair{}), [][]byte{big.Append(nil)})
	if !bytes.Equal(assemble(t, out), big.Payload) {
		t.Error("stream changed")
	}
	for i, b := range out {
		x, _ := frame.Parse(b)
		if len(b) > 1514 || (x.Flags(b)&frame.PSH != 0) != (i == len(out)-1) {
			t.Errorf("piece %d: %d bytes, flags %#x", i, len(b), x.Flags(b))
		}
	}
}

// hashTransfer streams n pseudo-random bytes over TCP and compares hashes.
func hashTransfer(t testing.TB, ctx context.Context, from, to *Namespace, addr netip.Addr, n int64) {
	t.Helper()
	ln, err := to.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	got := make(chan []byte, 1)
	go func() {
		defer close(got)
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		h := sha256.New()
		if _, err := io.CopyBuffer(h, onlyReader{c}, make([]byte, 1<<18)); err == nil {
			got <- h.Sum(nil)
		}
	}()
	c, err := from.Dial(ctx, "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	_ = c.SetDeadline(deadline)
	h := sha256.New()
	src := io.LimitReader(rand.NewChaCha8([32]byte{1}), n)
	if _, err := io.CopyBuffer(io.MultiWriter(c, h), src, make([]byte, 1<<18)); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	select {
	case sum := <-got:
		if !bytes.Equal(sum, h.Sum(nil)) {
			t.Errorf("%v: what arrived differs from what was sent", addr)
		}
	case <-ctx.Done():
		t.Fatalf("%v: %v", addr, ctx.Err())
	}
}

// onlyReader hides other methods, so that CopyBuffer uses its buffer.
type onlyReader struct{ io.Reader }

func TestForwarder(t *testing.T) {
	noENO := []Strip{{Kind: frame.OptENO}}
	for _, c := range []struct {
		name  string
		o     Options
		im    Impair
		bytes int64
		check func(s, r Stats) error
	}{
		{"perfect", Options{NoOffload: true}, Impair{}, 20 << 20, func(s, r Stats) error {
			if s.Received != s.Sent || s.SendErrors+s.KernelDrops != 0 {
				return errors.New("frames lost")
			}
			return nil
		}},
		{"offloads on", Options{}, Impair{}, 20 << 20, func(s, r Stats) error {
			if s.Sent <= s.Received || s.Oversize != 0 {
				return errors.New("no segment was cut to the MTU")
			}
			return nil
		}},
		{"mtu 9000", Options{NoOffload: true, MTU: 9000, Neighbours: true, Queues: 2}, Impair{Strip: noENO}, 20 << 20, nil},
		{"loss", Options{NoOffload: true}, Impair{Drop: 0.02}, 2 << 20, func(s, r Stats) error {
			if s.Dropped == 0 {
				return errors.New("nothing dropped")
			}
			return nil
		}},
		{"everything", Options{NoOffload: true}, Impair{Drop: 0.005, Duplicate: 0.02, Corrupt: 0.005, Reorder: 0.02, Cut: 0.3, Coalesce: 0.3}, 1 << 20, func(s, r Stats) error {
			if s.Dropped*s.Duplicated*s.Corrupted*s.Reordered*s.Cut*s.Coalesced == 0 {
				return errors.New("an impairment did not happen")
			}
			return nil
		}},
		{"delay and rate", Options{NoOffload: true}, Impair{Delay: 5 * time.Millisecond, Rate: 200e6}, 2 << 20, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := Start(t).Middle(c.o)
			if err != nil {
				t.Fatal(err)
			}
			f, err := p.Forward(ForwarderOptions{Seed: 7, AtoB: c.im, BtoA: c.im})
			if err != nil {
				t.Fatal(err)
			}
			ctx := testContext(t)
			hashTransfer(t, ctx, p.A.NS, p.B.NS, p.B.Addr4(), c.bytes)
			hashTransfer(t, ctx, p.A.NS, p.B.NS, p.B.Addr6(), c.bytes)
			if err := f.Close(); err != nil {
				t.Error(err)
			}
			s, r := f.Stats(AtoB), f.Stats(BtoA)
			if c.check != nil {
				if err := c.check(s, r); err != nil {
					t.Errorf("%v\na>b %+v\nb>a %+v", err, s, r)
				}
			}
			t.Logf("a>b %+v", s)
		})
	}
}

func TestHookTapCapture(t *testing.T) {
	l := Start(t)
	p, err := l.Middle(Options{NoOffload: true})
	if err != nil {
		t.Fatal(err)
	}
	// The hook drops the first SYN, so the connection needs a retransmission.
	var mu sync.Mutex
	syns := 0
	seen := map[Link]int{}
	f, err := p.Forward(ForwarderOptions{
		Hook: func(d Dir, b []byte) Verdict {
			x, ok := frame.Parse(b)
			if !ok || !x.TCP || d != AtoB || x.Flags(b)&frame.SYN == 0 {
				return Pass
			}
			mu.Lock()
			defer mu.Unlock()
			if syns++; syns == 1 {
				return Drop
			}
			return Duplicate
		},
		Tap: func(l Link, d Dir, b []byte) {
			mu.Lock()
			defer mu.Unlock()
			if x, ok := frame.Parse(b); ok && x.TCP && d == AtoB {
				seen[l]++
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "wire.pcapng")
	if _, err := f.Capture(path); err != nil {
		t.Fatal(err)
	}
	got, err := transfer(testContext(t), p.A.NS, p.B.NS, p.B.Addr4(), []byte("needle in the wire"))
	if err != nil || string(got) != "needle in the wire" {
		t.Fatalf("got %q, %v", got, err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	s := f.Stats(AtoB)
	mu.Lock()
	defer mu.Unlock()
	if syns < 2 || s.HookDropped != 1 || s.Duplicated == 0 {
		t.Errorf("%d SYNs, %+v", syns, s)
	}
	if seen[LinkA] == 0 || seen[LinkB] == 0 {
		t.Errorf("tap saw %v", seen)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	r, err := pcapgo.NewNgReader(file, pcapgo.DefaultNgReaderOptions)
	if err != nil {
		t.Fatal(err)
	}
	needle := map[int]int{}
	for {
		b, ci, err := r.ReadPacketData()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		p := gopacket.NewPacket(b, layers.LayerTypeEthernet, gopacket.Default)
		if app := p.ApplicationLayer(); app != nil && bytes.Contains(app.Payload(), []byte("needle")) {
			needle[ci.InterfaceIndex]++
		}
	}
	if needle[0] != 1 || needle[1] != 1 {
		t.Errorf("payload captured %v times", needle)
	}
}

func TestInject(t *testing.T) {
	p, err := Start(t).Middle(Options{NoOffload: true, B: EndOptions{NoAddress: true}})
	if err != nil {
		t.Fatal(err)
	}
	f, err := p.Forward(ForwarderOptions{AtoB: Impair{Drop: 1}})
	if err != nil {
		t.Fatal(err)
	}
	s, err := p.B.OpenPacket()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	want := stream(1, 100)[0]
	if err := f.Inject(AtoB, want); err != nil {
		t.Fatal(err)
	}
	for {
		frames, err := s.Receive(time.Now().Add(10 * time.Second))
		if err != nil {
			t.Fatal(err)
		}
		if slices.ContainsFunc(frames, func(b []byte) bool { return bytes.Equal(b, want) }) {
			return
		}
	}
}

// TestPacketSocketVLAN sends tagged frames, whose tag the kernel takes out of
// the frame on the way.
func TestPacketSocketVLAN(t *testing.T) {
	p, err := Start(t).Pair(Options{A: EndOptions{NoAddress: true}, B: EndOptions{NoAddress: true}})
	if err != nil {
		t.Fatal(err)
	}
	a, err := p.A.OpenPacket()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := p.B.OpenPacket()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	s := frame.Segment{SrcMAC: p.A.MAC, DstMAC: p.B.MAC, VLAN: 3<<13 | 42, Payload: make([]byte, 1460),
		Src: netip.MustParseAddrPort("10.0.0.1:1"), Dst: netip.MustParseAddrPort("10.0.0.2:2")}
	want := s.Append(nil)
	if n, err := a.Send(want, make([]byte, 3000), want); n != 2 || err == nil {
		t.Errorf("sent %d, %v; want 2 and an error for the frame above the MTU", n, err)
	}
	for got := 0; got < 2; {
		frames, err := b.Receive(time.Now().Add(10 * time.Second))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range frames {
			if x, ok := frame.Parse(f); ok && x.TCP {
				got++
				if !bytes.Equal(f, want) {
					t.Errorf("got %x", f[:40])
				}
			}
		}
	}
	if _, err := b.Receive(time.Now()); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: %v", err)
	}
}

// BenchmarkForwarder measures kernel TCP through the forwarder.
func BenchmarkForwarder(b *testing.B) {
	for _, o := range []Options{{NoOffload: true}, {NoOffload: true, MTU: 9000}, {}} {
		b.Run(fmt.Sprintf("mtu=%d/offload=%v", max(o.MTU, 1500), !o.NoOffload), func(b *testing.B) {
			p, err := Start(b).Middle(o)
			if err != nil {
				b.Fatal(err)
			}
			f, err := p.Forward(ForwarderOptions{})
			if err != nil {
				b.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			const size = 32 << 20
			b.SetBytes(size)
			b.ResetTimer()
			for range b.N {
				hashTransfer(b, ctx, p.A.NS, p.B.NS, p.B.Addr4(), size)
			}
			s := f.Stats(AtoB)
			b.ReportMetric(float64(s.KernelDrops+s.SendErrors), "lost")
		})
	}
}
