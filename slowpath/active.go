package slowpath

import (
	"bytes"
	"io"
	"slices"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// offer considers a SYN of the inner stack and gives it an ENO option when the
// flow is eligible (design section 5).
func (m *Machine) offer(s *packet.Segment) {
	f := &flow{
		key: s.Key, active: true, policy: m.policy(&s.Key, packet.FromInner), phase: phaseOffered,
		since: m.now, expires: m.now + offerIdle,
		iss: s.Seq, local: readSYNOptions(s.Options()), innerWnd: int(s.Wnd),
	}
	if reason := m.eligible(f, s); reason != "" {
		m.plainSYN(s, packet.FromInner, reason)
		return
	}
	if reason := m.makeOffer(f, s); reason != "" {
		m.plainSYN(s, packet.FromInner, reason)
		return
	}
	f.outer.Learn(s)
	learnReverse(&f.inner, s, packet.FromInner)
	m.add(f)
	m.count(countOffered)
	if f.ticket == nil {
		m.want(f, m.cfg.TEPs[0])
	}
	m.sendSYN(f, s)
}

// eligible returns why a SYN of the inner stack cannot offer encryption.
func (m *Machine) eligible(f *flow, s *packet.Segment) (reason string) {
	switch {
	case f.policy.Verdict == Plain:
		return ReasonPolicy
	case s.Len() > 0:
		return ReasonSYNData
	case f.local.tfo || f.local.conflict || f.local.legacy || f.local.enos > 0:
		return ReasonOptionConflict
	case f.policy.Verdict != Require && m.peers.has(&s.Key, m.now):
		return ReasonRemembered
	case len(m.flows) >= m.cfg.MaxHalfOpen:
		return ReasonLimit
	}
	return m.room()
}

// makeOffer makes the flow's ENO option: resumption when a secret is there, and
// fresh key agreement. Where space is short the least preferred TEPs stay out.
func (m *Machine) makeOffer(f *flow, s *packet.Segment) (reason string) {
	var resume Suboption
	if m.cfg.Cache != nil && !f.policy.NoResume && !f.policy.PassiveRole {
		if f.ticket = m.cfg.Cache.propose(&f.key, m.usable, m.now); f.ticket != nil {
			nonce, err := m.resumeNonce()
			if err != nil {
				m.cfg.Cache.keep(f.ticket)
				return ReasonNoRandom
			}
			f.nonce, resume = nonce, f.ticket.suboption(nonce)
		}
	}
	global := f.policy.global()
	fits := func(n int, resume Suboption) bool {
		f.localENO = AppendOffer(nil, global, m.cfg.TEPs[:n], resume)
		_, ok := (&optionEdit{eno: f.localENO}).apply(s.Options())
		return ok
	}
	for n := len(m.cfg.TEPs); n >= 0 && f.ticket != nil; n-- {
		if fits(n, resume) {
			m.count(countProposed)
			return ""
		}
	}
	if f.ticket != nil {
		m.cfg.Cache.keep(f.ticket)
		f.ticket, f.nonce = nil, nil
	}
	for n := len(m.cfg.TEPs); n > 0; n-- {
		if fits(n, Suboption{}) {
			return ""
		}
	}
	return ReasonNoRoom
}

// usable reports whether a session of such a key exchange may be resumed.
func (m *Machine) usable(t crypto.TEP, a crypto.AEAD) bool {
	return slices.Contains(m.cfg.TEPs, t) && slices.Contains(m.cfg.AEADs, a)
}

// resumeNonce draws a nonce when the SYN is made, so that a clone of this
// machine draws another one (T23).
func (m *Machine) resumeNonce() ([]byte, error) {
	n := make([]byte, m.cfg.ResumeNonce)
	_, err := io.ReadFull(m.rand, n)
	return n, err
}

// sendSYN sends a copy of the inner SYN with the flow's ENO option.
func (m *Machine) sendSYN(f *flow, s *packet.Segment) {
	opts, ok := (&optionEdit{mss: m.announcedMSS(&f.local, s.V6), eno: f.localENO}).apply(s.Options())
	if !ok {
		m.plainCopy(f, s)
		return
	}
	frame := rewriteSYN(s, opts)
	f.rxEdge = capWindow(frame, s.L4)
	f.ecnSYN = s.Flags&(packet.ECE|packet.CWR) == packet.ECE|packet.CWR
	f.tsLocal = s.TSval
	f.noteSent(m.now)
	m.send(f.key, packet.FromInner, frame)
}

// plainCopy sends a copy of the inner SYN without ENO, which an active opener
// may do unilaterally (RFC 8547 section 4.6). The flow stays diverted until its
// answer shows whether it was ENO that did not pass.
func (m *Machine) plainCopy(f *flow, s *packet.Segment) {
	if f.phase != phasePlainSYN {
		f.phase = phasePlainSYN
		// Perhaps the answer comes by another interface, where the guard
		// has held it up.
		m.emit(Action{Kind: Unguard, Key: f.key})
		m.report(f.info(), StatePlain, ReasonSYNRetries)
	}
	m.send(f.key, packet.FromInner, copyFrame(s))
}

// activeInner takes a segment of the inner stack of an active opener, which is
// in SYN-SENT.
func (m *Machine) activeInner(f *flow, s *packet.Segment) {
	switch {
	case s.Flags&(packet.SYN|packet.ACK) == packet.SYN && s.Seq != f.iss:
		// The socket is gone and another one uses the ports.
		if f.phase == phaseExchange {
			m.resetOuter(f)
		}
		m.remove(f)
		m.emit(Action{Kind: Undivert, Key: f.key})
		if f.phase != phasePlainSYN {
			m.report(f.info(), StateFailed, f.noAnswer())
		}
		m.offer(s)
	case s.Flags&(packet.SYN|packet.ACK) == packet.SYN:
		m.synCopy(f, s)
	case s.Flags&(packet.SYN|packet.ACK) == packet.SYN|packet.ACK && f.phase == phaseCrossed && s.Ack == f.irs+1:
		m.answerCrossed(f, s)
	case s.Flags&(packet.RST|packet.ACK) == packet.RST && s.Seq != f.iss+1 && (f.phase == phaseOffered || f.phase == phasePlainSYN):
		// It answers what was passed on, and stays in SYN-SENT.
		m.count(countResets)
		m.send(f.key, packet.FromInner, copyFrame(s))
	case s.Flags&packet.RST != 0:
		if f.phase == phaseExchange {
			m.bury(f, fateDead)
			m.resetOuter(f)
			m.report(f.info(), StateFailed, ReasonRefused)
			return
		}
		m.refused(f, s, packet.FromInner)
	case f.phase == phaseOffered && s.Flags&packet.ACK != 0:
		// It is not in SYN-SENT any more: a SYN without ENO crossed ours and
		// reached it before the flow was diverted.
		m.toPlain(f, s, packet.FromInner, ReasonSimultaneous)
	case f.phase == phasePlainSYN && s.Flags&packet.ACK != 0:
		// The answer came past this interface, where encryption cannot be
		// agreed on: the next connection does without at once.
		m.remember(f)
		m.bury(f, fatePlain)
		m.passPlain(s, packet.FromInner)
		m.emit(Action{Kind: Undivert, Key: f.key})
	default:
		m.count(dropInner)
	}
}

// synCopy treats a retransmission of the inner SYN.
func (m *Machine) synCopy(f *flow, s *packet.Segment) {
	switch f.phase {
	case phaseExchange:
		// The answer is held back until the keys are there (T18).
		m.count(countAbsorbed)
		f.tsLocal = s.TSval
		return
	case phaseOffered:
		if f.sent < maxSYNs-1 || f.policy.Verdict == Require {
			m.sendSYN(f, s)
		} else {
			m.plainCopy(f, s)
		}
	case phasePlainSYN:
		m.plainCopy(f, s)
	case phaseCrossed:
		// The peer's SYN did not arrive.
		if f.inward != nil {
			m.send(f.key, packet.FromOuter, bytes.Clone(f.inward))
		}
		return
	}
	f.expires = m.now + offerIdle
}

// activeOuter takes a segment from the peer of an active opener.
func (m *Machine) activeOuter(f *flow, s *packet.Segment) {
	switch f.phase {
	case phaseExchange:
		m.exchange(f, s)
		return
	case phaseCrossed:
		m.crossedOuter(f, s)
		return
	}
	switch {
	case s.Flags&packet.ACK != 0 && s.Ack != f.iss+1:
		if s.Flags&packet.RST != 0 {
			m.count(dropUnacceptable)
			return
		}
		// Of an older connection, for which the inner stack has a reset that
		// lets the peer forget it; or of one that was opened past this flow
		// while its SYN was on the way here.
		m.count(countAsked)
		m.passPlain(s, packet.FromOuter)
	case s.Flags&packet.RST != 0:
		if s.Flags&packet.ACK == 0 {
			m.count(dropUnacceptable)
			return
		}
		m.refused(f, s, packet.FromOuter)
	case s.Flags&packet.SYN == 0:
		m.count(dropUnacceptable)
	case f.phase == phasePlainSYN:
		if o := readSYNOptions(s.Options()); o.enos != 0 {
			m.peers.trust(&f.key)
		} else if s.Flags&packet.ACK != 0 {
			m.peers.suspect(&f.key, m.now, m.cfg.RememberFor)
		}
		m.bury(f, fatePlain)
		m.passPlain(s, packet.FromOuter)
		m.emit(Action{Kind: Undivert, Key: f.key})
	case s.Flags&packet.ACK == 0:
		m.crossing(f, s)
	default:
		m.synAck(f, s)
	}
}

// learnSYN takes what the peer's SYN or SYN-ACK says.
func (m *Machine) learnSYN(f *flow, s *packet.Segment) {
	f.irs = s.Seq
	f.remote = readSYNOptions(s.Options())
	f.inner.Learn(s)
	f.tsOK = f.local.ts && f.remote.ts
	f.tsRemote = s.TSval
}

// synAck takes the first acceptable SYN-ACK.
func (m *Machine) synAck(f *flow, s *packet.Segment) {
	m.learnSYN(f, s)
	sub, reason := m.negotiated(f)
	edit := optionEdit{mss: m.shownMSS(&f.remote, s.V6)}
	opts, ok := edit.apply(s.Options())
	if reason == "" && !ok {
		reason = ReasonNoRoom
	}
	if reason != "" {
		if f.ticket != nil {
			// Perhaps the peer only takes a TEP for which there was no room.
			m.cfg.Cache.refused(f.ticket)
			f.ticket = nil
		}
		if m.cfg.RememberPlainFor > 0 {
			m.peers.add(&f.key, m.now+m.cfg.RememberPlainFor)
		}
		m.toPlain(f, s, packet.FromOuter, reason)
		return
	}
	m.peers.trust(&f.key)
	m.chosen(f, sub)
	f.release = rewriteSYN(s, opts)
	f.ecnOK = f.ecnSYN && s.Flags&(packet.ECE|packet.CWR) == packet.ECE
	f.edge = int(s.Wnd)
	m.startExchange(f)
}

// chosen notes the negotiated suboption.
func (m *Machine) chosen(f *flow, sub Suboption) {
	f.tep, f.tepByte = sub.TEP, sub.Byte()
	if f.ticket == nil {
		return
	}
	if sub.V {
		f.resume, f.theirs = true, sub.Data[crypto.ResumeLen:]
		return
	}
	m.count(countRefused)
	m.cfg.Cache.refused(f.ticket)
	f.ticket = nil
}

// beginExchange starts the key exchange of role A.
func (m *Machine) beginExchange(f *flow) {
	// The first ACK stands alone: its loss, or that of Init1, costs nothing
	// more, and a middlebox sees an ordinary handshake (decision 12).
	m.sendAck(f)
	if reason := m.agree(f, nil); reason != "" {
		m.abort(f, reason)
	}
}

// sendInit1 sends Init1 when there is a key to put into it. It returns a Reason
// constant when the flow has to be aborted.
func (m *Machine) sendInit1(f *flow) (reason string) {
	msg := crypto.Init1{Ciphers: m.cfg.AEADs, Pub: f.priv.Public(false)}
	if _, err := io.ReadFull(m.rand, msg.Nonce[:]); err != nil {
		return ReasonNoRandom
	}
	f.nonceA = msg.Nonce
	f.init = msg.Append(nil)
	m.pump(f, false)
	m.arm(f)
	// A peer may have sent something that is not an answer to it.
	return m.progress(f)
}

// negotiated applies the rules of an active opener to the options of both SYNs
// (RFC 8547 sections 4.3 to 4.6).
func (m *Machine) negotiated(f *flow) (sub Suboption, reason string) {
	switch {
	case f.remote.enos == 0:
		return sub, ReasonPeerNoENO
	case f.remote.enos > 1:
		return sub, ReasonDuplicateENO
	}
	ours, err := ParseENO(f.localENO)
	if err != nil {
		return sub, ReasonIllFormed
	}
	theirs, err := ParseENO(f.remote.option())
	if err != nil {
		return sub, ReasonIllFormed
	}
	f.aware = theirs.AppAware()
	if f.role() == crypto.RoleB {
		sub, reason = NegotiatedTEP(&theirs, &ours, nil)
	} else {
		sub, reason = NegotiatedTEP(&ours, &theirs, f.expectedHalf())
	}
	if reason == "" && f.policy.AppAware == AppAwareMandatory && !f.aware {
		reason = ReasonNotAppAware
	}
	return sub, reason
}

// expectedHalf is the half of the identifier with which the peer agrees to the
// proposed resumption.
func (f *flow) expectedHalf() []byte {
	if f.ticket == nil {
		return nil
	}
	return f.ticket.theirs[:]
}
