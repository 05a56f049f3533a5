package fastpath

import (
	"encoding/binary"
	"sort"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// The receiving half: a TCP receiver that reassembles the outer stream, opens
// its frames, and keeps the plaintext until the inner stack has taken it (T1).

const (
	maxOOO     = 4096 // segments kept above a gap, per flow
	quickAcks  = 16   // ACKs sent at once after a gap or a duplicate
	smallPiece = 512  // plaintext below this is packed into slabs

	// smallFrame is how many bytes of data frames have when the inner stack, which
	// sees nothing of the rest, acknowledges too seldom for the peer.
	smallFrame = 4 * overhead

	// maxFrameRoom bounds what a window is enlarged by for the overhead of
	// frames: it is part of what may go beyond the inner stack's window.
	maxFrameRoom = bigSize / 2
	// frameReserve is memory that data above a gap leaves for frames below it.
	frameReserve = 2 * bigSize
)

// openMeta goes with an open operation of the same index.
type openMeta struct {
	f       *flow
	ref     ref // counted for the operation
	off     uint32
	control byte
	mark    uint8
}

// source is where received outer bytes lie: in a buffer that can be held, or
// (refNone) in memory of the caller.
type source struct {
	ref  ref
	off  uint32
	mark uint8
}

// consume takes in-order outer bytes that start at nxtO and returns how many:
// fewer than all only when memory is short or the flow was aborted. Whole
// frames are opened where they lie.
func (e *Engine) consume(f *flow, data []byte, src source) int {
	done := 0
	for len(data) > 0 && f.state == flowLive {
		var n int
		switch {
		case f.asm != nil:
			n = copy(f.asm[f.asmHave:], data)
			f.asmHave += n
			f.asmMark |= src.mark & markCE
			if f.asmHave == len(f.asm) {
				frame := f.asm
				f.asm, f.asmHave = nil, 0
				e.queueOpen(f, frame, f.asmRef, f.asmOff, f.asmMark|src.mark&^markLead)
			}
		case f.hdrN == 0 && len(data) >= crypto.FrameHeader && src.ref.kind != refNone:
			l := crypto.FrameHeader + int(binary.BigEndian.Uint16(data[1:]))
			if l > len(data) {
				n = e.startFrame(f, data, src)
				break
			}
			if l < crypto.Overhead {
				e.frameTooShort(f)
				return done
			}
			f.frameO = f.nxtO
			n = l
			e.addHold(src.ref)
			mark := src.mark
			if n < len(data) {
				mark &^= markPSH
			}
			e.queueOpen(f, data[:l:l], src.ref, src.off, mark)
			src.mark &^= markLead
		default:
			n = e.startFrame(f, data, src)
		}
		if n == 0 {
			return done
		}
		data = data[n:]
		src.off += uint32(n)
		f.nxtO += uint64(n)
		done += n
	}
	return done
}

// startFrame takes header bytes of a frame that is not whole in one piece, and
// reserves the memory that it will be assembled in. It returns the number of
// bytes taken; 0 when there is no memory.
func (e *Engine) startFrame(f *flow, data []byte, src source) int {
	if f.hdrN == 0 {
		f.frameO, f.asmMark = f.nxtO, 0
	}
	n := copy(f.hdr[f.hdrN:], data)
	have := f.hdrN + n
	f.asmMark |= src.mark & markCE
	if have < crypto.FrameHeader {
		f.hdrN = have
		return n
	}
	l := crypto.FrameHeader + int(binary.BigEndian.Uint16(f.hdr[1:]))
	if l < crypto.Overhead {
		e.frameTooShort(f)
		return 0
	}
	mem, r, off, ok := e.buf.alloc(l, &f.rxSlab, f.pieces.len() == 0)
	if !ok {
		e.st.NoMemory++
		return 0
	}
	f.asm, f.asmRef, f.asmOff, f.asmHave, f.hdrN = mem, r, off, have, 0
	copy(mem, f.hdr[:])
	return n
}

// frameTooShort ends a flow for a frame that cannot hold tag and flags, unless
// one of those before it, which are judged first, already has.
func (e *Engine) frameTooShort(f *flow) {
	e.runOpen()
	e.abort(f, ReasonFrameLength)
}

// addHold counts one more user of a buffer that is held already.
func (e *Engine) addHold(r ref) {
	switch r.kind {
	case refChunk:
		e.buf.holds[r.idx]++
	case refSlab:
		e.buf.slabs[r.idx].refs++
	}
}

// queueOpen adds a whole frame, which begins at frameO, to the vector of open
// operations. The hold on r passes to the operation.
func (e *Engine) queueOpen(f *flow, frame []byte, r ref, off uint32, mark uint8) {
	if len(e.open) == cap(e.open) {
		e.runOpen()
	}
	control := frame[0] & crypto.ControlRekey
	if control != 0 {
		// The bit is only believed once the frame opened under the next key;
		// two steps at once would need a key that the session has dropped.
		if f.rxGenQ != f.rxGen {
			e.runOpen()
		}
	}
	if f.state != flowLive { // a frame that was opened above ended the flow
		e.buf.release(r)
		return
	}
	if control != 0 {
		f.rxGenQ++
		f.rxKey = f.sess.RecvKey(f.rxGenQ)
	}
	n := len(e.open)
	e.open, e.openMeta = e.open[:n+1], e.openMeta[:n+1]
	op, m := &e.open[n], &e.openMeta[n] // zero until here
	op.Key, op.Frame, op.Offset = f.rxKey, frame, f.frameO
	m.f, m.ref, m.off, m.control, m.mark = f, r, off, control, mark
	f.opening += uint64(len(frame))
	e.touch(f)
}

// runOpen opens the queued frames and takes their plaintext into custody.
func (e *Engine) runOpen() {
	if len(e.open) == 0 {
		return
	}
	e.mark(StageTranslate)
	crypto.OpenVec(e.open)
	e.mark(StageAEAD)
	e.st.Opened += uint64(len(e.open))
	for i := range e.open {
		m := &e.openMeta[i]
		f := m.f
		f.opening -= uint64(len(e.open[i].Frame))
		switch {
		case f.state != flowLive:
		case !e.open[i].OK:
			e.abort(f, ReasonAuth)
		default:
			e.accept(f, m, e.open[i].Plain)
		}
		e.buf.release(m.ref)
	}
	clear(e.open)
	clear(e.openMeta)
	e.open, e.openMeta = e.open[:0], e.openMeta[:0]
	e.mark(StageTranslate)
}

// accept takes the plaintext of one authentic frame into custody.
func (e *Engine) accept(f *flow, m *openMeta, plain []byte) {
	if m.control != 0 {
		f.rxGen++
		f.rekeysIn++
		f.verified()
	}
	if f.finp {
		e.abort(f, ReasonDataAfterFINp)
		return
	}
	f.framesIn++
	fl := plain[0]
	at := crypto.FrameHeader + 1
	data := plain[1:]
	urg := 0
	if fl&crypto.FlagURG != 0 {
		if len(data) < 2 {
			e.abort(f, ReasonFrameFormat)
			return
		}
		urg = int(binary.BigEndian.Uint16(data)) + 1
		data, at = data[2:], at+2
	}
	if urg != 0 && len(data) == 0 {
		// A notice in advance, which stands until its data comes.
		f.urgentI = f.dlvI + uint64(urg)
	}
	if n := len(data); n > 0 {
		if f.urgentI != 0 {
			if urg == 0 && f.urgentI > f.dlvI {
				urg = int(f.urgentI - f.dlvI)
			}
			f.urgentI = 0
		}
		f.meanIn = max(1, f.meanIn+(n-f.meanIn)/8)
		f.bytesIn += uint64(n)
		e.keep(f, m, data, at, min(urg, 65535))
		f.dlvI += uint64(n)
	}
	if fl&crypto.FlagFIN != 0 {
		f.finp = true
	}
}

// keep puts plaintext into custody: where it was opened, or packed into a slab
// when it is small or the UMEM is crowded.
func (e *Engine) keep(f *flow, m *openMeta, data []byte, at, urg int) {
	n := len(data)
	off := m.off + uint32(at)
	if m.ref.kind == refChunk && (n < smallPiece || e.buf.crowded()) || m.ref.kind == refSlab && n < smallPiece {
		if mem, r, o, ok := e.buf.alloc(n, &f.rxSlab, f.pieces.len() == 0); ok {
			m.mark &^= markLead
			copy(mem, data)
			if k := f.pieces.len(); k > 0 && urg == 0 {
				if p := f.pieces.at(k - 1); p.ref == r && p.off+p.n == o && p.urg == 0 && p.mark&markCE == m.mark&markCE {
					e.buf.release(r)
					p.n += uint32(n)
					p.mark |= m.mark
					return
				}
			}
			f.pieces.push(&e.pieces).set(f.dlvI, r, o, n, urg, m.mark)
			return
		}
	}
	e.addHold(m.ref)
	f.pieces.push(&e.pieces).set(f.dlvI, m.ref, off, n, urg, m.mark)
}

// insertOOO keeps an outer segment's payload above a gap. It reports whether
// anything of it was new.
func (e *Engine) insertOOO(f *flow, o uint64, data []byte, src source) bool {
	end := o + uint64(len(data))
	k := sort.Search(len(f.ooo), func(k int) bool { s := &f.ooo[k]; return s.o+uint64(s.n) > o })
	fresh := false
	for o < end {
		stop := end
		if k < len(f.ooo) {
			s := &f.ooo[k]
			if s.o <= o {
				o = max(o, s.o+uint64(s.n))
				k++
				continue
			}
			stop = min(end, s.o)
		}
		if len(f.ooo) >= maxOOO || f.oooBytes > e.cfg.FlowBudget {
			e.st.OOODrops++
			return fresh
		}
		n := int(stop - o)
		part := data[uint64(len(data))-(end-o):][:n]
		ent := oooSeg{o: o, n: uint32(n), mark: src.mark}
		if n < len(data) {
			ent.mark &^= markLead
		}
		if src.ref.kind == refChunk && n >= smallPiece && !e.buf.crowded() {
			e.addHold(src.ref)
			ent.ref, ent.off = src.ref, src.off+uint32(uint64(len(data))-(end-o))
		} else {
			// What fills the gap may begin a frame, and needs memory too: without
			// it nothing above the gap would ever be freed.
			if e.buf.room() < n+frameReserve {
				e.st.OOODrops++
				return fresh
			}
			mem, r, off, ok := e.buf.alloc(n, &f.rxSlab, false)
			if !ok {
				e.st.OOODrops++
				return fresh
			}
			copy(mem, part)
			ent.ref, ent.off = r, off
		}
		f.ooo = append(f.ooo, oooSeg{})
		copy(f.ooo[k+1:], f.ooo[k:])
		f.ooo[k] = ent
		f.oooBytes += n
		f.addRun(o, stop)
		fresh = true
		o = stop
		k++
	}
	return fresh
}

// addRun merges [s,e) into the runs that SACK reports.
func (f *flow) addRun(s, e uint64) {
	f.stamp++
	k := sort.Search(len(f.runs), func(k int) bool { return f.runs[k].e >= s })
	j := k
	for j < len(f.runs) && f.runs[j].s <= e {
		s, e = min(s, f.runs[j].s), max(e, f.runs[j].e)
		j++
	}
	if j == k {
		f.runs = append(f.runs, run{})
		copy(f.runs[k+1:], f.runs[k:])
	} else if j > k+1 {
		f.runs = append(f.runs[:k+1], f.runs[j:]...)
	}
	f.runs[k] = run{s, e, f.stamp}
}

// drainOOO consumes what has become in-order.
func (e *Engine) drainOOO(f *flow) {
	k := 0
	for k < len(f.ooo) && f.ooo[k].o <= f.nxtO {
		s := f.ooo[k]
		if skip := f.nxtO - s.o; skip < uint64(s.n) {
			n := s.n - uint32(skip)
			data := e.buf.bytes(s.ref, s.off+uint32(skip), int(n))
			d := e.consume(f, data, source{s.ref, s.off + uint32(skip), s.mark})
			if f.state != flowLive {
				// The abort released what was still queued, this included.
				return
			}
			if uint32(d) < n {
				// The rest waits for memory.
				cut := uint32(skip) + uint32(d)
				s.o, s.off, s.n = s.o+uint64(cut), s.off+cut, s.n-cut
				s.mark &^= markLead
				f.ooo[k] = s
				f.oooBytes -= int(cut)
				break
			}
		}
		f.oooBytes -= int(s.n)
		e.buf.release(s.ref)
		f.ooo[k].ref = ref{} // an abort further on must not release it again
		k++
	}
	if k > 0 {
		f.ooo = append(f.ooo[:0], f.ooo[k:]...)
		j := 0
		for j < len(f.runs) && f.runs[j].e <= f.nxtO {
			j++
		}
		f.runs = append(f.runs[:0], f.runs[j:]...)
		if len(f.runs) > 0 {
			f.runs[0].s = max(f.runs[0].s, f.nxtO)
		}
	}
}

// outerData takes the payload and FIN of an acceptable outer segment at outer
// offset o, which may lie below nxtO.
func (e *Engine) outerData(f *flow, o int64, data []byte, src source, fin bool) {
	n := int64(len(data))
	if fin && (!f.peerFin || f.peerFinO != uint64(o+n)) && o+n >= int64(f.nxtO) {
		f.peerFin, f.peerFinO = true, uint64(o+n)
	}
	if n == 0 {
		if fin {
			f.ackNow = f.ackNow || f.finTaken
		}
		return
	}
	if o+n <= int64(f.nxtO) {
		f.dsack = run{s: uint64(o), e: uint64(o + n)}
		f.ackNow, f.quickAcks = true, quickAcks
		e.st.Duplicates++
		return
	}
	if o < int64(f.nxtO) {
		cut := int64(f.nxtO) - o
		data, o = data[cut:], o+cut
		src.off += uint32(cut)
	}
	// Nothing beyond the advertised edge: there is no promise to keep it.
	if lim := int64(f.rxEdge) - o; int64(len(data)) > lim {
		if lim <= 0 {
			f.ackNow = true
			e.st.BeyondWindow++
			e.passProbe(f)
			return
		}
		data = data[:lim]
	}
	if f.finTaken {
		f.ackNow = true
		return
	}
	// A window field is coarse and its edge never retreats, so the edge creeps
	// while the inner stack's is shut: what goes beyond the budget is not
	// taken (T13, T14). A frame whose memory is reserved may be completed, but
	// no other one be begun by the same segment.
	if e.full(f, len(data), uint64(o) > f.nxtO) {
		e.st.OverBudget++
		f.ackNow = true
		if f.asm == nil || uint64(o) != f.nxtO {
			return
		}
		data = data[:min(len(data), len(f.asm)-f.asmHave)]
	}
	if uint64(o) > f.nxtO {
		if !e.insertOOO(f, uint64(o), data, src) {
			f.dsack = run{s: uint64(o), e: uint64(o) + uint64(len(data))}
			e.st.Duplicates++
		}
		e.st.OutOfOrder++
		f.quickAcks = quickAcks
		f.runOf(uint64(o))
		// Out-of-order data is answered at once (RFC 5681). With SACK one
		// answer tells all that a vector brought, as it does for segments
		// that a kernel's GRO merged; without, the peer counts duplicates.
		if f.sackOK {
			f.ackNow = true
		} else {
			e.sendOuterAck(f, f.sentO)
		}
		return
	}
	f.disarm(timerFin)
	if e.consume(f, data, src) < len(data) {
		f.ackNow = true
	}
	if len(f.ooo) > 0 && f.state == flowLive {
		e.drainOOO(f)
		f.ackNow = true
	}
}

// full reports whether another n received bytes would be too many to keep, for
// the flow or for all. What is above a gap leaves room for what fills it: nothing
// else would ever free its memory (T14).
func (e *Engine) full(f *flow, n int, above bool) bool {
	if e.buf.starved(n) {
		return true
	}
	kept := f.kept() + n
	if kept > e.cfg.FlowBudget || above && kept > e.cfg.FlowBudget-bigSize {
		return true
	}
	need := kept
	if !above {
		need -= f.oooBytes
	}
	// Beyond the inner stack's window there is one frame, and what the unit
	// of the window field adds.
	beyond := int64(f.innerAck) + int64(need) - int64(f.innerEdge)
	if beyond > bigSize+int64(2)<<f.localShift {
		return true
	}
	// Under pressure each flow keeps what it needs to go on.
	return need > bigSize && e.buf.crowded() && e.buf.tight()
}

// kept returns the number of received bytes that the inner stack has not
// acknowledged yet.
func (f *flow) kept() int {
	return int(f.dlvI-min(f.innerAck, f.dlvI)) + int(f.opening) + f.asmHave + f.oooBytes
}

// runOf marks the run that holds o as the one that changed last.
func (f *flow) runOf(o uint64) {
	k := sort.Search(len(f.runs), func(k int) bool { return f.runs[k].e > o })
	if k < len(f.runs) && f.runs[k].s <= o {
		f.stamp++
		f.runs[k].stamp = f.stamp
	}
}

// outerFin decides on a FIN whose place in the stream is reached (T9).
func (e *Engine) outerFin(f *flow) {
	if !f.peerFin || f.finTaken || f.nxtO != f.peerFinO {
		return
	}
	if f.finp && f.hdrN+f.asmHave > 0 {
		// The peer says itself that what it began is not to be finished.
		e.abort(f, ReasonDataAfterFINp)
		return
	}
	if f.finp {
		f.nxtO++
		f.finTaken = true
		f.ackNow = true
		f.disarm(timerFin)
		return
	}
	if f.timers[timerFin] == 0 {
		e.arm(f, timerFin, e.now+finWait)
	}
}

// --- towards the inner stack ---

// innerAcked processes an acknowledgement by the inner stack.
func (e *Engine) innerAcked(f *flow, s *packet.Segment, pure bool) {
	a := offOf(f.irs, s.Ack, f.innerAck)
	if a < 0 || uint64(a) > f.sntMaxI {
		return
	}
	wnd := uint32(s.Wnd) << f.localShift
	edge := uint64(a) + uint64(wnd)
	f.sizeInner(wnd)
	if uint64(a) > f.innerAck {
		f.innerAck = uint64(a)
		f.innerDups = 0
		f.innerRTO = minRTO
		for f.pieces.len() > 0 {
			p := f.pieces.at(0)
			if p.at+uint64(p.n) > f.innerAck {
				break
			}
			e.releaseLater(p.ref)
			f.pieces.pop(&e.pieces)
			f.cursor = max(0, f.cursor-1)
		}
		if f.pieces.len() == 0 && f.asm == nil {
			e.buf.leave(&f.rxSlab)
		}
		if f.sntI < f.innerAck {
			f.sntI, f.cursor = f.innerAck, 0
		}
		if f.innerAck == f.sntI {
			f.disarm(timerInner)
		} else {
			e.arm(f, timerInner, e.now+f.innerRTO)
		}
	} else if pure && uint64(a) == f.innerAck && edge == f.innerEdge && f.sntI > f.innerAck {
		// The inner stack misses something: go back (T13).
		f.innerDups++
		if f.innerDups == 3 {
			f.sntI, f.cursor = f.innerAck, 0
			e.st.InnerResends++
		}
	}
	if uint64(a) == f.innerAck {
		if edge < f.innerEdge && edge < f.sntI {
			// It has taken window back: what was sent beyond that it has dropped, as
			// Linux does for want of memory. To go on behind it would leave a gap,
			// and the rest would fill a small buffer for ever.
			f.sntI, f.cursor = max(edge, f.innerAck), 0
			e.st.InnerResends++
		}
		f.innerEdge = edge
	}
	if pure {
		f.innerAcks = true
	}
}

// deliver gives the inner stack what is in custody and fits its window, in
// segments as large as the TAP takes.
func (e *Engine) deliver(f *flow) {
	if !f.innerUp {
		return
	}
	e.deliverRest(f)
	if f.finp && f.sntI == f.dlvI {
		e.deliverFin(f)
	}
	if f.sntI > f.innerAck && f.timers[timerInner] == 0 {
		e.arm(f, timerInner, e.now+f.innerRTO)
	} else if f.sntI < f.dlvI && f.timers[timerInner] == 0 {
		e.arm(f, timerInner, e.now+f.innerRTO)
	}
}

// deliverRest is deliver for a flow that is about to end. An inner stack that has
// not answered the end of its handshake yet has it before these segments.
func (e *Engine) deliverRest(f *flow) {
	for f.sntI < f.dlvI && f.sntI < f.innerEdge {
		e.deliverOne(f)
	}
}

func (f *flow) seekPiece() *piece {
	for f.cursor < f.pieces.len()-1 {
		p := f.pieces.at(f.cursor)
		if p.at+uint64(p.n) > f.sntI {
			break
		}
		f.cursor++
	}
	return f.pieces.at(f.cursor)
}

func (e *Engine) deliverOne(f *flow) {
	p := e.newInner()
	first := f.seekPiece()
	lim := int(min(f.innerEdge, f.dlvI) - f.sntI)
	segment := int(f.inSeg)
	lim = min(lim, maxInnerPayload/segment*segment)
	inPlace := false
	if e.cfg.InnerChunks {
		lim = min(lim, segment, e.chunkRoom())
		inPlace = f.fresh(first) && int(first.n) <= lim
	}
	mark := first.mark & markCE
	flags := uint8(packet.ACK)
	urg := uint16(0)
	n := 0
	seq := f.sntI
	if first.urg != 0 {
		skip := uint16(f.sntI - first.at)
		if first.urg > skip {
			urg = first.urg - skip
			flags |= packet.URG
		}
		lim = min(lim, segment, int(first.n)-int(skip))
	}
	if inPlace {
		lim = int(first.n)
		p.place, p.off = first.ref, first.off
	}
	for k := f.cursor; n < lim && k < f.pieces.len() && len(p.data) < cap(p.data); k++ {
		q := f.pieces.at(k)
		if q.mark&markCE != mark || k > f.cursor && (q.urg != 0 || e.cfg.InnerChunks && q.mark&markLead != 0) {
			break
		}
		skip := seq + uint64(n) - q.at
		m := min(int(uint64(q.n)-skip), lim-n)
		p.data = append(p.data, e.buf.bytes(q.ref, q.off+uint32(skip), m))
		n += m
		if q.mark&markPSH != 0 && skip+uint64(m) == uint64(q.n) {
			flags |= packet.PSH
		}
	}
	f.sntI += uint64(n)
	if f.sntI > f.sntMaxI {
		f.sntMaxI = f.sntI
	} else {
		e.st.InnerResends++
	}
	if f.sntI == f.dlvI {
		flags |= packet.PSH
		if f.finp {
			flags |= packet.FIN
			f.sntI++
			f.sntMaxI = max(f.sntMaxI, f.sntI)
		}
	}
	if f.rxCWR {
		flags |= packet.CWR
		f.rxCWR = false
	}
	ecn := f.rxECN
	if mark != 0 {
		ecn = 3
	}
	f.inner.SetECN(ecn)
	var h packet.Header
	e.innerHeader(f, &h, e.opts[:], seq, flags)
	h.Urg = urg
	e.finishInner(f, p, &h, n)
	e.st.InnerSegments++
}

func (e *Engine) deliverFin(f *flow) {
	var h packet.Header
	e.innerHeader(f, &h, e.opts[:], f.sntI, packet.ACK|packet.FIN)
	f.sntI++
	f.sntMaxI = max(f.sntMaxI, f.sntI)
	f.inner.SetECN(0)
	e.emitInner(f, &h)
}

// innerFired resends custody to the inner stack, or probes its window (T13).
func (e *Engine) innerFired(f *flow) {
	if !f.innerUp {
		// The end of its handshake, or its answer to that, was lost (T18).
		e.SendInner(f.release, e.now)
		f.innerRTO = min(2*f.innerRTO, maxInnerRTO)
		e.arm(f, timerInner, e.now+f.innerRTO)
		return
	}
	if f.innerAck >= f.sntI && f.sntI >= f.dlvI {
		return
	}
	if f.sntI > f.innerAck {
		f.sntI, f.cursor = f.innerAck, 0
		e.st.InnerResends++
	} else {
		e.probeInner(f)
	}
	f.innerRTO = min(2*f.innerRTO, maxInnerRTO)
	e.arm(f, timerInner, e.now+f.innerRTO)
	e.touch(f)
}

// probeInner sends the inner stack a segment below its window, which it answers
// with its window.
func (e *Engine) probeInner(f *flow) {
	var h packet.Header
	e.innerHeader(f, &h, e.opts[:], f.innerAck-1, packet.ACK)
	f.inner.SetECN(0)
	e.emitInner(f, &h)
}

// passProbe follows a segment that may be the peer's probe of a shut window. With
// nothing in custody no timer of this side asks the inner stack for a window that
// it has opened and whose announcement the TAP has lost.
func (e *Engine) passProbe(f *flow) {
	if f.innerUp && f.innerAck == f.sntI && f.sntI == f.dlvI && f.innerEdge < f.dlvI+uint64(f.rcvMSS) {
		e.probeInner(f)
	}
}
