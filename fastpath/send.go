package fastpath

import (
	"encoding/binary"
	"math"
	"math/bits"
	"sort"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// The sending half: the inner stack stays in charge of what is sent when; this
// maps its bytes to frames, once each, and resends what was stored.

const (
	maxBacklog = 64

	// minControlGap is how long control bytes are not sent again for another SACK:
	// a round trip, when none was measured.
	minControlGap = 10 * time.Millisecond
)

// recByOuter returns the index of the record that holds outer offset o, or
// recs.len() when o is sealO or above. o must not be below the first record.
func (f *flow) recByOuter(o uint64) int {
	k, n := 0, f.recs.len()
	for k < n {
		m := (k + n) / 2
		if r := f.recs.at(m); r.o+uint64(r.oLen) > o {
			n = m
		} else {
			k = m + 1
		}
	}
	return k
}

// recByInner returns the index of the record that holds inner byte i.
func (f *flow) recByInner(i uint64) int {
	return sort.Search(f.recs.len(), func(k int) bool {
		r := f.recs.at(k)
		return r.i+uint64(r.iLen) > i
	})
}

// floorI maps an outer offset inward: the inner bytes below the result have
// their whole image below o (T3).
func (f *flow) floorI(o uint64) uint64 {
	if o >= f.sealO {
		return f.sealI
	}
	r := f.recs.at(f.recByOuter(o))
	if r.fin || r.iLen == 0 {
		return r.i
	}
	p := int64(o-r.o) - int64(r.hdr)
	return r.i + uint64(max(0, min(p, int64(r.iLen)-1)))
}

// ceilI maps an outer offset inward: the inner bytes from the result on have
// their whole image at or above o.
func (f *flow) ceilI(o uint64) uint64 {
	if o >= f.sealO {
		return f.sealI
	}
	k := f.recByOuter(o)
	r := f.recs.at(k)
	if o == r.o && (k == 0 || f.recs.at(k-1).iLen > 0) {
		return r.i
	}
	if r.fin || r.iLen == 0 {
		return r.i + 1
	}
	p := int64(o-r.o) - int64(r.hdr)
	return r.i + uint64(max(1, min(p, int64(r.iLen))))
}

// image returns the outer bytes that carry the inner bytes [a,b): control bytes
// belong to the inner byte that follows them (T8).
func (f *flow) image(a, b uint64) (uint64, uint64) {
	k := f.recByInner(a)
	r := f.recs.at(k)
	s := r.o
	if a == r.i {
		for k > 0 && f.recs.at(k-1).iLen == 0 {
			k--
			s = f.recs.at(k).o
		}
	} else {
		s = r.o + uint64(r.hdr) + (a - r.i)
	}
	r = f.recs.at(f.recByInner(b - 1))
	t := r.o + uint64(r.oLen)
	if b < r.i+uint64(r.iLen) {
		t = r.o + uint64(r.hdr) + (b - r.i)
	}
	return s, t
}

// innerData takes the payload and FIN of an inner segment. buf[0] is a byte of
// headroom that may be overwritten, the data follows; src is where buf lies. gs
// is the size at which the kernel wants it cut.
func (e *Engine) innerData(f *flow, seq uint32, buf []byte, src source, gs int, flags uint8, urg uint16) {
	n := uint64(len(buf) - 1)
	a := offOf(f.iss, seq, f.sealI)
	fin := flags&packet.FIN != 0
	if n == 0 && !fin {
		if a < int64(f.ackI) {
			e.relayProbe(f)
		}
		return
	}
	end := a + int64(n)
	if fin {
		end++
	}
	if end <= int64(f.ackI) || a < 0 {
		if n <= 1 && !fin && end == int64(f.ackI) {
			e.relayProbe(f)
		} else {
			f.ackMustI = true // it missed our ACK
		}
		return
	}
	if uint64(a) > f.sealI {
		e.hold(f, uint64(a), buf, gs, flags, urg)
		return
	}
	if uint64(a) < f.sealI {
		size := gs
		if size <= 0 {
			size = int(n)
		}
		e.resend(f, max(uint64(a), f.ackI), min(uint64(end), f.sealI), size+overhead)
		if uint64(end) <= f.sealI {
			return
		}
		cut := f.sealI - uint64(a)
		cut = min(cut, n)
		buf, src.off = buf[cut:], src.off+uint32(cut)
		if urg != 0 {
			urg -= min(urg, uint16(cut))
		}
	}
	e.claim(f, buf, src, gs, flags, urg)
	for len(f.backlog) > 0 && f.backlog[0].i <= f.sealI {
		b := f.backlog[0]
		f.backlog = f.backlog[1:]
		if skip := f.sealI - b.i; skip < uint64(len(b.buf)-1) || b.flag&packet.FIN != 0 && skip == uint64(len(b.buf)-1) {
			e.claim(f, b.buf[skip:], source{}, b.gs, b.flag, b.urg-min(b.urg, uint16(skip)))
		}
	}
}

// hold keeps inner data that came before the bytes it follows: the inner queue
// lost some, which the inner stack will send again (T7).
func (e *Engine) hold(f *flow, i uint64, buf []byte, gs int, flags uint8, urg uint16) {
	e.st.InnerGaps++
	if len(f.backlog) >= maxBacklog {
		e.st.InnerGapDrops++
		return
	}
	k := sort.Search(len(f.backlog), func(k int) bool { return f.backlog[k].i >= i })
	if k < len(f.backlog) && f.backlog[k].i == i && len(f.backlog[k].buf) >= len(buf) {
		return
	}
	f.backlog = append(f.backlog, backlogged{})
	copy(f.backlog[k+1:], f.backlog[k:])
	f.backlog[k] = backlogged{i, append([]byte(nil), buf...), gs, flags, urg}
}

// claim assigns frame offsets to inner data that starts at sealI, and takes
// the memory that keeps the frames; it is the only place that does (T4). The
// frames are sealed when the engine runs its vector of operations. When memory
// is short the rest is dropped, and the inner stack will send it again. Flows that
// have much of it do not get the last: it could take their peers a quarter of an
// hour to be given up, and all others would wait (T5).
func (e *Engine) claim(f *flow, buf []byte, src source, gs int, flags uint8, urg uint16) {
	if f.finSealed {
		return
	}
	if f.txBytes > bigSize && e.buf.tight() {
		e.st.NoMemory++
		return
	}
	n := len(buf) - 1
	fin := flags&packet.FIN != 0
	if gs <= 0 || gs > slabSize-64 {
		gs = min(max(n, 1), slabSize-64)
	}
	if flags&packet.CWR != 0 {
		f.txCWR = true
	}
	for off := 0; off < n; off += gs {
		m := min(gs, n-off)
		last := off+m == n
		var fl byte
		if last && fin {
			fl = crypto.FlagFIN
		}
		u := -1
		if flags&packet.URG != 0 && int(urg) > off {
			u = int(urg) - 1 - off
			fl |= crypto.FlagURG
		}
		at := source{}
		if last {
			at = source{ref: src.ref, off: src.off + uint32(off)}
		}
		if !e.sealFrame(f, buf[off:off+m+1], at, fl, u, last && flags&packet.PSH != 0) {
			e.st.NoMemory++
			return
		}
	}
	if !fin {
		return
	}
	if n > 0 {
		*f.recs.push(&e.recs) = rec{o: f.sealO, i: f.sealI, oLen: 1, iLen: 1, fin: true}
		f.sealO++
	} else {
		if !e.sealFrame(f, nil, source{}, crypto.FlagFIN, -1, true) {
			e.st.NoMemory++
			return
		}
		r := f.recs.at(f.recs.len() - 1)
		r.oLen++
		r.iLen, r.fin = 1, true
		f.sealO++
	}
	f.sealI++
	f.finSealed = true
	f.closedFirst = !f.finTaken
}

// sealFrame queues one frame for sealing. src is a byte of headroom and the
// data, which lie at; nil makes an empty frame. urgent is the urgent field, or
// -1 (T10).
func (e *Engine) sealFrame(f *flow, src []byte, at source, fl byte, urgent int, psh bool) bool {
	data := max(0, len(src)-1)
	hdr := crypto.FrameHeader + 1
	if urgent >= 0 {
		hdr += 2
	}
	total := hdr + data + crypto.TagLen
	if f.exhausted() {
		e.abort(f, ReasonKeyExhausted)
		return false
	}
	if urgent >= 0 {
		at = source{}
	}
	mem, r, off, ok := e.sealPlace(at, total)
	if !ok {
		mem, r, off, ok = e.buf.alloc(total, &f.txSlab, f.recs.len() == 0)
		if !ok {
			return false
		}
	}
	var control byte
	if e.advanceTx(f, data == 0) {
		control = crypto.ControlRekey
	}
	if data == 0 || urgent >= 0 {
		p := mem[crypto.FrameHeader : hdr+data]
		if urgent >= 0 {
			binary.BigEndian.PutUint16(p[1:], uint16(urgent))
		}
		if data > 0 {
			copy(p[hdr-crypto.FrameHeader:], src[1:])
		}
		src = p
	}
	c := f.recs.push(&e.recs)
	c.o, c.i, c.oLen, c.iLen = f.sealO, f.sealI, uint32(total), uint32(data)
	c.ref.kind, c.ref.idx, c.off, c.hdr, c.fin, c.psh = r.kind, r.idx, off, uint8(hdr), false, psh
	if len(e.seal) == cap(e.seal) {
		e.runSeal()
	}
	e.seal = e.seal[:len(e.seal)+1]
	op := &e.seal[len(e.seal)-1]
	op.Key, op.Dst, op.Src, op.Flags, op.Control, op.Offset = f.txKey, mem, src, fl, control, f.sealO
	f.sealI += uint64(data)
	f.sealO += uint64(total)
	f.txBytes += total
	if data == 0 && fl&crypto.FlagFIN == 0 {
		f.ctlBytes += total
	}
	f.txKeyFrames++
	f.framesOut++
	f.bytesOut += uint64(data)
	if data > 0 {
		e.sealedData(f, data)
		f.meanData += (data - f.meanData) / 8
		f.meanData = max(f.meanData, 1)
	}
	return true
}

// runSeal carries out the queued sealing operations.
func (e *Engine) runSeal() {
	if len(e.seal) > 0 {
		e.mark(StageTranslate)
		crypto.SealVec(e.seal)
		e.mark(StageAEAD)
		e.st.Sealed += uint64(len(e.seal))
		clear(e.seal)
		e.seal = e.seal[:0]
	}
}

// pushNew transmits what is sealed and not yet sent, as far as the peer's
// window lets it (T6): a segment a frame (invariant 7).
func (e *Engine) pushNew(f *flow) {
	sent := f.sentO
	e.push(f)
	if f.sentO != sent {
		e.armControl(f)
	}
}

// armControl sees to it that control bytes which nobody else would send again are.
func (e *Engine) armControl(f *flow) {
	if f.timers[timerCtl] != 0 {
		return
	}
	if _, _, ok := f.controlOutstanding(); ok {
		e.arm(f, timerCtl, e.now+f.ctlRTO)
	}
}

// push is pushNew but for the timer of control bytes.
func (e *Engine) push(f *flow) {
	if f.sentO >= f.sealO {
		f.held = false
		return
	}
	e.runSeal()
	var h packet.Header
	for k := f.recByOuter(f.sentO); f.sentO < f.sealO; k++ {
		r := f.recs.at(k)
		end := r.o + uint64(r.oLen)
		data := end
		if r.fin {
			data--
		}
		if data > f.edgeO {
			// With nothing under way no ACK will move the edge: what fits is
			// sent, unless it is little (RFC 9293 section 3.8.6.2.1).
			if f.unaO == f.sentO && f.edgeO > f.sentO && f.edgeO-f.sentO >= (data-f.sentO)/2 {
				e.xmit(f, &h, k, f.sentO, f.edgeO, f.outMSS, true, true)
				f.sentO = f.edgeO
			}
			if !f.held {
				f.held = true
				f.ackDueI = true
			}
			if f.timers[timerHold] == 0 {
				e.arm(f, timerHold, e.now+f.holdRTO)
			}
			return
		}
		// A FIN with the last data goes in the data's segment.
		if !r.fin && end < f.sealO {
			if next := f.recs.at(k + 1); next.fin && next.oLen == 1 {
				end++
			}
		}
		e.xmit(f, &h, k, f.sentO, end, f.outMSS, true, r.psh)
		f.sentO = end
	}
	f.held = false
	f.disarm(timerHold)
	f.holdRTO = minRTO
}

// xmit transmits the stored outer bytes [from,to), cut to size and to the path MTU. Bytes
// that cannot be given a chunk count as lost. The segments' headers are h but for
// what differs, so that those of several calls with nothing in between are
// composed from the flow's state once: before the first, h is zero. k is the index
// of the record that holds from.
func (e *Engine) xmit(f *flow, h *packet.Header, k int, from, to uint64, size int, fresh, psh bool) {
	if h.Flags == 0 {
		e.outerHeader(f, h, e.opts[:], from, packet.ACK, false)
	}
	flags := h.Flags
	finO := ^uint64(0)
	if f.finSealed {
		finO = f.sealO - 1
	}
	room := f.outMSS
	if f.pmtu != 0 {
		room = min(room, f.pmtu-f.ipLen()-packet.TCPLen)
	}
	room = min(room, e.chunkRoom())
	for from < to {
		h.Seq, h.Flags = seqOf(f.iss, from), flags
		n := int(min(to, finO) - from)
		if lim := min(size, room-len(h.Opts)); n > lim {
			n = max(lim, 1)
		}
		next := from + uint64(n)
		if next == finO && to > finO {
			h.Flags |= packet.FIN
			next++
		}
		if next == to && psh || h.Flags&packet.FIN != 0 || from < f.initO && next >= f.initO {
			// TC 3.3 wants it on the last byte of an Init message.
			h.Flags |= packet.PSH
		}
		ecn := uint8(0)
		if fresh && n > 0 {
			ecn = f.txECN
			if f.txCWR {
				h.Flags |= packet.CWR
				f.txCWR = false
			}
		}
		f.outer.SetECN(ecn)
		if r := f.recs.at(k); fresh && r.whole(from, n) && e.sendSealed(f, h, r, n) {
			e.st.InPlaceOut++
		} else if p := e.newOuter(f, h, n); p != nil {
			e.copyStored(f, k, from, p, &e.outMeta[len(e.outMeta)-1])
			countCopy(n, &e.st.SmallOut, &e.st.CopiedOut)
		}
		e.st.SegmentsOut++
		if !fresh {
			f.retransmits++
			e.st.Retransmits++
		}
		for from = next; from < to; k++ {
			if r := f.recs.at(k); r.o+uint64(r.oLen) > from {
				break
			}
		}
	}
	h.Flags = flags
}

// copyStored copies the stored outer bytes from offset o on, which is in record
// k, into p, the payload of the frame that m is of. It sums them on the way,
// unless the port does.
func (e *Engine) copyStored(f *flow, k int, o uint64, p []byte, m *outMeta) {
	m.summed = !e.offload
	done := 0
	for ; done < len(p); k++ {
		r := f.recs.at(k)
		n := int(r.oLen)
		if r.fin {
			n--
		}
		b := e.buf.bytes(r.ref, r.off, n)[o-r.o:]
		b = b[:min(len(b), len(p)-done)]
		if m.summed {
			s, c := bits.Add64(m.sum, packet.SumAt(packet.CopySum(p[done:], b, 0), done), 0)
			m.sum = s + c
		} else {
			copy(p[done:], b)
		}
		done += len(b)
		o = r.o + uint64(r.oLen)
	}
}

// resend answers an inner retransmission of [a,b): the stored bytes of its
// image go out again (T3), in segments of at most size bytes: the inner stack may
// have made its own smaller than when the frames were sealed, since larger ones
// vanish (RFC 4821).
func (e *Engine) resend(f *flow, a, b uint64, size int) {
	if a >= b {
		return
	}
	if f.resendAt == 0 || f.stallO != f.unaO {
		f.stallO, f.stallAt = f.unaO, e.now
	}
	f.resendAt = e.now
	// In the order in which the inner stack sent: a retransmission that
	// overtakes new data makes RACK (RFC 8985) take that data for lost.
	e.pushNew(f)
	s, t := f.image(a, b)
	s = max(s, f.unaO)
	if s < f.sentO {
		e.runSeal()
		var h packet.Header
		e.xmit(f, &h, f.recByOuter(s), s, min(t, f.sentO), size, false, true)
	} else if f.held {
		e.relayProbe(f)
	}
}

// relayProbe handles a segment below una that asks for an ACK: a keep-alive,
// which is to show that the peer lives, or a window probe. The peer is asked in
// turn, and its answer becomes the inner stack's. One that has nothing more to
// say may be gone, and its reset would cost what is in custody.
func (e *Engine) relayProbe(f *flow) {
	if f.parted() {
		f.ackMustI = true
		return
	}
	if e.verify(f) {
		if f.unaO == f.sealO {
			// The peer has got the frame that asks for proof. If it is gone
			// since, its host has a reset for what comes next.
			e.probeOuter(f)
		}
		return
	}
	e.probeOuter(f)
	f.probing = true
}

// probeOuter asks the peer for an ACK: a segment below its window without data.
func (e *Engine) probeOuter(f *flow) {
	e.sendOuterAck(f, f.unaO-1)
}

// maxAnswers bounds the control bytes of one flow that wait for the peer's
// acknowledgement: thousands of answers to rekeying, more than an honest peer
// asks for in a round trip.
const maxAnswers = 64 << 10

// control seals empty frames when the peer is generations ahead and no data
// carried the answer (T8, TC 3.8). A peer that rekeys without end and
// acknowledges no answer does not fill the memory: the rest of them waits.
func (e *Engine) control(f *flow) {
	for f.rxGen > f.txGen && !f.finSealed && f.ctlBytes < maxAnswers {
		if !e.sealFrame(f, nil, source{}, 0, -1, true) {
			return
		}
		f.ctlRTO, f.ctlTries = max(minRTO, 3*f.rtt), 0
	}
}

// controlOutstanding returns the control bytes at the end of what was sent
// which no inner byte follows, so that the inner stack cannot resend them. A
// frame that waits for the peer's window, a probe of it mostly, does not follow
// them yet: the inner stack takes its time with that.
func (f *flow) controlOutstanding() (from, to uint64, ok bool) {
	for k := f.recs.len() - 1; k >= 0; k-- {
		r := f.recs.at(k)
		if r.o >= f.sentO || r.iLen > 0 && r.o+uint64(r.oLen) > f.sentO {
			continue
		}
		if r.iLen > 0 {
			break
		}
		from, ok = max(r.o, f.unaO), true
		if to == 0 {
			to = min(r.o+uint64(r.oLen), f.sentO)
		}
	}
	return from, to, ok && from < to
}

// controlLost sends the control bytes at unaO again when the peer has what follows
// them (T8). The inner stack, to which they belong, often cannot be told: the part
// of its segment that SACK blocks can name is no whole one, and it would wait for
// its timeout.
func (e *Engine) controlLost(f *flow, s *packet.Segment) {
	if e.now < f.ctlAgainAt || f.recs.len() == 0 || f.recs.at(0).iLen > 0 {
		return
	}
	end := f.unaO
	for k := 0; k < f.recs.len() && f.recs.at(k).iLen == 0; k++ {
		r := f.recs.at(k)
		end = r.o + uint64(r.oLen)
	}
	hole := int64(math.MaxInt64)
	for _, b := range s.SACK[:s.NSACK] {
		if l := offOf(f.iss, b[0], f.unaO); l > int64(f.unaO) && l < int64(f.sentO) {
			hole = min(hole, l)
		}
	}
	if hole > int64(end) {
		return
	}
	f.ctlAgainAt = e.now + max(f.rtt, minControlGap)
	e.runSeal()
	var h packet.Header
	e.xmit(f, &h, 0, f.unaO, uint64(hole), f.outMSS, false, true)
}

// ackedBy processes the peer's cumulative acknowledgement of outer offset a,
// which is above unaO and not above sentO.
func (e *Engine) ackedBy(f *flow, a uint64) {
	f.unaO = a
	for f.recs.len() > 0 {
		r := f.recs.at(0)
		if r.o+uint64(r.oLen) > a {
			break
		}
		n := int(r.oLen)
		if r.fin {
			n--
		}
		f.txBytes -= n
		if r.iLen == 0 {
			f.ctlBytes -= n
		}
		e.buf.release(r.ref)
		f.recs.pop(&e.recs)
	}
	if f.recs.len() == 0 {
		e.buf.leave(&f.txSlab)
	}
	i := f.floorI(a)
	if i > f.ackI {
		f.ackI = i
		f.ackDueI = true
	}
	f.ctlRTO, f.ctlTries = max(minRTO, 3*f.rtt), 0
	if _, _, ok := f.controlOutstanding(); ok {
		e.arm(f, timerCtl, e.now+f.ctlRTO)
	} else {
		f.disarm(timerCtl)
	}
}

// mapSACK turns the peer's SACK blocks into an option for the inner stack, edges
// rounded inward (T3). Blocks that shrink to nothing, and DSACKs, are dropped.
func (f *flow) mapSACK(s *packet.Segment, o []byte) []byte {
	n := 4
	for _, b := range s.SACK[:s.NSACK] {
		l, r := offOf(f.iss, b[0], f.unaO), offOf(f.iss, b[1], f.unaO)
		if l <= int64(f.unaO) || r <= l || r > int64(f.sentO) || n+8 > len(o) {
			continue
		}
		a, z := f.ceilI(uint64(l)), f.floorI(uint64(r))
		if a >= z || a <= f.ackI {
			continue
		}
		binary.BigEndian.PutUint32(o[n:], seqOf(f.iss, a))
		binary.BigEndian.PutUint32(o[n+4:], seqOf(f.iss, z))
		n += 8
	}
	if n == 4 {
		return nil
	}
	o[0], o[1], o[2], o[3] = packet.OptNOP, packet.OptNOP, packet.OptSACK, uint8(n-2)
	return o[:n]
}

// holdFired runs when sealed bytes have waited for the peer's window: what fits
// is sent after all, or the peer is asked for its window.
func (e *Engine) holdFired(f *flow) {
	if f.sentO >= f.sealO {
		return
	}
	if f.edgeO > f.sentO {
		end := min(f.edgeO, f.sealO)
		e.runSeal()
		var h packet.Header
		e.xmit(f, &h, f.recByOuter(f.sentO), f.sentO, end, f.outMSS, true, true)
		f.sentO = end
		e.armControl(f)
		e.pushNew(f)
		return
	}
	e.probeOuter(f)
	f.holdRTO = min(2*f.holdRTO, 10*time.Second)
	e.arm(f, timerHold, e.now+f.holdRTO)
}

func (f *flow) ipLen() int {
	if f.outer.V6() {
		return packet.IPv6Len
	}
	return packet.IPv4Len
}
