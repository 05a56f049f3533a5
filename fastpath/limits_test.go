package fastpath

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// Without memory for the Init message the flow does not begin, and both sides
// are told.
func TestInstallWithoutMemory(t *testing.T) {
	r := newRig(t, rigConfig{init: 100, engine: EngineConfig{Memory: 10}})
	r.wantEnded(slowpath.ReasonLimit)
	if len(resets(r.outs)) != 1 || len(resets(r.ins)) != 1 {
		t.Errorf("%d and %d resets", len(resets(r.outs)), len(resets(r.ins)))
	}
	r.gone()
}

// What the slow path has acknowledged cannot be dropped: the flow ends instead.
func TestPendingWithoutMemory(t *testing.T) {
	r := newRig(t, rigConfig{engine: EngineConfig{Memory: 2 * slabSize}})
	est := *r.est
	est.Key.RPort++
	_, sess := sessionPair(rand.New(rand.NewPCG(7, 7)), r.c.aead, 75)
	est.Session = sess(crypto.RoleB)
	for range 5 {
		est.RxPending = append(est.RxPending, r.seal(0, content(0, 0, 10000))...)
	}
	r.e.Install(&est, r.now)
	r.drain()
	r.wantEnded(slowpath.ReasonLimit)
	r.e.AbortAll(ReasonShutdown, r.now)
	r.drain()
	r.gone()
}

// Inner data for which there is no memory is as good as lost in the queue: the
// inner stack sends it again (T4).
func TestClaimWithoutMemory(t *testing.T) {
	r := newRig(t, rigConfig{peerWnd: 1 << 20, shift: 7, engine: EngineConfig{Memory: 2 * slabSize}})
	want := content(0, 0, 40000)
	at := func() int64 { return int64(r.f.sealI) }
	r.inner(seg{data: bytes.Clone(want), gso: 1440, flags: packet.FIN})
	if r.e.st.NoMemory == 0 || at() == 40000 {
		t.Fatalf("%d bytes were claimed", at())
	}
	for k := 0; at() <= 40000 && k < 100; k++ {
		o := at()
		r.outer(seg{})
		r.inner(seg{o: min(o, 40000), data: bytes.Clone(want[min(o, 40000):]), gso: 1440, flags: packet.FIN})
	}
	var got []byte
	fin := 0
	for _, f := range r.readFrames() {
		got = append(got, f.data...)
		fin += int(f.flags & crypto.FlagFIN)
	}
	if !bytes.Equal(got, want) || fin != 1 || at() != 40001 {
		t.Errorf("%d bytes on the wire, %d with FINp, claimed to %d", len(got), fin, at())
	}
}

// What the peers of some flows do not acknowledge must not take the memory that others
// need to go on (T5).
func TestMemoryForOthers(t *testing.T) {
	r := newRig(t, rigConfig{peerWnd: 16 << 20, shift: 10, engine: EngineConfig{Memory: 1 << 20}})
	want := content(0, 0, 1<<20)
	// The windows that it was shown before let the inner stack send all of it.
	for o, was := uint64(0), uint64(1); o != was; was, o = o, r.f.sealI {
		r.inner(seg{o: int64(o), data: bytes.Clone(want[o:min(o+20000, 1<<20)]), gso: 1440})
	}
	if r.e.st.NoMemory == 0 {
		t.Fatal("memory for everything")
	}
	c := r.c
	c.port++
	other := &rig{t: t, c: c, u: r.u, e: r.e, now: r.now, auto: true, autoWnd: uint64(c.innerWnd)}
	other.install()
	other.inner(seg{data: bytes.Clone(want[:30000]), gso: 1440})
	if other.f.sealI != 30000 {
		t.Errorf("with %d bytes of another flow retained, %d of 30000 are sent", r.f.txBytes, other.f.sealI)
	}
	// The one that has much may repeat what it wants.
	o := int64(r.f.sealI)
	before := r.f.txBytes
	r.inner(seg{o: o, data: bytes.Clone(want[o : o+10000]), gso: 1440})
	if r.f.txBytes != before {
		t.Errorf("%d bytes more are retained of a flow that has %d", r.f.txBytes-before, before)
	}
}

// Outer data for which there is no memory is not acknowledged, and taken when
// it comes again and there is (T13).
func TestReceiveWithoutMemory(t *testing.T) {
	r := newRig(t, rigConfig{innerWnd: 1 << 20, shift: 7, engine: EngineConfig{Memory: 3 * slabSize}})
	hog := r.hog()
	big := r.seal(0, content(1, 0, 3000))
	tail := r.seal(0, content(1, 3000, 100))
	r.stream(0, big, 1460, 0)
	if a := r.f.nxtO; a > crypto.FrameHeader {
		t.Errorf("%d bytes of a frame without memory were taken", a)
	}
	// Out of order: nothing to keep it in.
	r.outer(seg{o: int64(len(big)), data: tail})
	if r.e.st.OOODrops == 0 {
		t.Error("out-of-order data was kept")
	}
	for _, f := range hog {
		f()
	}
	r.stream(0, big, 1460, 0)
	r.outer(seg{o: int64(len(big)), data: tail})
	if !bytes.Equal(r.got, content(1, 0, 3100)) {
		t.Errorf("delivered %d bytes", len(r.got))
	}
}

// A rekey answer for which there is no memory comes later.
func TestRekeyWithoutMemory(t *testing.T) {
	r := newRig(t, rigConfig{engine: EngineConfig{Memory: 3 * slabSize}})
	f := r.peerFrame(seg{data: r.sealWith(crypto.ControlRekey, 0, make([]byte, 600))})
	hog := r.hog()
	r.outerFrames(f)
	if len(r.readFrames()) != 0 {
		t.Fatal("answered without memory")
	}
	for _, f := range hog {
		f()
	}
	r.outer(seg{o: int64(r.sealed)})
	if fs := r.readFrames(); len(fs) != 1 || fs[0].control != crypto.ControlRekey {
		t.Errorf("frames %+v", fs)
	}
}

// A peer that rekeys without end and acknowledges no answer fills no memory; once
// it acknowledges, every rekeying is answered.
func TestRekeyFlood(t *testing.T) {
	for _, wnd := range []int{0, -1} {
		r := newRig(t, rigConfig{})
		const n = maxAnswers/crypto.Overhead + 500
		for i := range n {
			o := int64(r.sealed)
			r.outer(seg{o: o, data: r.sealWith(crypto.ControlRekey, 0, nil), ack: -1, wnd: wnd})
			if i%1000 == 0 {
				r.advance(delayedAck)
				r.outs = r.outs[:0]
			}
		}
		if r.f.state != flowLive || r.f.rxGen != n {
			t.Fatalf("state %d, generation %d of %d", r.f.state, r.f.rxGen, n)
		}
		if r.f.txBytes > maxAnswers+crypto.Overhead {
			t.Errorf("%d bytes wait for acknowledgement", r.f.txBytes)
		}
		answers := 0
		for k := 0; k < n && answers < n; k++ {
			r.outer(seg{o: int64(r.sealed)})
			r.advance(time.Second)
			answers += len(r.readFrames())
		}
		r.outer(seg{o: int64(r.sealed)})
		if answers != n || r.f.ctlBytes != 0 {
			t.Errorf("%d answers to %d rekeyings, %d bytes unacknowledged", answers, n, r.f.ctlBytes)
		}
		r.inner(seg{data: []byte("data")})
		if fs := r.readFrames(); len(fs) != 1 || string(fs[0].data) != "data" {
			t.Errorf("then %+v", fs)
		}
	}
}

// hog takes all slabs and returns the functions that give them back.
func (r *rig) hog() (free []func()) {
	for {
		var cur uint32
		_, ref, _, ok := r.e.buf.alloc(slabSize, &cur, false)
		if !ok {
			return free
		}
		free = append(free, func() { r.e.buf.release(ref); r.e.buf.leave(&cur) })
	}
}

// A thousand scattered segments are kept or dropped, never more than the limit.
func TestScatteredSegments(t *testing.T) {
	r := newRig(t, rigConfig{sack: true, innerWnd: 1 << 24, shift: 10, rxEdge: 1 << 24, chunks: 4096, engine: EngineConfig{FlowBudget: 1 << 20}})
	b := r.seal(0, content(0, 0, 60000))
	for o := 1; o < 20000; o += 2 {
		r.outer(seg{o: int64(o), data: b[o : o+1]})
		r.outs = r.outs[:0]
	}
	if n := len(r.f.ooo); n > maxOOO {
		t.Errorf("%d segments are kept", n)
	}
	if r.e.st.OOODrops == 0 {
		t.Error("none was dropped")
	}
	r.stream(0, b, 1460, 0)
	if !bytes.Equal(r.got, content(0, 0, 60000)) {
		t.Errorf("delivered %d bytes", len(r.got))
	}
}

// Data above a gap must not take the room of what fills the gap: the peer would send
// that again and again, and nothing would ever free the memory (T14).
func TestGapFilledInFullBudget(t *testing.T) {
	for _, pressed := range []bool{false, true} {
		r := newRig(t, rigConfig{sack: true, innerWnd: 1 << 20, shift: 10, rxEdge: 1 << 20, chunks: 512, engine: EngineConfig{Memory: 1 << 20, FlowBudget: 256 << 10}})
		want := content(0, 0, 128<<10)
		want = append(want[:len(want):len(want)], want...)
		want = append(want, want...)
		var segs []seg
		for at := 0; at < len(want); at += 1400 {
			o := int64(r.sealed)
			segs = append(segs, seg{o: o, data: r.seal(0, want[at:min(at+1400, len(want))])})
		}
		k := 1
		for ; r.e.st.OverBudget == 0 && (!pressed || r.f.oooBytes <= 4*bigSize/3); k++ {
			if k == len(segs) {
				t.Fatal("all of it is kept above a gap")
			}
			r.outer(segs[k])
			r.forget()
		}
		var free []func()
		if pressed {
			r.e.buf.maxHeld = 1
			free = r.hog()
		}
		for _, s := range segs[:k] {
			r.outer(s)
		}
		if n := k - 2; len(r.got) < 1400*n {
			t.Errorf("pressed %v: delivered %d bytes of %d segments", pressed, len(r.got), n)
		}
		for _, f := range free {
			f()
		}
		r.outs, r.ins = nil, nil
		for _, s := range segs[k-1:] {
			r.outer(s)
		}
		if !bytes.Equal(r.got, want) {
			t.Errorf("pressed %v: delivered %d bytes of %d", pressed, len(r.got), len(want))
		}
	}
}

// More packets to the inner stack than a vector holds.
func TestInnerVectorDrains(t *testing.T) {
	r := newRig(t, rigConfig{sack: true, chunks: 4096})
	r.auto = false
	r.inner(seg{data: content(0, 0, 14400), gso: 1440})
	r.forget()
	var ss []seg
	for range 700 {
		ss = append(ss, seg{ack: -1, sack: [][2]int64{{1460, 2920}}})
	}
	var frames [][]byte
	for _, s := range ss {
		frames = append(frames, r.peerFrame(s))
	}
	r.outerFrames(frames...)
	if len(r.ins) != 700 {
		t.Errorf("%d packets inward for 700 duplicate ACKs", len(r.ins))
	}
}

// A flow that is installed twice replaces the first one.
func TestInstallReplaces(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.inner(seg{data: content(0, 0, 1000)})
	r.forget()
	r.gen, r.sealed, r.rxGen = 0, 0, 0
	r.install()
	if len(r.events) != 2 || r.events[0].Info.Reason != ReasonReplaced || r.events[1].Kind != FlowGone {
		t.Errorf("events %+v", r.events)
	}
	r.outer(seg{data: r.seal(0, []byte("again"))})
	if string(r.got) != "again" {
		t.Errorf("delivered %q", r.got)
	}
}

// A flow that fails before the inner stack is up resets it in SYN-SENT, where
// only the acknowledgement number counts.
func TestAbortBeforeUp(t *testing.T) {
	r := newRig(t, rigConfig{active: true})
	b := r.seal(0, []byte("x"))
	b[10] ^= 1
	r.outer(seg{data: b})
	r.wantEnded(ReasonAuth)
	in := resets(r.ins)
	if len(in) != 1 || in[0].a != 0 || in[0].Flags&packet.ACK == 0 {
		t.Errorf("inner resets %+v", in)
	}
}

func TestInnerJunk(t *testing.T) {
	r := newRig(t, rigConfig{})
	good := r.innerBuf(seg{data: []byte("data")})
	for n := range good {
		r.e.InnerIn(bytes.Clone(good[:n]), r.now)
	}
	r.e.Flush(r.now)
	r.drain()
	r.inner(seg{noAck: true, data: []byte("no ACK")})
	r.inner(seg{ack: 5, data: nil})     // acknowledges what was not delivered
	r.inner(seg{o: 500, noAck: true})   // nothing at all
	r.inner(seg{o: 1 << 20, flags: 0})  // far away
	r.inner(seg{o: -1 << 20, flags: 0}) // and far below
	r.inner(seg{flags: packet.SYN})     // the handshake's SYN-ACK, late
	if n := len(withData(r.outs)); n != 0 || r.ended() != "" {
		t.Errorf("%d segments sent, ended %q", n, r.ended())
	}
	r.inner(seg{data: []byte("data")})
	if fs := r.readFrames(); len(fs) != 1 || string(fs[0].data) != "data" {
		t.Errorf("frames %+v", fs)
	}
}

// The slow path gives back what was not its own; what is nobody's goes nowhere.
func TestReinject(t *testing.T) {
	r := newRig(t, rigConfig{})
	f := r.peerFrame(seg{data: r.seal(0, []byte("held up"))})
	r.e.Reinject(packet.FromOuter, f, r.now)
	r.drain()
	if string(r.got) != "held up" {
		t.Errorf("delivered %q", r.got)
	}
	b := r.innerBuf(seg{data: []byte("out")})
	r.e.Reinject(packet.FromInner, b[12:], r.now)
	r.e.Flush(r.now)
	r.drain()
	if fs := r.readFrames(); len(fs) != 1 || string(fs[0].data) != "out" {
		t.Errorf("frames %+v", fs)
	}
	r.forget()
	r.est.OuterTmpl = makeTemplate(r.est.Key.Local, r.est.Key.Remote, false, 0, 443, 9, 0)
	r.est.InnerTmpl = makeTemplate(r.est.Key.Remote, r.est.Key.Local, false, 0, 9, 443, 0)
	r.e.Reinject(packet.FromOuter, r.peerFrame(seg{}), r.now)
	r.e.Reinject(packet.FromInner, r.innerBuf(seg{data: make([]byte, 3000), gso: 1400})[12:], r.now)
	r.e.Flush(r.now)
	r.drain()
	if len(r.events)+len(r.outs)+len(r.ins) != 0 {
		t.Errorf("strangers go round: %d events, %d and %d packets", len(r.events), len(r.outs), len(r.ins))
	}
}

// Nothing follows the FIN, neither from the peer nor from the inner stack.
func TestAfterFIN(t *testing.T) {
	r := newRig(t, rigConfig{})
	o := int64(r.sealed)
	r.outer(seg{o: o, data: r.seal(crypto.FlagFIN, []byte("end")), flags: packet.FIN})
	r.forget()
	r.outer(seg{o: int64(r.sealed) + 1, data: []byte("more")})
	if r.ended() != "" || string(r.got) != "end" || len(r.outs) == 0 {
		t.Errorf("ended %q, delivered %q, %d answers", r.ended(), r.got, len(r.outs))
	}
	r.inner(seg{flags: packet.FIN})
	n := len(r.readFrames())
	r.inner(seg{o: 1, data: []byte("more")})
	r.inner(seg{o: 1, flags: packet.FIN})
	if k := len(r.readFrames()); n != 1 || k != 0 {
		t.Errorf("%d frames, then %d", n, k)
	}
	r.advance(time.Second)
}

// Acknowledgements that say nothing new must not be answered with such: the peer, in
// the same state, would answer them.
func TestAcksAnswerNoAcks(t *testing.T) {
	const times = 100
	t.Run("inside a frame", func(t *testing.T) {
		// Without window scaling, the field cannot tell the edge that small
		// frames call for.
		r := newRig(t, rigConfig{sack: true, innerWnd: 65535, rxEdge: 65535})
		o := int64(0)
		for i := range 1000 {
			f := r.seal(0, content(0, uint64(5*i), 5))
			r.outer(seg{o: o, data: f})
			o += int64(len(f))
			r.inner(seg{wnd: 65535})
		}
		f := r.seal(0, content(0, 5000, 20_000))
		r.outer(seg{o: o, data: f[:1400]}, seg{o: o + 1400, data: f[1400:2800]})
		r.forget()
		for range times {
			r.outer(seg{o: o + 2800})
		}
		if n := len(r.outs); n > 1 {
			t.Errorf("%d packets answer %d acknowledgements", n, times)
		}
	})
	for _, o := range []int64{-1, 1 << 20} {
		t.Run("out of window", func(t *testing.T) {
			r := newRig(t, rigConfig{sack: true, innerWnd: 65535, rxEdge: 65535})
			f := r.seal(0, content(0, 0, 500))
			r.outer(seg{o: 0, data: f})
			r.inner(seg{})
			r.forget()
			for range times {
				r.outer(seg{o: o})
			}
			if n := len(r.outs); n == 0 || n > 10 {
				t.Errorf("%d packets answer %d acknowledgements", n, times)
			}
			r.forget()
			r.advance(time.Second)
			r.outer(seg{o: o})
			if len(r.outs) != 1 {
				t.Errorf("%d packets answer a keep-alive probe a second later", len(r.outs))
			}
		})
	}
}

// That a frame may be completed beyond the limits is no way around them for the
// next ones, which begin in the segments that complete the ones before (T13).
func TestLimitsInsideFrames(t *testing.T) {
	r := newRig(t, rigConfig{sack: true, innerWnd: 4096, rxEdge: 1 << 20, chunks: 2048})
	r.auto = false
	var stream []byte
	for i := range 600 {
		stream = append(stream, r.seal(0, content(0, uint64(1388*i), 1388))...)
	}
	for at := 0; at+1400 <= len(stream); at += 1400 {
		r.outer(seg{o: int64(at), data: stream[at : at+1400]})
	}
	if most := r.f.innerEdge + 2*bigSize; r.f.dlvI > most || r.e.st.OverBudget == 0 {
		t.Errorf("plaintext to %d, the inner stack's window ends at %d; %d segments were too much", r.f.dlvI, r.f.innerEdge, r.e.st.OverBudget)
	}
}

// Custody does not take the last chunks when there is no other memory: with none to
// receive in, a gateway would never learn what the inner hosts have acknowledged.
func TestCustodyLeavesChunks(t *testing.T) {
	const chunks = 512
	r := newRig(t, rigConfig{sack: true, innerWnd: 65535, rxEdge: 65535, chunks: chunks, engine: EngineConfig{Memory: 1 << 20}})
	r.auto = false
	free := r.hog()
	var segs []seg
	want := content(0, 0, chunks)
	for i, o := 0, int64(0); i < chunks; i++ {
		f := r.seal(0, want[i:i+1])
		segs = append(segs, seg{o: o, data: f})
		o += int64(len(f))
	}
	for _, s := range segs {
		r.outer(s)
		r.forget()
	}
	if n := r.e.umem.Available(); n < chunks/4-VectorSize/2 || r.e.st.OverBudget == 0 {
		t.Errorf("%d chunks of %d are left, %d segments were refused", n, chunks, r.e.st.OverBudget)
	}
	for _, f := range free {
		f()
	}
	r.auto = true
	r.got = append(r.got, want[:r.f.dlvI]...)
	r.inner(seg{})
	for _, s := range segs {
		r.outer(s)
	}
	if !bytes.Equal(r.got, want) {
		t.Errorf("delivered %d bytes of %d", len(r.got), len(want))
	}
}

// To an inner stack with a small receive buffer no segment is longer than half of
// the largest window that it showed, as none of the peer's is (RFC 9293 section
// 3.8.6.2.1): neither a packet nor the pieces that a large one is cut into.
func TestSegmentsForSmallReceiveBuffer(t *testing.T) {
	const small, large = 1152, 20000
	r := newRig(t, rigConfig{innerWnd: small, rxEdge: 1 << 16})
	send := func(n int) (longest int) {
		t.Helper()
		r.forget()
		at := int64(r.sealed)
		r.outer(seg{o: at, data: r.seal(0, content(0, uint64(len(r.got)), n))})
		for i := range r.ins {
			p := &r.ins[i]
			switch {
			case p.vnet.GSOSize != 0:
				longest = max(longest, int(p.vnet.GSOSize))
			default:
				longest = max(longest, p.Len())
			}
		}
		return longest
	}
	for range 5 {
		if n := send(1400); n != small/2 {
			t.Errorf("segments of %d bytes for a window of %d", n, small)
		}
	}
	if len(r.got) != 5*1400 {
		t.Errorf("%d bytes arrived", len(r.got))
	}
	r.autoWnd = large
	send(1)
	if n := send(1430); n != 1430 {
		t.Errorf("segments of %d bytes for a window of %d", n, large)
	}
	r.autoWnd = small
	send(1)
	if n := send(1152); n != 1152 {
		t.Errorf("segments of %d bytes after the window was %d", n, large)
	}
	r.check()
}

// A peer's window that holds a segment is shown as one that does, whatever the
// unit of the window field: the inner stack would wait for a timer otherwise.
func TestShownWindowHoldsSegment(t *testing.T) {
	for _, shift := range []uint8{1, 7, 10, 14} {
		for units := 1; units <= 4096>>shift+1; units += 1 + 64>>shift {
			edge := units << shift
			r := newRig(t, rigConfig{shift: shift, peerWnd: edge, chunks: 64})
			segment := r.f.innerSegment()
			if edge < segment {
				continue
			}
			if shown := int(r.e.innerWindow(r.f)) << shift; shown < segment || shown > max(edge, segment+1<<shift) {
				t.Errorf("shift %d: %d bytes shown of %d, for segments of %d", shift, shown, edge, segment)
			}
		}
	}
}
