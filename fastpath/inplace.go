package fastpath

import (
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// Translation in place, between two AF_XDP ports of one UMEM: a segment is
// sealed or opened in the chunk it came in, gets its new headers there, before
// the data, and leaves from there. The chunk is retained while the flow may have
// to send its bytes again; a second time they are copied, because the headers
// may be on the wire still. Copied are also small segments, which would hold a
// chunk each, and frames that are not a segment each.

// txRoom is left free before a packet's first byte, for the TX metadata.
const txRoom = 32

// InnerChunks works on a vector of frames from the inner port. It takes over
// their chunks.
func (e *Engine) InnerChunks(v []xdp.Desc, now time.Duration) {
	e.now = now
	e.fetchHeads(v)
	for len(v) > 0 {
		g := e.group[:min(len(v), groupSize)]
		e.parseChunks(g, v, packet.FromInner)
		e.fetchHeads(v[len(g):])
		for i := range g {
			d := &v[i]
			r := e.buf.hold(d.Addr)
			e.innerFrame(&g[i], e.umem.Bytes(d.Addr, int(d.Len)), source{ref: r, off: uint32(d.Addr & uint64(e.umem.ChunkSize()-1))})
			// Nothing of it was sealed yet.
			e.working = append(e.working, r)
		}
		v = v[len(g):]
	}
	e.flush()
	for _, r := range e.working {
		e.buf.release(r)
	}
	e.working = e.working[:0]
}

// InnerFrame works on one frame from the inner port that does not lie in a chunk.
// The frame is overwritten, and not used after the call.
func (e *Engine) InnerFrame(frame []byte, now time.Duration) {
	e.now = now
	g := e.group[:1]
	g[0].err = packet.Parse(frame, packet.FromInner, &g[0].seg)
	e.lookUp(g)
	e.innerFrame(&g[0], frame, source{})
	e.flush()
}

func (e *Engine) innerFrame(p *grouped, frame []byte, src source) {
	if p.err != nil {
		e.st.Malformed++
		return
	}
	if !p.seg.ChecksumOK(e.cfg.InnerVirtual) {
		e.st.BadChecksum++
		return
	}
	e.innerSegment(p, frame, frame, src, 0)
}

// InnerOut returns the frames to transmit on the inner port; the chunks belong
// to the caller, who gives those back with Umem.Discard that are not sent.
// FinishInner must have been called on them.
func (e *Engine) InnerOut() []xdp.Desc { return e.inDesc }

// ClearInner empties the vector for the inner port.
func (e *Engine) ClearInner() { e.inDesc, e.inMeta = e.inDesc[:0], e.inMeta[:0] }

// FinishInner is FinishOut for the inner port.
func (e *Engine) FinishInner(request func(d *xdp.Desc, start, offset uint16)) {
	e.finish(e.inDesc, e.inMeta, request)
}

func (e *Engine) pushInner(d xdp.Desc, m outMeta) {
	if len(e.inDesc) == cap(e.inDesc) {
		e.cfg.Drain()
	}
	e.inDesc = append(e.inDesc, d)
	e.inMeta = append(e.inMeta, m)
}

// sealPlace returns the memory that a frame of total bytes is sealed into when
// its data may stay where it is: at is the byte before it.
func (e *Engine) sealPlace(at source, total int) (mem []byte, r ref, off uint32, ok bool) {
	const before = 3 // bytes of the frame before the flags
	if at.ref.kind != refChunk || total < smallPiece || e.buf.crowded() || int(at.off)-before+total > e.umem.ChunkSize() {
		return nil, ref{}, 0, false
	}
	e.addHold(at.ref)
	off = at.off - before
	return e.buf.bytes(at.ref, off, total), at.ref, off, true
}

// whole reports whether the n bytes from outer offset o on are all that is to be
// sent of r, and lie in a chunk.
func (r *rec) whole(o uint64, n int) bool {
	return r.ref.kind == refChunk && r.o == o && !r.fin && n == int(r.oLen)
}

// sendSealed transmits a sealed frame of n bytes from the chunk it was sealed in.
func (e *Engine) sendSealed(f *flow, h *packet.Header, r *rec, n int) bool {
	d, ok := e.compose(&f.outer, h, r.ref, r.off, n)
	if ok {
		e.pushOuter(d, f.outer.L3(), f.outer.L4(), f.outer.V6())
	}
	return ok
}

// compose puts headers before the n bytes at off of a chunk and retains it.
func (e *Engine) compose(t *packet.Template, h *packet.Header, r ref, off uint32, n int) (xdp.Desc, bool) {
	hl := t.L4() + packet.TCPLen + len(h.Opts)
	addr := uint64(r.idx) << e.buf.shift
	if int(off) < hl+txRoom || e.umem.Sending(addr) {
		return xdp.Desc{}, false
	}
	addr += uint64(int(off) - hl)
	t.Compose(e.umem.Bytes(addr, hl), h, n)
	e.umem.Retain(addr)
	return xdp.Desc{Addr: addr, Len: uint32(hl + n)}, true
}

// fresh reports whether a piece of custody is whole, was never passed on, and
// has room for headers before it.
func (f *flow) fresh(p *piece) bool {
	return p.mark&markLead != 0 && p.ref.kind == refChunk && p.at == f.sntI && f.sntI == f.sntMaxI
}

// finishInnerChunk is finishInner for an inner port of AF_XDP.
func (e *Engine) finishInnerChunk(f *flow, p *InnerPacket, h *packet.Header, n int) {
	meta := outMeta{l3: uint8(f.inner.L3()), l4: uint8(f.inner.L4()), v6: f.inner.V6()}
	place := p.place
	p.place = ref{}
	if place.kind == refChunk {
		if d, ok := e.compose(&f.inner, h, place, p.off, n); ok {
			e.st.InPlaceIn++
			p.data = p.data[:0]
			e.pushInner(d, meta)
			return
		}
	}
	addr, ok := e.umem.Alloc()
	if !ok {
		// Lost, as in any queue: custody resends it (T13).
		e.st.NoChunk++
		p.data = p.data[:0]
		return
	}
	addr += xdp.Headroom
	b := e.umem.Bytes(addr, packet.MaxHeaders+n)
	hl := f.inner.Compose(b, h, n)
	at := hl
	for _, piece := range p.data {
		at += copy(b[at:], piece)
	}
	p.data = p.data[:0]
	countCopy(n, &e.st.SmallIn, &e.st.CopiedIn)
	e.pushInner(xdp.Desc{Addr: addr, Len: uint32(at)}, meta)
}

// countCopy counts a segment with n bytes of data that was copied.
func countCopy(n int, small, large *uint64) {
	switch {
	case n >= smallPiece:
		*large++
	case n > 0:
		*small++
	}
}

// sendInnerChunk is SendInner for an inner port of AF_XDP.
func (e *Engine) sendInnerChunk(frame []byte, x *packet.L3Info) {
	addr, ok := e.umem.Alloc()
	if !ok {
		e.st.NoChunk++
		return
	}
	addr += xdp.Headroom
	if x.End > e.umem.ChunkSize()-xdp.Headroom {
		e.umem.Free(addr)
		e.st.Malformed++
		return
	}
	n := copy(e.umem.Bytes(addr, x.End), frame[:x.End])
	meta := outMeta{} // other checksums are right already
	if x.Proto == 6 {
		meta = outMeta{l3: uint8(x.L3), l4: uint8(x.L4), v6: x.V6}
	}
	e.pushInner(xdp.Desc{Addr: addr, Len: uint32(n)}, meta)
}
