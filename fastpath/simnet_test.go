package fastpath

import (
	"bytes"
	"encoding/binary"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// sent is what leaves a node: the monitor looks at it, then it travels.
func (s *sim) sent(from int, b []byte) {
	s.segs++
	s.bytes += uint64(len(b))
	if s.trace {
		s.logf("node %d outer -> %s", from, segText(b))
	}
	var g packet.Segment
	if err := packet.Parse(b, packet.FromInner, &g); err != nil {
		s.fail("node %d: bad packet to the wire: %v", from, err)
		return
	}
	f := s.nodes[from].flows[g.Key]
	if f == nil {
		s.fail("node %d: packet of an unknown flow to the wire", from)
		return
	}
	if len(g.Frame) != len(b) {
		s.fail("node %d: %d bytes behind the packet", from, len(b)-len(g.Frame))
	}
	if f.up[from] && !f.gone[from] {
		f.wire[from].observe(&g)
	} else if (f.up[0] || f.up[1]) && bytes.Contains(g.Payload(), []byte(canary)) {
		s.fail("node %d: plaintext of an encrypted connection to the wire", from)
	}
	if s.dropSegment != nil && s.dropSegment(from, &g) {
		s.logf("lost")
		s.putBuf(b)
		return
	}
	s.travel(from, b)
}

// travel takes a packet through the network.
func (s *sim) travel(from int, b []byte) {
	c := &s.sc.net[from]
	if s.drop != nil && s.drop(true) {
		s.logf("lost")
		s.putBuf(b)
		return
	}
	var g packet.Segment
	packet.Parse(b, packet.FromInner, &g)
	if s.sc.lives && g.Flags&packet.SYN != 0 {
		s.stripSYN(&g)
	}
	if s.now >= s.sc.quiet {
		s.schedule(from, b, c.delay)
		return
	}
	if s.nodes[from].out(c) || s.chance(c.loss) {
		s.logf("lost")
		s.putBuf(b)
		return
	}
	if c.mtu != 0 && s.now >= c.mtuAt && len(b)-g.L3 > c.mtu {
		s.logf("too big")
		if !c.blackhole {
			s.tooBig(from, &g, c.mtu)
		}
		s.putBuf(b)
		return
	}
	if s.chance(c.attack) {
		s.attack(from, &g)
	}
	if s.chance(c.noSACK) {
		s.blank(&g, packet.OptSACK)
	}
	if s.chance(c.noTS) {
		s.blank(&g, packet.OptTimestamp)
	}
	if g.TOS&3 == 2 && s.chance(c.ce) {
		s.markCE(&g)
	}
	if s.chance(c.corrupt) {
		b[g.L3+s.rng.IntN(len(b)-g.L3)] ^= 1 << s.rng.IntN(8)
	} else if g.Len() > 0 && s.forgeable(&g) && s.chance(c.forge) {
		b[g.Data+s.rng.IntN(g.Len())] ^= 1 << s.rng.IntN(8)
		packet.FullChecksum(b, g.L3, g.L4, g.V6)
	} else if g.Len() > 1 && s.chance(c.split) {
		p := g.Payload()
		for off := 0; off < len(p); {
			m := 1 + s.rng.IntN(len(p)-off)
			if s.rng.IntN(4) == 0 {
				m = min(m, 1+s.rng.IntN(20))
			}
			s.journey(from, s.slice(&g, off, m))
			off += m
		}
		s.putBuf(b)
		return
	}
	s.journey(from, b)
}

// out reports whether the way from n is out of order now. Outages depend on time
// alone, so that whoever sends under the same seed meets the same ones.
func (n *simNode) out(c *netConfig) bool {
	if c.outEvery == 0 {
		return false
	}
	now := uint64(n.s.now)
	for n.outage.e <= now {
		n.outage.s = n.outage.e + uint64(n.weather.ExpFloat64()*float64(c.outEvery))
		n.outage.e = n.outage.s + 1 + uint64(n.weather.ExpFloat64()*float64(c.outFor))
	}
	if n.outage.s > now {
		return false
	}
	n.longest = max(n.longest, time.Duration(n.outage.e-n.outage.s))
	return true
}

// forgeable reports whether g is protected: a plain connection would deliver
// what is forged.
func (s *sim) forgeable(g *packet.Segment) bool {
	f := s.nodes[0].flows[g.Key]
	if f == nil {
		f = s.nodes[1].flows[g.Key]
	}
	return f != nil && f.up[0] && f.up[1]
}

// attack sends a segment that an attacker made up who sees g, but has no keys.
// Where the scenario allows no abort, it is one that TCP withstands, too.
func (s *sim) attack(from int, g *packet.Segment) {
	f := s.nodes[from].flows[g.Key]
	if f == nil || g.Flags&(packet.SYN|packet.RST) != 0 || !f.up[0] || !f.up[1] {
		return
	}
	w, rev := f.wire[from], f.wire[1-from]
	old := func() uint32 {
		return g.Seq - uint32(offOf(w.iss, g.Seq, w.high)) + uint32(s.rng.Uint64N(rev.ackSent+1))
	}
	seq, ack, flags := g.Seq, g.Ack, uint8(packet.ACK)
	var data []byte
	flip := false
	garbage := func(n uint64) []byte {
		at := s.rng.Uint64N(poolLen - 64)
		return pool[at : at+1+s.rng.Uint64N(n)]
	}
	kinds := 5
	if s.sc.mayAbort {
		kinds = 10
	}
	switch s.rng.IntN(kinds) {
	case 0:
		seq, flags = old()-1, packet.RST
	case 1:
		seq, flags = s.rng.Uint32(), packet.SYN|flags&uint8(-s.rng.IntN(2))
	case 2:
		far := uint32(1 << 20)
		if !s.sc.mayAbort {
			// An acknowledgement of what was sent is believed.
			far = max(far, uint32(w.edgeSent-w.ackSent)+2)
		}
		ack += far + s.rng.Uint32N(1<<20)
	case 3:
		ack -= 1<<30 + s.rng.Uint32N(1<<20)
	case 4:
		if rev.ackSent == 0 {
			return
		}
		seq = old()
		data = garbage(min(64, rev.ackSent-uint64(offOf(w.iss, seq, rev.ackSent))+1))
		if uint64(offOf(w.iss, seq, rev.ackSent))+uint64(len(data)) > rev.ackSent {
			return
		}
	case 5:
		seq, flags = seq+s.rng.Uint32N(70000), packet.RST
	case 6:
		flags |= packet.FIN
	case 7:
		flags |= packet.FIN
		data = garbage(64)
	case 8:
		data = garbage(64)
	case 9:
		if flip = g.Len() > 0; flip {
			data = bytes.Clone(g.Payload())
			data[s.rng.IntN(len(data))] ^= 1 << s.rng.IntN(8)
		}
	}
	at := s.now + s.sc.net[from].delay
	s.forge(from, g, at, seq, ack, flags, data)
	if flip && s.sc.lives && s.rng.IntN(2) == 0 {
		// Together with the abort that this may cause comes an attempt at a
		// new connection.
		s.forge(from, g, at, s.rng.Uint32(), 0, packet.SYN, nil)
	}
}

// forge sends a segment like g, but with these contents, to arrive at a given time.
func (s *sim) forge(from int, g *packet.Segment, at time.Duration, seq, ack uint32, flags uint8, data []byte) {
	x := packet.Rewrite(s.getBuf(0), g, g.Options(), data)
	t := x[g.L4:]
	binary.BigEndian.PutUint32(t[4:], seq)
	binary.BigEndian.PutUint32(t[8:], ack)
	t[13] = flags
	packet.FullChecksum(x, g.L3, g.L4, g.V6)
	if s.trace {
		s.logf("forged from node %d: %s", from, segText(x))
	}
	s.events.push(simEvent{at: at, ord: s.nextOrd(), node: 1 - from, buf: x, forged: true})
}

// blank overwrites an option with NOPs, as middleboxes do.
func (s *sim) blank(g *packet.Segment, kind byte) {
	if g.Flags&packet.SYN != 0 {
		return
	}
	packet.WalkOptions(g.Options(), func(o []byte) bool {
		if o[0] == kind {
			for i := range o {
				o[i] = packet.OptNOP
			}
		}
		return true
	})
	packet.FullChecksum(g.Frame, g.L3, g.L4, g.V6)
	packet.Parse(g.Frame, packet.FromInner, g)
}

// slice makes a segment of m payload bytes of g from off on.
func (s *sim) slice(g *packet.Segment, off, m int) []byte {
	p := g.Payload()
	b := packet.Rewrite(s.getBuf(len(g.Frame))[:0], g, g.Options(), p[off:off+m])
	binary.BigEndian.PutUint32(b[g.L4+4:], g.Seq+uint32(off))
	if off+m < len(p) {
		b[g.L4+13] &^= packet.FIN | packet.PSH
	}
	if g.Flags&packet.URG != 0 {
		if int(g.Urg) > off {
			binary.BigEndian.PutUint16(b[g.L4+18:], g.Urg-uint16(off))
		} else {
			b[g.L4+13] &^= packet.URG
		}
	}
	packet.FullChecksum(b, g.L3, g.L4, g.V6)
	return b
}

func (s *sim) markCE(g *packet.Segment) {
	if g.V6 {
		g.Frame[g.L3+1] |= 0x30
	} else {
		g.Frame[g.L3+1] |= 3
		packet.PutIPv4Checksum(g.Frame[g.L3:g.L4])
	}
}

func (s *sim) journey(from int, b []byte) {
	c := &s.sc.net[from]
	d := c.delay
	if c.jitter > 0 && s.chance(c.reorder) {
		d += time.Duration(s.rng.Int64N(int64(c.jitter)))
	}
	if s.chance(c.dup) {
		x := s.getBuf(len(b))
		copy(x, b)
		s.schedule(from, x, d+time.Duration(s.rng.Int64N(int64(c.jitter+1))))
	}
	if s.chance(c.stale) {
		x := s.getBuf(len(b))
		copy(x, b)
		s.schedule(from, x, time.Second+time.Duration(s.rng.Int64N(int64(20*time.Second))))
	}
	s.schedule(from, b, d)
}

func (s *sim) schedule(from int, b []byte, d time.Duration) {
	s.events.push(simEvent{at: s.now + d, ord: s.nextOrd(), node: 1 - from, buf: b})
}

// tooBig answers a packet that does not fit the path.
func (s *sim) tooBig(to int, g *packet.Segment, mtu int) {
	emb := g.Frame[g.L3:min(len(g.Frame), g.L4+packet.TCPLen)]
	b := append(s.getBuf(0), g.Frame[:g.L3]...)
	if g.V6 {
		b = append(b, 0x60, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(8+len(emb)))
		b = append(b, 58, 64)
		b = append(b, g.Dst()...)
		b = append(b, g.Src()...)
		b = append(b, 2, 0, 0, 0)
		b = binary.BigEndian.AppendUint32(b, uint32(mtu))
	} else {
		b = append(b, 0x45, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(packet.IPv4Len+8+len(emb)))
		b = append(b, 0, 0, 0, 0, 64, 1, 0, 0)
		b = append(b, g.Dst()...)
		b = append(b, g.Src()...)
		packet.PutIPv4Checksum(b[g.L3:])
		b = append(b, 3, 4, 0, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(mtu))
	}
	l4 := len(b) - 8
	b = append(b, emb...)
	packet.ICMPChecksum(b, g.L3, l4, g.V6)
	s.events.push(simEvent{at: s.now + s.sc.net[to].delay, ord: s.nextOrd(), node: to, buf: b})
}

// mergeRun joins consecutive segments of a queue as GRO does. i is left at the
// last one taken.
func (s *sim) mergeRun(q [][]byte, i *int) []byte {
	var a, b packet.Segment
	p := q[*i]
	if packet.Parse(p, packet.FromOuter, &a) != nil || !a.ChecksumOK(s.sc.virtual) || a.Len() == 0 || a.Flags&^packet.PSH != packet.ACK {
		return p
	}
	seq := a.Seq + uint32(a.Len())
	data := append(s.getBuf(bigBuf)[:0], a.Payload()...)
	n := 0
	for *i+1 < len(q) {
		if packet.Parse(q[*i+1], packet.FromOuter, &b) != nil || !b.ChecksumOK(s.sc.virtual) || b.Len() == 0 || b.Flags&^(packet.PSH|packet.FIN) != packet.ACK ||
			b.Key != a.Key || b.Seq != seq || b.TOS != a.TOS || len(b.Options()) != len(a.Options()) || b.Ack != a.Ack || b.Wnd != a.Wnd ||
			b.TSval != a.TSval || b.TSecr != a.TSecr || b.NSACK > 0 || len(data)+b.Len() > 60000 {
			break
		}
		data = append(data, b.Payload()...)
		seq += uint32(b.Len())
		p[a.L4+13] |= b.Flags
		*i++
		n++
	}
	if n == 0 {
		s.putBuf(data)
		return p
	}
	out := packet.Rewrite(s.getBuf(bigBuf)[:0], &a, a.Options(), data)
	packet.FullChecksum(out, a.L3, a.L4, a.V6)
	s.putBuf(data)
	s.putBuf(p)
	return out
}

// deliver puts a packet into a node's receive queue.
func (s *sim) deliver(node int, b []byte, forged bool) {
	n := s.nodes[node]
	var g packet.Segment
	if err := packet.Parse(b, packet.FromOuter, &g); err == packet.ErrNotTCP && s.sc.lives {
		n.icmpToModel(b, true)
	} else if err == nil {
		if f := n.flows[g.Key]; f != nil && g.ChecksumOK(s.sc.virtual) {
			f.wire[1-node].arrived(&g, forged)
			if s.sc.lives && !n.takesOuter(&g) {
				n.plainIn(b, &g)
				return
			}
			if !f.up[node] && !s.sc.lives {
				if g.Flags&packet.FIN != 0 {
					f.fin[node] = b
				} else {
					s.putBuf(b)
				}
				return
			}
		}
	}
	n.outer = append(n.outer, b)
	n.wake()
}
