package slowpath

import (
	"bytes"
	"encoding/binary"
	"slices"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// accept considers a SYN from the wire. The inner stack never sees its ENO
// option, and no data of a SYN that carries one (RFC 8547 section 4.7).
func (m *Machine) accept(s *packet.Segment) {
	f := &flow{
		key: s.Key, policy: m.policy(&s.Key, packet.FromOuter), phase: phaseListen, since: m.now, expires: m.now + offerIdle,
		irs: s.Seq, remote: readSYNOptions(s.Options()), tsRemote: s.TSval,
	}
	f.wasPlain = m.cfg.Orphan != nil && !m.cfg.Orphan(s.Key)
	opts, ok := m.inwardSYN(s, &f.remote).apply(s.Options())
	offer, reason := m.acceptable(f)
	if reason == "" && !ok {
		reason = ReasonNoRoom
	}
	if reason == "" {
		reason = m.makeAnswer(f, &offer)
	}
	if reason != "" {
		m.plainSYN(s, packet.FromOuter, reason)
		return
	}
	f.inner.Learn(s)
	learnReverse(&f.outer, s, packet.FromOuter)
	m.add(f)
	m.sendInward(f, s, opts)
}

// inwardSYN says how the SYN has to be changed for the inner stack. Fast Open
// goes too: it would let the inner stack send before encryption is decided.
func (m *Machine) inwardSYN(s *packet.Segment, o *synOptions) *optionEdit {
	return &optionEdit{mss: m.shownMSS(o, s.V6), tfo: true}
}

func (m *Machine) sendInward(f *flow, s *packet.Segment, opts []byte) (syn []byte) {
	f.ecnSYN = s.Flags&(packet.ECE|packet.CWR) == packet.ECE|packet.CWR
	syn = rewriteSYN(s, opts)
	m.send(f.key, packet.FromOuter, syn)
	return syn
}

// acceptable returns what the peer offers, or why ENO is disabled (RFC 8547
// sections 4.1, 4.4 to 4.6).
func (m *Machine) acceptable(f *flow) (offer ENO, reason string) {
	switch {
	case f.policy.Verdict == Plain:
		return offer, ReasonPolicy
	case f.remote.enos == 0:
		return offer, ReasonPeerNoENO
	case f.remote.enos > 1:
		return offer, ReasonDuplicateENO
	case f.remote.conflict:
		return offer, ReasonOptionConflict
	}
	offer, err := ParseENO(f.remote.option())
	if err != nil {
		return offer, ReasonIllFormed
	}
	f.aware = offer.AppAware()
	if _, reason = ChooseTEP(&offer, m.cfg.TEPs); reason != "" {
		return offer, reason
	}
	switch {
	case f.policy.AppAware == AppAwareMandatory && !f.aware:
		return offer, ReasonNotAppAware
	case m.Crowded():
		return offer, ReasonLimit
	}
	return offer, m.room()
}

// makeAnswer makes the flow's ENO option: resumption, which wins over the order
// of preference, or else fresh key agreement (decision 6).
func (m *Machine) makeAnswer(f *flow, offer *ENO) (reason string) {
	if m.cfg.Cache == nil || f.policy.NoResume {
		return m.answerFresh(f, offer)
	}
	for _, s := range offer.Subs {
		if _, once := offer.offer(s.TEP); !once || !isResumption(s) {
			continue
		}
		t := m.cfg.Cache.reserve(s.Data[:crypto.ResumeLen], s.TEP, m.usable, m.now)
		if t == nil {
			m.count(countUnknown)
			continue
		}
		nonce, err := m.resumeNonce()
		if err != nil {
			m.cfg.Cache.restore(t)
			return ReasonNoRandom
		}
		f.ticket, f.resume, f.nonce, f.theirs = t, true, nonce, slices.Clone(s.Data[crypto.ResumeLen:])
		m.answerWith(f, t.suboption(nonce))
		return ""
	}
	return m.answerFresh(f, offer)
}

// answerFresh makes the ENO option that asks for a fresh key exchange.
func (m *Machine) answerFresh(f *flow, offer *ENO) (reason string) {
	if f.ticket != nil {
		m.cfg.Cache.restore(f.ticket)
		f.ticket, f.nonce, f.theirs, f.resume = nil, nil, nil, false
	}
	tep, reason := ChooseTEP(offer, m.cfg.TEPs)
	for teps := m.cfg.TEPs; reason == "" && !m.costly.take(tep, m.now); {
		exhausted := tep
		teps = slices.DeleteFunc(slices.Clone(teps), func(t crypto.TEP) bool { return t == exhausted })
		if tep, reason = ChooseTEP(offer, teps); reason != "" {
			return ReasonLimit
		}
	}
	if reason != "" {
		return reason
	}
	m.answerWith(f, Suboption{TEP: tep})
	return ""
}

// answerWith makes the ENO option that chooses sub.
func (m *Machine) answerWith(f *flow, sub Suboption) {
	f.tep, f.tepByte = sub.TEP, sub.Byte()
	f.localENO = AppendAnswer(nil, f.policy.aware(), sub)
}

// passiveInner takes a segment of the inner stack of a passive opener.
func (m *Machine) passiveInner(f *flow, s *packet.Segment) {
	isSYNACK := s.Flags&(packet.SYN|packet.ACK) == packet.SYN|packet.ACK
	switch {
	case s.Flags&packet.RST != 0 && f.phase == phaseExchange:
		m.bury(f, fateDead)
		m.resetOuter(f)
		m.report(f.info(), StateFailed, ReasonRefused)
	case s.Flags&packet.RST != 0 && f.phase == phaseListen && (s.Flags&packet.ACK == 0 || s.Ack != f.irs+1):
		// Of the socket of an older connection.
		m.count(dropInner)
	case s.Flags&packet.RST != 0:
		m.refused(f, s, packet.FromInner)
	case isSYNACK && s.Ack == f.irs+1 && f.phase == phaseListen:
		m.answerSYN(f, s)
	case isSYNACK && s.Ack == f.irs+1 && s.Seq == f.iss:
		m.synAckCopy(f, s)
	case f.phase == phaseListen && s.Flags&(packet.SYN|packet.ACK) == packet.SYN:
		m.toPlain(f, s, packet.FromInner, ReasonSimultaneous)
	case f.phase == phaseListen && s.Flags&(packet.SYN|packet.ACK) == packet.ACK && (f.wasPlain || s.Len() == 0 && s.Flags&packet.FIN == 0):
		// The socket of an older connection, which is plain, lives. An honest
		// peer has forgotten it, will reset it and try again. But the SYN may
		// be a late copy, or made up: it must not hold the connection up.
		f.strayAck, f.hasStray = s.Ack, true
		m.send(f.key, packet.FromInner, copyFrame(s))
	default:
		m.count(dropInner)
	}
}

// answerSYN adds ENO to the inner stack's SYN-ACK.
func (m *Machine) answerSYN(f *flow, s *packet.Segment) {
	f.iss = s.Seq
	f.local = readSYNOptions(s.Options())
	f.innerWnd = int(s.Wnd)
	f.outer.Learn(s)
	f.tsOK = f.local.ts && f.remote.ts
	f.ecnOK = f.ecnSYN && s.Flags&(packet.ECE|packet.CWR) == packet.ECE
	f.phase = phaseAnswered
	ok := m.recordSYNACK(f, s)
	if !ok && f.resume {
		if offer, err := ParseENO(f.remote.option()); err == nil && m.answerFresh(f, &offer) == "" {
			ok = m.recordSYNACK(f, s)
		}
	}
	if !ok {
		m.toPlain(f, s, packet.FromInner, ReasonNoRoom)
		return
	}
	m.count(countAnswered)
	if !f.resume {
		m.want(f, f.tep)
	}
	m.emit(Action{Kind: Guard, Key: f.key})
	m.resendSYNACK(f)
	f.expires = m.now + m.answerPatience()
}

// answerPatience is how long the first ACK is awaited: less when many are, which
// may be a flood of SYNs.
func (m *Machine) answerPatience() time.Duration {
	if m.pressed() {
		return answerPressed
	}
	return answerIdle
}

func (m *Machine) pressed() bool { return 8*len(m.flows) >= m.cfg.MaxHalfOpen }

// recordSYNACK makes the outer form of a SYN-ACK; false when ENO finds no room.
func (m *Machine) recordSYNACK(f *flow, s *packet.Segment) bool {
	opts, ok := (&optionEdit{mss: m.announcedMSS(&f.local, s.V6), eno: f.localENO}).apply(s.Options())
	if !ok {
		return false
	}
	f.tsLocal = s.TSval
	f.synack = rewriteSYN(s, opts)
	f.rxEdge = max(f.rxEdge, capWindow(f.synack, s.L4))
	return true
}

// resendSYNACK sends the recorded SYN-ACK: same ENO, same ISN (T18).
func (m *Machine) resendSYNACK(f *flow) {
	f.noteSent(m.now)
	m.emit(Action{Kind: SendOuter, Key: f.key, Frame: bytes.Clone(f.synack)})
}

// synAckCopy treats a retransmission of the inner SYN-ACK.
func (m *Machine) synAckCopy(f *flow, s *packet.Segment) {
	if f.phase == phaseExchange {
		// The final ACK is held back until the keys are there (T18).
		m.count(countAbsorbed)
		f.tsLocal = s.TSval
		return
	}
	m.recordSYNACK(f, s)
	m.resendSYNACK(f)
	if p := m.answerPatience(); p == answerIdle {
		f.expires = m.now + p
	}
}

// passiveOuter takes a segment from the peer of a passive opener.
func (m *Machine) passiveOuter(f *flow, s *packet.Segment) {
	isSYN := s.Flags&(packet.SYN|packet.ACK) == packet.SYN
	switch {
	case f.phase == phaseExchange:
		m.exchange(f, s)
	case isSYN && s.Seq == f.irs:
		m.remoteSYNCopy(f, s)
	case isSYN && f.phase == phaseListen:
		// The peer gave the first attempt up, and the inner stack has not
		// answered it.
		m.remove(f)
		m.emit(Action{Kind: Undivert, Key: f.key})
		m.report(f.info(), StateFailed, ReasonNoAnswer)
		m.accept(s)
	case f.phase == phaseListen:
		m.listenOuter(f, s)
	default:
		m.answeredOuter(f, s)
	}
}

// remoteSYNCopy treats a retransmission of the peer's SYN.
func (m *Machine) remoteSYNCopy(f *flow, s *packet.Segment) {
	o := readSYNOptions(s.Options())
	if reason := withdrawn(&o); reason != "" {
		m.toPlain(f, s, packet.FromOuter, reason)
		return
	}
	if f.phase == phaseAnswered {
		m.resendSYNACK(f)
		f.expires = max(f.expires, m.now+m.answerPatience())
		return
	}
	if f.copies++; f.copies >= maxSYNs-1 && m.now-f.since >= initialRTO && f.policy.Verdict != Require {
		// The inner stack may well have answered, by another interface, where
		// the guard drops what it says.
		m.toPlain(f, s, packet.FromOuter, ReasonSYNRetries)
		return
	}
	if opts, ok := m.inwardSYN(s, &o).apply(s.Options()); ok {
		m.sendInward(f, s, opts)
		if s.HasTS && packet.SeqDiff(s.TSval, f.tsRemote) > 0 {
			f.tsRemote = s.TSval
		}
		f.expires = m.now + offerIdle
	}
}

// withdrawn returns why a copy of the peer's SYN disables ENO, which every segment
// up to the first ACK can (RFC 8547 section 4.6); "" if it does not.
func withdrawn(o *synOptions) (reason string) {
	switch o.enos {
	case 0:
		return ReasonSYNRetries
	case 1:
	default:
		return ReasonDuplicateENO
	}
	switch eno, err := ParseENO(o.option()); {
	case err != nil:
		return ReasonIllFormed
	case eno.Vacuous():
		return ReasonVacuous
	}
	return ""
}

// listenOuter takes a segment other than a SYN while the inner stack has not
// answered.
func (m *Machine) listenOuter(f *flow, s *packet.Segment) {
	switch {
	case f.hasStray && s.Flags&(packet.RST|packet.SYN) == 0 && f.wasPlain:
		m.send(f.key, packet.FromOuter, copyFrame(s))
	case s.Flags&packet.RST == 0:
		m.count(dropUnacceptable)
	case s.Seq == f.irs+1:
		m.refused(f, s, packet.FromOuter)
	case f.hasStray && s.Seq == f.strayAck:
		f.hasStray = false
		m.send(f.key, packet.FromOuter, copyFrame(s))
	default:
		m.count(dropUnacceptable)
	}
}

// answeredOuter takes a segment while the first ACK is awaited, which decides
// (RFC 8547 section 4.6). It has to be acceptable to the letter: what a blind
// sender makes up must decide nothing (T12).
func (m *Machine) answeredOuter(f *flow, s *packet.Segment) {
	off := int(packet.SeqDiff(s.Seq, f.irs+1))
	inWindow := off >= 0 && off <= f.rxEdge
	switch {
	case s.Flags&packet.RST != 0 && off == 0:
		m.refused(f, s, packet.FromOuter)
		return
	case s.Flags&packet.RST != 0:
		if inWindow {
			m.challenge(f)
		}
		m.count(dropUnacceptable)
		return
	case s.Flags&packet.SYN != 0, !inWindow,
		f.tsOK && s.HasTS && packet.TSOlder(s.TSval, f.tsRemote):
		m.count(dropUnacceptable)
		m.challenge(f)
		return
	case s.Flags&packet.ACK == 0:
		m.count(dropUnacceptable)
		return
	case s.Ack != f.iss+1:
		m.count(dropUnacceptable)
		m.count(countResets)
		m.answer(f.key, packet.FromOuter, Reset(s, packet.FromOuter))
		return
	}
	if !hasENO(s.Options()) {
		m.toPlain(f, s, packet.FromOuter, ReasonNoENOInAck)
		return
	}
	f.release = m.finalAck(f, s)
	f.edge = f.scaled(s.Wnd)
	m.startExchange(f)
	m.begun(f, s)
}

// begun takes the segment that turned encryption on: it may bring the first
// bytes of the peer's stream.
func (m *Machine) begun(f *flow, s *packet.Segment) {
	switch {
	case m.flows[f.key] == f:
		m.exchange(f, s)
	case f.resume && s.Flags&packet.SYN == 0:
		m.emit(Action{Kind: Reinject, Dir: packet.FromOuter, Key: f.key, Frame: bytes.Clone(s.Frame)})
	}
}

// finalAck makes the pure ACK that ends the inner handshake out of the first
// segment of encryption.
func (m *Machine) finalAck(f *flow, s *packet.Segment) []byte {
	var edit optionEdit
	opts, ok := edit.apply(s.Options())
	if !ok {
		opts = nil
	}
	b := packet.Rewrite(nil, s, opts, nil)
	t := b[s.L4:]
	binary.BigEndian.PutUint32(t[tcpSeq:], f.irs+1)
	t[tcpOffset] &= 0xf0
	t[tcpFlags] = packet.ACK
	if s.Flags&packet.SYN != 0 && f.local.hasWS && f.remote.hasWS {
		// That of a SYN is never scaled.
		binary.BigEndian.PutUint16(t[tcpWindow:], s.Wnd>>f.remote.wscale)
	}
	binary.BigEndian.PutUint16(t[18:], 0)
	return b
}

// capTSval lowers the TSval of a segment to the newest that was accepted in
// order. The inner stack would take what is older for a duplicate (RFC 7323
// section 5), and the peer's earlier segments may be still on their way.
func capTSval(frame []byte, newest uint32) {
	var s packet.Segment
	if packet.Parse(frame, packet.FromOuter, &s) != nil || !s.HasTS || packet.SeqDiff(s.TSval, newest) <= 0 {
		return
	}
	_ = packet.WalkOptions(s.Options(), func(o []byte) bool {
		if o[0] == packet.OptTimestamp && len(o) == 10 {
			binary.BigEndian.PutUint32(o[2:], newest)
		}
		return true
	})
}
