package fastpath

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// wireFrame is one frame as the monitor saw it.
type wireFrame struct {
	o, i       uint64
	oLen, iLen uint32
	hdr        uint8
}

// wire watches one direction of one flow.
type wire struct {
	s        *sim
	f        *simFlow
	from     int
	iss      uint32
	mss      int
	shift    uint8
	key      func(gen uint32) *crypto.Key // opens its frames
	init     []byte
	buf      []byte // the stream as it was first sent
	have     spans
	high     uint64 // end of what was sent, the FIN included
	gap      bool
	parsed   uint64
	inner    uint64
	gen      uint32
	rekeys   int
	underKey uint64 // frames of this generation
	finp     bool
	fin      bool
	finO     uint64
	frames   []wireFrame
	scratch  []byte

	delivered spans  // what the receiving engine was given
	acked     uint64 // of that, what it acknowledged to the sending engine ...
	sacked    spans  // ... and what by SACK
	warp      uint64 // engines count that much more than the wire does
	edge      uint64 // right edge that the sender was told
	ackSent   uint64 // by this sender, about the other direction
	edgeSent  uint64
	tsSent    uint32
	tsSeen    bool
	rst       bool

	// forged are an attacker's acknowledgements of more than the peer's, which the
	// sender's node has in its queue.
	forged []forgedAck
}

// forgedAck is an acknowledgement that a sender believes, as any TCP does, if it
// is of what was sent. sack are the blocks that come with it.
type forgedAck struct {
	ack, wnd uint64
	sack     [][2]uint32
}

func newWire(s *sim, f *simFlow, from int, key func(uint32) *crypto.Key, init []byte) *wire {
	return &wire{s: s, f: f, from: from, key: key, init: init}
}

func (w *wire) start(est, peer *slowpath.Established) {
	w.iss, w.mss = est.ISS, est.PeerMSS
	if est.WScaleOK {
		w.shift = est.LocalWScale
	}
	n := uint64(len(w.init))
	w.buf = append(w.buf, w.init...)
	w.have.add(0, n)
	w.high, w.parsed = n, n
	w.delivered.add(0, n)
	w.edge = uint64(peer.RxEdge)
	w.acked = uint64(est.TxAcked)
	w.ackSent = uint64(est.RxOffset)
	if est.Role == crypto.RoleA {
		w.ackSent = uint64(peer.TxAcked)
	}
	w.edgeSent = uint64(est.RxEdge)
}

func (w *wire) fail(format string, args ...any) {
	w.s.fail("wire of %s from node %d: %s", w.f.name, w.from, fmt.Sprintf(format, args...))
}

// observe checks a segment that leaves the engine.
func (w *wire) observe(g *packet.Segment) {
	rev := w.f.wire[1-w.from]
	if !g.ChecksumOK(w.s.sc.virtual) {
		w.fail("bad checksum")
	}
	if bytes.Contains(g.Payload(), []byte(canary)) {
		w.fail("plaintext")
	}
	if g.TOS>>2 != w.f.m[w.from].cfg.dscp {
		w.fail("DSCP %d, want %d", g.TOS>>2, w.f.m[w.from].cfg.dscp)
	}
	if g.Flags&packet.RST != 0 {
		w.rst = true
		if g.Len() > 0 {
			w.fail("reset with data")
		}
		return
	}
	if g.Flags&packet.SYN != 0 || g.Flags&packet.ACK == 0 || g.Flags&packet.URG != 0 {
		w.fail("flags %#x", g.Flags)
	}
	if g.HasTS != w.f.est[w.from].TSOK {
		w.fail("timestamp option %v", g.HasTS)
	}
	if g.HasTS {
		if w.tsSeen && packet.SeqDiff(g.TSval, w.tsSent) < 0 {
			w.fail("TSval went back from %d to %d", w.tsSent, g.TSval)
		}
		w.tsSeen, w.tsSent = true, g.TSval
		if m := w.f.m[w.from]; m.tsSent != 0 && packet.SeqDiff(g.TSval, m.tsSent) > 0 {
			w.fail("TSval %d is newer than the inner stack's %d", g.TSval, m.tsSent)
		}
	}
	w.observeAck(g, rev)
	o := offOf(w.iss, g.Seq, w.high)
	n := g.Len()
	if n > 0 && n+len(g.Options()) > w.mss {
		w.fail("%d bytes and %d of options exceed the MSS of %d", n, len(g.Options()), w.mss)
	}
	if o < 0 && n > 0 || o > int64(w.high) && !w.gap && n > 0 && w.s.nodes[w.from].e.st.NoChunk == 0 {
		w.fail("segment at %d, sent were %d", o, w.high)
		return
	}
	fin := g.Flags&packet.FIN != 0
	if n > 0 {
		w.data(uint64(o), g.Payload())
	}
	if fin {
		at := uint64(o) + uint64(n)
		if w.fin && w.finO != at {
			w.fail("FIN at %d and at %d", w.finO, at)
		}
		w.fin, w.finO = true, at
		w.high = max(w.high, at+1)
	}
	if w.fin && w.high > w.finO+1 {
		w.fail("data behind the FIN")
	}
	w.parse()
	if w.fin && w.parsed == w.finO && !w.finp {
		w.fail("FIN at %d without FINp", w.finO)
	}
}

func (w *wire) observeAck(g *packet.Segment, rev *wire) {
	a := offOf(rev.iss, g.Ack, w.ackSent)
	if a < int64(w.ackSent) {
		w.fail("acknowledgement went back from %d to %d", w.ackSent, a)
		return
	}
	if d, ok := rev.delivered.next(0); a > 0 && (!ok || d.s != 0 || uint64(a) > d.e) {
		w.fail("acknowledges %d, received are %v", a, rev.delivered)
	}
	w.ackSent = uint64(a)
	edge := uint64(a) + uint64(g.Wnd)<<w.shift
	if edge < w.edgeSent {
		w.fail("window edge went back from %d to %d", w.edgeSent, edge)
	}
	w.edgeSent = edge
	for k, b := range g.SACK[:g.NSACK] {
		l, r := offOf(rev.iss, b[0], w.ackSent), offOf(rev.iss, b[1], w.ackSent)
		switch {
		case l < 0 || l >= r || !rev.delivered.covers(uint64(l), uint64(r)):
			w.fail("SACK block [%d,%d), received are %v", l, r, rev.delivered)
		case l <= a && k > 0:
			w.fail("SACK block [%d,%d) with acknowledgement %d", l, r, a)
		case !w.f.est[w.from].SACKOK:
			w.fail("SACK was not negotiated")
		}
	}
}

// data holds bytes against what the same numbers carried before.
func (w *wire) data(o uint64, p []byte) {
	end := o + uint64(len(p))
	if end > w.edge {
		w.fail("data to %d, the peer's window ends at %d", end, w.edge)
	}
	if end > uint64(len(w.buf)) {
		w.buf = append(w.buf, make([]byte, end-uint64(len(w.buf)))...)
	}
	if w.have.covers(o, end) {
		if !bytes.Equal(w.buf[o:end], p) {
			w.fail("other bytes for [%d,%d)", o, end)
		}
		return
	}
	for at := o; at < end; {
		r, ok := w.have.next(at)
		if ok && r.s <= at {
			e := min(r.e, end)
			if !bytes.Equal(w.buf[at:e], p[at-o:e-o]) {
				w.fail("other bytes for [%d,%d)", at, e)
			}
			at = e
			continue
		}
		e := end
		if ok {
			e = min(e, r.s)
		}
		copy(w.buf[at:e], p[at-o:])
		at = e
	}
	w.have.add(o, end)
	w.high = max(w.high, end)
}

// parse opens the frames that are complete and compares them with what the
// application wrote. A frame opens under its generation at its own place in a
// stream whose bytes never change: so one nonce seals one plaintext, as far as
// the wire tells. Frames that never get there are counted in the end.
func (w *wire) parse() {
	m := w.f.m[w.from]
	for {
		r, ok := w.have.next(0)
		if !ok || r.s != 0 || r.e < w.parsed+crypto.FrameHeader {
			return
		}
		b := w.buf[w.parsed:r.e]
		n, err := crypto.FrameLen(b)
		if err != nil {
			w.fail("frame at %d: %v", w.parsed, err)
			return
		}
		if n > len(b) {
			return
		}
		if w.finp {
			w.fail("frame at %d behind FINp", w.parsed)
		}
		if b[0]&^crypto.ControlRekey != 0 {
			w.fail("control byte %#x", b[0])
		}
		if b[0]&crypto.ControlRekey != 0 {
			w.gen++
			w.rekeys++
			w.underKey = 0
		}
		// An empty frame may be one more: it must not initiate rekeying while
		// the peer still owes an answer.
		if w.underKey++; w.s.sc.rekeyFrames != 0 && w.underKey > w.s.sc.rekeyFrames+1 {
			w.fail("frame at %d is number %d under its key", w.parsed, w.underKey)
		}
		w.scratch = append(w.scratch[:0], b[:n]...)
		plain, ok := w.key(w.gen).Open(w.scratch, w.parsed+w.warp)
		if !ok {
			w.fail("frame at %d of %d bytes does not open, generation %d", w.parsed, n, w.gen)
			return
		}
		fl, urg, data, err := crypto.ParsePlain(plain)
		if err != nil || fl&^(crypto.FlagFIN|crypto.FlagURG) != 0 {
			w.fail("frame at %d: flags %#x, %v", w.parsed, fl, err)
		}
		hdr := crypto.FrameHeader + 1
		if fl&crypto.FlagURG != 0 {
			hdr += 2
			if !m.urgAll[w.inner+uint64(urg)+1] {
				w.fail("frame at %d: urgent %d at %d was not urgent", w.parsed, urg, w.inner)
			}
		}
		if w.inner+uint64(len(data)) > m.written || !bytes.Equal(data, content(m.phase, w.inner, len(data))) {
			w.fail("frame at %d: plaintext [%d,%d) is not what was written", w.parsed, w.inner, w.inner+uint64(len(data)))
		}
		w.frames = append(w.frames, wireFrame{w.parsed, w.inner, uint32(n), uint32(len(data)), uint8(hdr)})
		w.parsed += uint64(n)
		w.inner += uint64(len(data))
		if fl&crypto.FlagFIN != 0 {
			w.finp = true
			if w.inner != m.app.total || !m.closing() {
				w.fail("FINp at %d of %d, closing %v", w.inner, m.app.total, m.closing())
			}
		}
	}
}

// image returns the outer bytes that carry the inner byte i, or the FIN.
func (w *wire) image(i uint64) (s, e uint64, ok bool) {
	if i >= w.f.m[w.from].app.total {
		return w.finO, w.finO + 1, w.fin
	}
	lo, hi := 0, len(w.frames)
	for lo < hi {
		mid := (lo + hi) / 2
		if f := &w.frames[mid]; f.i+uint64(f.iLen) > i {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	if lo == len(w.frames) {
		// A frame of which only a part was sent yet, for want of window.
		if w.parsed >= uint64(len(w.buf)) {
			return 0, 0, false
		}
		s = w.parsed + crypto.FrameHeader + 1 + (i - w.inner)
		return s, s + 1, true
	}
	f := &w.frames[lo]
	s = f.o + uint64(f.hdr) + (i - f.i)
	if i == f.i {
		s = f.o
		for lo > 0 && w.frames[lo-1].iLen == 0 {
			lo--
			s = w.frames[lo].o
		}
	}
	e = f.o + uint64(f.hdr) + (i - f.i) + 1
	if i+1 == f.i+uint64(f.iLen) {
		e = f.o + uint64(f.oLen)
	}
	return s, e, true
}

// checkAck holds an inner acknowledgement of the bytes [from,to) against what
// the other engine acknowledged: their whole image.
func (w *wire) checkAck(from, to uint64, sack bool) {
	if sack && (len(w.have) != 1 || w.have[0].s != 0) {
		// Bytes that never got a chunk to travel in hide where frames begin.
		return
	}
	if m := w.f.m[w.from]; m.cfg.urg && to > w.inner && w.inner < m.app.total {
		// Whether the frame that was sent in part has an urgent pointer is
		// not known yet, and so where its data begins.
		return
	}
	s, e, ok := uint64(0), uint64(0), true
	if sack {
		s, _, ok = w.image(from)
	}
	if ok {
		_, e, ok = w.image(to - 1)
	}
	if !ok && w.forgedBeyond(to, sack) {
		return
	}
	if !ok || e > w.acked && !(sack && w.sacked.covers(max(s, w.acked), e)) {
		w.fail("inner bytes [%d,%d) (SACK %v) are acknowledged: outer [%d,%d) %v, the peer acknowledged %d and %v", from, to, sack, s, e, ok, w.acked, w.sacked)
	}
}

// forgedBeyond reports whether the peer acknowledged what never travelled, since
// somebody forged it where bytes got no chunk to travel in, and so much of it that
// the inner bytes below to can be meant: each takes an outer one. Where the frames
// begin that it is in place of, nobody knows.
func (w *wire) forgedBeyond(to uint64, sack bool) bool {
	seen, end := uint64(0), w.acked
	if r, ok := w.have.next(0); ok && r.s == 0 {
		seen = r.e
	}
	if k := len(w.sacked); sack && k > 0 {
		end = max(end, w.sacked[k-1].e)
	}
	least := w.parsed + crypto.FrameHeader + 1 + to - min(to, w.inner)
	return end > seen && end >= least
}

// arrived notes what the receiving engine is given, and the window that its
// sender is told by it. A forged segment may repeat what the sender said.
func (w *wire) arrived(g *packet.Segment, forged bool) {
	if g.Flags&packet.RST != 0 {
		return
	}
	rev := w.f.wire[1-w.from]
	o := offOf(w.iss, g.Seq, w.high)
	end := o + int64(g.Len())
	if g.Flags&packet.FIN != 0 {
		end++
	}
	if o = max(o, 0); o < end {
		w.delivered.add(uint64(o), uint64(end))
	}
	if g.Flags&packet.ACK != 0 {
		a := offOf(rev.iss, g.Ack, rev.high)
		wnd := uint64(g.Wnd) << w.shift
		if g.Flags&packet.SYN != 0 {
			wnd = uint64(g.Wnd)
		}
		sack := g.SACK[:g.NSACK]
		switch {
		case !forged || 0 <= a && a <= int64(w.ackSent):
			rev.told(uint64(a), wnd, sack)
		case a > 0:
			rev.forged = append(rev.forged, forgedAck{uint64(a), wnd, slices.Clone(sack)})
		}
	}
}

// told notes what the sender learns from an acknowledgement.
func (w *wire) told(ack, wnd uint64, sack [][2]uint32) {
	w.edge = max(w.edge, ack+wnd)
	w.acked = max(w.acked, uint64(max(int64(ack), 0)))
	for _, b := range sack {
		if l, r := offOf(w.iss, b[0], w.high), offOf(w.iss, b[1], w.high); 0 <= l && l < r {
			w.sacked.add(uint64(l), uint64(r))
		}
	}
}

// believe notes what the sender has learnt from forged acknowledgements: those of
// numbers that it has sent pass for the peer's.
func (w *wire) believe() {
	for _, a := range w.forged {
		if a.ack <= w.high {
			w.told(a.ack, a.wnd, a.sack)
		}
	}
}
