package fastpath

import (
	"encoding/binary"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// Every header that leaves the engine is composed here from the flow's state,
// outward by outerHeader and inward by innerHeader, and nowhere else (T2).

func putTS(o []byte, val, ecr uint32) {
	binary.BigEndian.PutUint32(o, 0x0101080a)
	binary.BigEndian.PutUint32(o[4:], val)
	binary.BigEndian.PutUint32(o[8:], ecr)
}

// rxTarget returns the outer right edge that the inner stack's window and the
// frame in assembly call for (T13). To the inner window is added what frames of
// the recent mean size take for themselves: a sender that may have one segment
// on its way must not be short of it by a frame's overhead. Of a small window two
// frames are all: a sender that shows it to its own inner stack for larger ones
// would make that believe in segments that no window holds.
func (e *Engine) rxTarget(f *flow) uint64 {
	t := f.nxtO - uint64(f.hdrN+f.asmHave) - f.opening
	if f.innerEdge > f.dlvI {
		w := min(f.innerEdge-f.dlvI, uint64(max(0, e.cfg.FlowBudget-f.kept())))
		mean := uint64(f.meanIn)
		if w < 2*uint64(f.inMSS) {
			mean = max(mean, w/2)
		}
		t += w + min((w+mean-1)/mean*overhead, maxFrameRoom)
	}
	// The rest of a frame is let in whatever the inner window, once all
	// plaintext before it was passed on: a frame may be larger than the
	// inner stack's whole buffer. Its memory is reserved already.
	if f.sntI >= f.dlvI && f.opening == 0 {
		if f.asm != nil {
			t = max(t, f.frameO+uint64(len(f.asm))+3)
		} else if f.hdrN > 0 {
			t = max(t, f.frameO+3)
		}
	}
	// An edge that the window field cannot tell would be news for ever.
	return max(min(t, f.nxtO+0xffff<<f.localShift), f.rxEdge, f.nxtO)
}

// outerHeader fills in h for a segment to the wire at outer offset seq.
// opts must have packet.MaxOptions bytes. With acks set, SACK blocks are added.
func (e *Engine) outerHeader(f *flow, h *packet.Header, opts []byte, seq uint64, flags uint8, acks bool) {
	shift := f.localShift
	wnd := min((e.rxTarget(f)-f.nxtO+1<<shift-1)>>shift, 0xffff)
	f.rxEdge = max(f.rxEdge, f.nxtO+wnd<<shift)
	n := 0
	if f.tsOK {
		putTS(opts, f.tsLocal, f.tsRemote)
		n = 12
	}
	if f.unheard {
		binary.BigEndian.PutUint32(opts[n:], packet.OptENO<<24|2<<16|packet.OptNOP<<8|packet.OptNOP)
		n += 4
	}
	if acks && f.sackOK {
		n += f.putSACK(opts[n:packet.MaxOptions])
	}
	if f.ecnOK && f.eceLatch {
		flags |= packet.ECE
	}
	h.Seq, h.Ack, h.Flags, h.Wnd, h.Urg = seqOf(f.iss, seq), seqOf(f.irs, f.nxtO), flags, uint16(wnd), 0
	h.Opts = opts[:n]
	f.ackSentO = f.nxtO
	f.disarm(timerAck)
	f.ackNow = false
}

// putSACK writes a SACK option of as many blocks as fit: a DSACK first if one
// is due (RFC 2883), then the runs, the one that changed last first (RFC 2018).
func (f *flow) putSACK(o []byte) int {
	room := (len(o) - 4) / 8
	if room <= 0 {
		return 0
	}
	n := 4
	put := func(r run) {
		binary.BigEndian.PutUint32(o[n:], seqOf(f.irs, r.s))
		binary.BigEndian.PutUint32(o[n+4:], seqOf(f.irs, r.e))
		n += 8
		room--
	}
	if f.dsack.e != 0 {
		put(f.dsack)
		f.dsack = run{}
	}
	last := f.stamp + 1
	for room > 0 {
		best := -1
		for i := range f.runs {
			// A run that begins at nxtO waits for memory and is not told yet.
			if f.runs[i].s > f.nxtO && f.runs[i].stamp < last && (best < 0 || f.runs[i].stamp > f.runs[best].stamp) {
				best = i
			}
		}
		if best < 0 {
			break
		}
		put(f.runs[best])
		last = f.runs[best].stamp
	}
	if n == 4 {
		return 0
	}
	o[0], o[1], o[2], o[3] = packet.OptNOP, packet.OptNOP, packet.OptSACK, uint8(n-2)
	return n
}

// innerWindow returns the window field that the inner stack is shown: what the
// peer's window and the retention budget leave for plaintext (T5, T6).
func (e *Engine) innerWindow(f *flow) uint64 {
	if f.held {
		return 0
	}
	room, m := 0, f.innerSegment()
	if f.edgeO > f.sealO {
		edge := int(min(f.edgeO-f.sealO, 1<<30))
		room = int(uint64(edge) * uint64(f.meanData) / uint64(f.meanData+overhead))
		// The inner stack sends whole segments. One that is too long for the
		// window by a frame's overhead, or by more while nothing is under way,
		// would be waited for until a timer fires; the rest can be held.
		if room < m && (edge >= m || edge >= m/2 && f.unaO == f.sealO) {
			room = m
		}
	}
	if e.buf.tight() {
		room = min(room, bigSize-f.txBytes)
	}
	room = max(0, min(room, e.cfg.FlowBudget-f.txBytes, e.buf.room()/4))
	flight := f.sealI - f.ackI
	wnd := (flight + uint64(room)) >> f.remoteShift
	least := 1
	if room >= m {
		least = m
	}
	if room > 0 && wnd<<f.remoteShift < flight+uint64(least) {
		// Rounding must not close a window that is open, nor make it shorter
		// than a segment: what does not fit the peer's can be held.
		wnd++
	}
	return min(wnd, 65535)
}

// innerSegment returns how many bytes of data the inner stack waits for a window
// to hold: a segment, or as Linux does half of the largest window it saw. More
// would leave it waiting for windows that hold its segments, but not half of ours.
func (f *flow) innerSegment() int {
	m := f.outMSS - overhead
	if f.tsOK {
		m -= 12
	}
	if f.wndMaxI == 0 {
		return m
	}
	return min(m, int(f.wndMaxI/2))
}

// innerHeader fills in h for a segment to the inner stack at inner offset seq.
func (e *Engine) innerHeader(f *flow, h *packet.Header, opts []byte, seq uint64, flags uint8) {
	wnd := e.innerWindow(f)
	n := 0
	if f.tsOK {
		putTS(opts, f.tsRemote, f.tsRemoteEcr)
		n = 12
	}
	if f.peerECE {
		flags |= packet.ECE
	}
	h.Seq, h.Ack, h.Flags, h.Wnd, h.Urg = seqOf(f.irs, seq), seqOf(f.iss, f.ackI), flags, uint16(wnd), 0
	h.Opts = opts[:n]
	f.ackShownI, f.wndShownI = f.ackI, wnd<<f.remoteShift
	f.wndMaxI = max(f.wndMaxI, f.wndShownI)
	f.ackDueI, f.ackMustI = false, false
}

// sendOuterAck transmits a pure ACK at outer offset seq.
func (e *Engine) sendOuterAck(f *flow, seq uint64) {
	var h packet.Header
	e.outerHeader(f, &h, e.opts[:], seq, packet.ACK, true)
	f.outer.SetECN(0)
	e.emitOuter(f, &h, nil)
	e.st.AcksOut++
}

// sendOuterReset transmits a reset at the outer snd_nxt (T15).
func (e *Engine) sendOuterReset(f *flow, seq uint32) {
	h := packet.Header{Seq: seq, Ack: seqOf(f.irs, f.nxtO), Flags: packet.RST | packet.ACK}
	f.outer.SetECN(0)
	e.emitOuter(f, &h, nil)
}

// chunkRoom returns the most option and payload bytes that a packet composed in a
// fresh chunk can have.
func (e *Engine) chunkRoom() int { return e.umem.ChunkSize() - 2*packet.MaxHeaders - xdp.Headroom }

// emitOuter puts one frame with the given header and a payload of n bytes into
// a fresh chunk of the outgoing vector and returns the payload's place, or nil
// when there is no chunk: the segment is lost, as on a wire.
func (e *Engine) newOuter(f *flow, h *packet.Header, n int) []byte {
	addr, ok := e.umem.Alloc()
	if !ok {
		e.st.NoChunk++
		return nil
	}
	addr += xdp.Headroom
	b := e.umem.Bytes(addr, packet.MaxHeaders+n)
	hl := f.outer.Compose(b, h, n)
	e.pushOuter(xdp.Desc{Addr: addr, Len: uint32(hl + n)}, f.outer.L3(), f.outer.L4(), f.outer.V6())
	return b[hl : hl+n]
}

func (e *Engine) emitOuter(f *flow, h *packet.Header, payload []byte) {
	if p := e.newOuter(f, h, len(payload)); p != nil {
		copy(p, payload)
	}
}

// sendInnerAck gives the inner stack a pure ACK, with the peer's SACK blocks.
func (e *Engine) sendInnerAck(f *flow, sack []byte) {
	var h packet.Header
	e.innerHeader(f, &h, e.opts[:], f.sntI, packet.ACK)
	if room := packet.MaxOptions - len(h.Opts); len(sack) > 0 && len(sack) <= room {
		n := len(h.Opts)
		copy(e.opts[n:], sack)
		h.Opts = e.opts[:n+len(sack)]
	}
	f.inner.SetECN(0)
	e.emitInner(f, &h)
	e.st.InnerAcks++
}

// sendInnerReset resets the inner stack at the sequence number it expects.
func (e *Engine) sendInnerReset(f *flow, seq uint32) {
	h := packet.Header{Seq: seq, Ack: seqOf(f.iss, f.ackI), Flags: packet.RST | packet.ACK}
	f.inner.SetECN(0)
	e.emitInner(f, &h)
}

func (e *Engine) emitInner(f *flow, h *packet.Header) {
	p := e.newInner()
	e.finishInner(f, p, h, 0)
}

// finishInner writes headers and virtio-net header of an inner packet whose n
// payload bytes are in place.
func (e *Engine) finishInner(f *flow, p *InnerPacket, h *packet.Header, n int) {
	if e.cfg.InnerChunks {
		e.finishInnerChunk(f, p, h, n)
		return
	}
	hl := f.inner.Compose(p.buf[xdp.VnetHdrLen:], h, n)
	p.hdrLen = xdp.VnetHdrLen + hl
	l3, l4 := f.inner.L3(), f.inner.L4()
	packet.PartialChecksum(p.buf[xdp.VnetHdrLen:], l3, l4, hl-l4+n, f.inner.V6())
	v := xdp.VnetHdr{Flags: xdp.VnetNeedsCsum, CsumStart: uint16(l4), CsumOffset: 16}
	if n > int(f.inSeg) {
		v.GSOType = xdp.VnetGSOTCPv4
		if f.inner.V6() {
			v.GSOType = xdp.VnetGSOTCPv6
		}
		if h.Flags&packet.CWR != 0 {
			v.GSOType |= xdp.VnetGSOECN
		}
		v.GSOSize, v.HdrLen = uint16(f.inSeg), uint16(hl)
	}
	v.Put(p.buf[:])
}
