package fastpath

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// simNode is one host: an engine with its packet memory, and the models of its
// kernel's connections.
type simNode struct {
	s       *sim
	id      int
	e       *Engine
	u       *xdp.Umem
	m       *slowpath.Machine // nil: flows are handed over, or plain
	divert  map[packet.Key]bool
	flows   map[packet.Key]*simFlow
	outer   [][]byte
	inner   [][]byte
	spare   [][]byte
	pollAt  time.Duration // 0: not due
	vec     []xdp.Desc
	outage  span          // the next one of what this node sends, in nanoseconds
	longest time.Duration // outage that something got lost in
	weather *rand.Rand    // when they come, whatever is sent
	ended   map[string]int
	asm     []byte
}

// fromModel queues a packet of a model for the engine.
func (n *simNode) fromModel(b []byte) {
	s := n.s
	if s.trace {
		s.logf("node %d inner -> %s", n.id, segText(b[xdp.VnetHdrLen:]))
	}
	c := &s.sc.net[n.id]
	quiet := s.now >= s.sc.quiet
	// A reset is said once: whoever loses it waits for a keep-alive.
	var g packet.Segment
	if packet.Parse(b[xdp.VnetHdrLen:], packet.FromInner, &g) == nil && g.Flags&packet.RST != 0 {
		quiet = true
	}
	if s.sc.lives && !n.takesInner(&g) {
		n.plainOut(b, &g)
		return
	}
	if !quiet && s.chance(c.tapReadLoss) || s.drop != nil && s.drop(false) {
		s.logf("lost")
		s.putBuf(b)
		return
	}
	n.inner = append(n.inner, b)
	if !quiet && s.chance(c.tapRdDupe) {
		d := s.getBuf(len(b))
		copy(d, b)
		n.inner = append(n.inner, d)
	}
	n.wake()
}

func (n *simNode) wake() {
	if n.pollAt == 0 {
		n.pollAt = n.s.now
		if d := n.s.sc.pollDelay; d > 0 {
			n.pollAt += time.Duration(n.s.rng.Int64N(int64(d)))
		}
	}
}

// poll is the worker's loop: both queues, then what they made due.
func (n *simNode) poll() {
	s := n.s
	n.pollAt = 0
	q := n.outer
	n.outer = nil
	for i := 0; i < len(q); i++ {
		p := q[i]
		if i+1 < len(q) && s.chance(s.sc.net[1-n.id].merge) {
			p = s.mergeRun(q, &i)
		}
		if len(p) > s.sc.chunkSize-xdp.Headroom {
			n.outerVec()
			n.e.OuterFrame(p, s.now)
			n.drain()
			s.putBuf(p)
			continue
		}
		addr, ok := n.u.Alloc()
		if !ok {
			// The fill ring ran empty, as it may; packets are lost.
			s.putBuf(p)
			continue
		}
		addr += xdp.Headroom
		copy(n.u.Bytes(addr, len(p)), p)
		n.vec = append(n.vec, xdp.Desc{Addr: addr, Len: uint32(len(p))})
		s.putBuf(p)
		if len(n.vec) == VectorSize {
			n.outerVec()
		}
	}
	n.outerVec()
	for _, f := range s.flows {
		f.wire[n.id].forged = nil
	}
	n.spare, n.inner = n.inner, n.spare[:0]
	if s.sc.gateway[n.id] {
		n.innerVec(n.spare)
	} else {
		for _, b := range n.spare {
			n.e.InnerIn(b, s.now)
		}
		n.e.Flush(s.now)
	}
	n.drain()
	for _, b := range n.spare {
		s.putBuf(b)
	}
	n.checkEngine()
}

func (n *simNode) outerVec() {
	if len(n.vec) > 0 {
		n.e.OuterIn(n.vec, n.s.now)
		n.vec = n.vec[:0]
		n.drain()
	}
}

// innerVec gives a gateway's engine what the models sent, in segments.
func (n *simNode) innerVec(packets [][]byte) {
	vec := make([]xdp.Desc, 0, VectorSize)
	flush := func() {
		n.e.InnerChunks(vec, n.s.now)
		vec = vec[:0]
		n.drain()
	}
	for _, b := range packets {
		eachSegment(b, func(p []byte) {
			if len(p) > n.u.ChunkSize()-xdp.Headroom {
				flush()
				n.e.InnerFrame(bytes.Clone(p), n.s.now)
				n.drain()
				return
			}
			addr, ok := n.u.Alloc()
			if !ok {
				return // the fill ring ran empty
			}
			addr += xdp.Headroom
			copy(n.u.Bytes(addr, len(p)), p)
			vec = append(vec, xdp.Desc{Addr: addr, Len: uint32(len(p))})
			if len(vec) == VectorSize {
				flush()
			}
		})
	}
	flush()
}

// eachSegment cuts a packet with a virtio-net header as a device does that
// segments.
func eachSegment(b []byte, each func([]byte)) {
	v := xdp.ParseVnetHdr(b)
	frame := b[xdp.VnetHdrLen:]
	var g packet.Segment
	if v.GSOType == 0 || packet.Parse(frame, packet.FromInner, &g) != nil {
		each(frame)
		return
	}
	data := g.Payload()
	for off := 0; off < len(data); off += int(v.GSOSize) {
		end := min(off+int(v.GSOSize), len(data))
		p := packet.Rewrite(nil, &g, g.Options(), data[off:end])
		binary.BigEndian.PutUint32(p[g.L4+4:], g.Seq+uint32(off))
		if end < len(data) {
			p[g.L4+13] &^= packet.FIN | packet.PSH
		}
		if off > 0 {
			p[g.L4+13] &^= packet.CWR
		}
		if urg := int(g.Urg) - off; urg > 0 {
			binary.BigEndian.PutUint16(p[g.L4+18:], uint16(urg))
		} else {
			p[g.L4+13] &^= packet.URG
		}
		packet.FullChecksum(p, g.L3, g.L4, g.V6)
		each(p)
	}
}

// outputs empties the engine's outputs. The engine calls it, too.
func (n *simNode) outputs() {
	s := n.s
	for _, f := range s.flows {
		f.wire[n.id].believe()
	}
	if s.sc.virtual {
		n.e.FinishOut(func(*xdp.Desc, uint16, uint16) {})
	} else {
		n.e.FinishOut(nil)
	}
	for _, d := range n.e.Out() {
		b := s.getBuf(int(d.Len))
		copy(b, n.u.Bytes(d.Addr, int(d.Len)))
		n.u.Discard(d.Addr)
		s.sent(n.id, b)
	}
	n.e.ClearOut()
	n.e.FinishInner(nil)
	for _, d := range n.e.InnerOut() {
		b := append(n.asm[:0], make([]byte, xdp.VnetHdrLen)...)
		b = append(b, n.u.Bytes(d.Addr, int(d.Len))...)
		n.asm = b
		n.u.Discard(d.Addr)
		n.toModel(b)
	}
	n.e.ClearInner()
	in := n.e.In()
	for i := range in {
		b := append(n.asm[:0], in[i].Header()...)
		for _, d := range in[i].Data() {
			b = append(b, d...)
		}
		n.asm = b
		n.toModel(b)
	}
	n.e.ClearIn()
}

// drain does that, and handles the engine's events.
func (n *simNode) drain() {
	n.outputs()
	evs := n.e.Events()
	if len(evs) == 0 {
		return
	}
	// What they cause are calls of the engine.
	evs = append([]Event(nil), evs...)
	for i := range evs {
		n.event(&evs[i])
	}
	if n.m != nil {
		n.drain()
	}
}

func (n *simNode) event(ev *Event) {
	s := n.s
	switch ev.Kind {
	case FlowEnded:
		s.logf("node %d ended: %s", n.id, ev.Info.Reason)
		n.ended[ev.Info.Reason]++
		s.reasons[ev.Info.Reason]++
	case FlowGone:
		f := n.flows[ev.Key]
		f.gone[n.id] = true
		if n.m != nil {
			n.m.Gone(ev.Key)
			delete(n.divert, ev.Key)
		}
		if m := f.m[n.id]; m.opening != opened {
			// Its copy of the SYN begins the connection anew; here that is one
			// that did not come about.
			f.failed = "reset while opening"
			m.refuse()
		} else if ev.Destroy {
			f.m[n.id].reset = true
		} else if m := f.m[n.id]; m.eof && (m.peer.eof || m.peer.reset) {
			// Its last ACK got lost for longer than the flow lingered.
			m.lateRST = !m.done()
			m.reset = m.reset || m.lateRST
		} else if !m.done() {
			s.fail("node %d: flow is gone, its socket is not done: %v", n.id, f.m[n.id])
		}
	case SlowFrame:
		if n.m != nil {
			n.carryOut(n.m.Input(ev.Dir, ev.Frame, s.now))
			return
		}
		// A kernel without the socket answers with a reset.
		var g packet.Segment
		if ev.Dir == packet.FromOuter && packet.Parse(ev.Frame, packet.FromOuter, &g) == nil && g.Flags&packet.RST == 0 {
			f := n.flows[g.Key]
			if f == nil || !f.up[n.id] || f.m[n.id].rcv == 0 && !f.gone[n.id] {
				return
			}
			n.refuse(ev.Frame, &g)
		}
	}
}

func (n *simNode) toModel(b []byte) {
	s := n.s
	if s.trace {
		s.logf("node %d inner <- %s", n.id, segText(b[xdp.VnetHdrLen:]))
	}
	frame := b[xdp.VnetHdrLen:]
	var g packet.Segment
	if err := packet.Parse(frame, packet.FromOuter, &g); err == packet.ErrNotTCP {
		n.icmpToModel(frame, false)
		return
	} else if err != nil {
		s.fail("node %d: bad packet to the inner side: %v", n.id, err)
		return
	}
	f := n.flows[g.Key]
	if f == nil {
		s.fail("node %d: packet for an unknown socket %v", n.id, g.Key)
		return
	}
	m := f.m[n.id]
	if f.up[n.id] && f.gone[n.id] && m.done() {
		// No socket any more.
		if g.Flags&(packet.SYN|packet.ACK|packet.RST) == packet.SYN {
			m.refuseSYN(&g)
		}
		return
	}
	if s.sc.gateway[n.id] && f.up[n.id] && g.Len() > m.cfg.rcvMSS {
		s.fail("node %d: %d bytes in a segment to %s", n.id, g.Len(), f.name)
	}
	if fl := n.e.tab.find(&g.Key); fl != nil {
		m.consumed = fl.sealI - f.warpI[n.id]
	}
	c := &s.sc.net[n.id]
	quiet := s.now >= s.sc.quiet
	if !quiet && s.chance(c.tapLoss) || s.drop != nil && s.drop(false) {
		s.logf("lost")
		return
	}
	m.input(b, s.now)
	if !quiet && s.chance(c.tapDup) && g.Flags&packet.RST == 0 {
		m.input(b, s.now)
	}
}

// icmpToModel checks an ICMP error and lets the model act on it. One from the wire
// is for plain connections, the others were translated.
func (n *simNode) icmpToModel(frame []byte, wire bool) {
	s := n.s
	var x packet.L3Info
	if err := packet.ParseL3(frame, &x); wire && (err != nil || x.Proto != 1 && x.Proto != 58 || !packet.ICMPChecksumOK(frame[:x.End], x.L3, x.L4, x.V6)) {
		return
	} else if err != nil || !packet.ICMPChecksumOK(frame[:x.End], x.L3, x.L4, x.V6) {
		s.fail("node %d: bad ICMP message to the inner side: %v", n.id, err)
		return
	}
	m := frame[x.L4:]
	emb := m[8:]
	k := packet.Key{VLAN: x.VLAN}
	ihl, mtu := packet.IPv4Len, int(binary.BigEndian.Uint16(m[6:]))
	if x.V6 {
		ihl, mtu = packet.IPv6Len, int(binary.BigEndian.Uint32(m[4:]))
		copy(k.Local[:], emb[8:24])
		copy(k.Remote[:], emb[24:40])
	} else {
		k.Local = [16]byte{10: 0xff, 11: 0xff, 12: emb[12], 13: emb[13], 14: emb[14], 15: emb[15]}
		k.Remote = [16]byte{10: 0xff, 11: 0xff, 12: emb[16], 13: emb[17], 14: emb[18], 15: emb[19]}
	}
	k.LPort, k.RPort = binary.BigEndian.Uint16(emb[ihl:]), binary.BigEndian.Uint16(emb[ihl+2:])
	f := n.flows[k]
	if f == nil {
		s.fail("node %d: ICMP message for an unknown socket", n.id)
		return
	}
	if wire && f.up[n.id] {
		return
	}
	t := f.m[n.id]
	if o := offOf(t.iss, binary.BigEndian.Uint32(emb[ihl+4:]), t.una); o < int64(t.una) && !t.cfg.lossy && !wire || o > int64(t.max) {
		s.fail("node %d: ICMP message about %d, in flight are [%d,%d)", n.id, o, t.una, t.max)
	}
	mss := mtu - ihl - packet.TCPLen
	if t.cfg.ts {
		mss -= 12
	}
	t.cfg.mss = max(88, min(t.cfg.mss, mss))
	t.fullMSS = min(t.fullMSS, max(88, mss))
}
