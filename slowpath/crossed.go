package slowpath

import (
	"bytes"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// crossing takes the SYN of a peer that opens the connection, too (RFC 8547
// section 4.3, figure 12). Its ENO option is the one that counts; that of its
// SYN-ACK is the same.
func (m *Machine) crossing(f *flow, s *packet.Segment) {
	m.learnSYN(f, s)
	sub, reason := m.negotiated(f)
	if reason == ReasonRoleConflict {
		reason = ReasonSimultaneous
	}
	opts, ok := m.inwardSYN(s, &f.remote).apply(s.Options())
	if reason == "" && !ok {
		reason = ReasonNoRoom
	}
	if reason != "" {
		m.toPlain(f, s, packet.FromOuter, reason)
		return
	}
	f.phase, f.crossed = phaseCrossed, true
	if f.ticket != nil && !sub.V {
		// The peer did not refuse: it knew nothing of the proposal.
		f.ticket.secret.Erase()
		f.ticket = nil
	}
	m.chosen(f, sub)
	f.expires = m.now + answerIdle
	ecn := f.ecnSYN
	f.inward = bytes.Clone(m.sendInward(f, s, opts))
	f.ecnOK = ecn && f.ecnSYN
}

// answerCrossed adds ENO to the inner stack's SYN-ACK: the option of its SYN.
func (m *Machine) answerCrossed(f *flow, s *packet.Segment) {
	if !m.recordSYNACK(f, s) {
		m.toPlain(f, s, packet.FromInner, ReasonNoRoom)
		return
	}
	f.inward = nil
	m.emit(Action{Kind: Guard, Key: f.key})
	m.resendSYNACK(f)
	if early := f.early; early != nil {
		f.early = nil
		var e packet.Segment
		if packet.Parse(early, packet.FromOuter, &e) == nil {
			m.crossedOuter(f, &e)
		}
	}
}

// crossedOuter takes a segment after both SYNs crossed. Encryption is on when
// an ACK with ENO was sent and one was received (RFC 8547 section 4.6).
func (m *Machine) crossedOuter(f *flow, s *packet.Segment) {
	off := int(packet.SeqDiff(s.Seq, f.irs+1))
	isSYNACK := s.Flags&(packet.SYN|packet.ACK) == packet.SYN|packet.ACK
	switch {
	case s.Flags&packet.RST != 0 && off == 0:
		m.refused(f, s, packet.FromOuter)
	case s.Flags&(packet.SYN|packet.ACK) == packet.SYN && s.Seq == f.irs:
		o := readSYNOptions(s.Options())
		if reason := withdrawn(&o); reason != "" {
			m.toPlain(f, s, packet.FromOuter, reason)
		} else if f.synack != nil {
			m.resendSYNACK(f)
		}
	case s.Flags&packet.ACK == 0, s.Ack != f.iss+1,
		f.tsOK && s.HasTS && packet.TSOlder(s.TSval, f.tsRemote),
		isSYNACK && s.Seq != f.irs,
		!isSYNACK && (s.Flags&packet.SYN != 0 || off < 0 || off > f.rxEdge),
		s.Flags&packet.RST != 0:
		m.count(dropUnacceptable)
	case f.synack == nil:
		f.early = bytes.Clone(s.Frame)
	case isSYNACK:
		o := readSYNOptions(s.Options())
		if o.enos != 1 || !bytes.Equal(o.option(), f.remote.option()) {
			m.toPlain(f, s, packet.FromOuter, ReasonNoENOInAck)
			return
		}
		f.release = m.finalAck(f, s)
		f.edge = int(s.Wnd)
		// Ours may have been lost, and the peer may wait for a SYN-ACK with ENO,
		// as figure 12 of RFC 8547 has it, and take a segment without SYN that
		// comes before it for one of a plain connection.
		m.emit(Action{Kind: SendOuter, Key: f.key, Frame: bytes.Clone(f.synack)})
		if f.role() == crypto.RoleB {
			// Ours may have been lost. Afterwards the flow may be the fast
			// path's.
			m.sendAck(f)
		}
		m.startExchange(f)
	case !hasENO(s.Options()):
		m.toPlain(f, s, packet.FromOuter, ReasonNoENOInAck)
	default:
		f.release = m.finalAck(f, s)
		f.edge = f.scaled(s.Wnd)
		f.heard = true
		m.startExchange(f)
		m.begun(f, s)
	}
}
