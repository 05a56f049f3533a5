package slowpath

import (
	"io"
	"slices"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// offer considers a SYN of the inner stack and gives it an ENO option when the
// flow is eligible (design section 5).
func (m *Machine) offer(s *packet.Segment) {
	o := readSYNOptions(s.Options())
	eno, reason := m.eligible(s, &o)
	if reason != "" {
		m.plainSYN(s, packet.FromInner, reason)
		return
	}
	f := &flow{
		key: s.Key, active: true, phase: phaseOffered, since: m.now, expires: m.now + offerIdle,
		iss: s.Seq, local: o, localENO: eno, innerWnd: int(s.Wnd),
	}
	f.outer.Learn(s)
	learnReverse(&f.inner, s, packet.FromInner)
	m.add(f)
	m.count(countOffered)
	m.sendSYN(f, s)
}

// eligible returns the ENO option to offer, or why there cannot be one.
func (m *Machine) eligible(s *packet.Segment, o *synOptions) (eno []byte, reason string) {
	switch {
	case m.cfg.Ports != nil && !m.cfg.Ports(s.Key.LPort, s.Key.RPort):
		return nil, ReasonPolicy
	case s.Len() > 0:
		return nil, ReasonSYNData
	case o.tfo || o.conflict || o.enos > 0:
		return nil, ReasonOptionConflict
	case !m.cfg.Require && m.peers.has(&s.Key, m.now):
		return nil, ReasonRemembered
	case len(m.flows) >= m.cfg.MaxHalfOpen:
		return nil, ReasonLimit
	}
	// Where space is short the least preferred TEPs stay out.
	for n := len(m.cfg.TEPs); n > 0; n-- {
		eno = AppendOffer(nil, m.cfg.TEPs[:n])
		if _, ok := (&optionEdit{eno: eno}).apply(s.Options()); ok {
			return eno, ""
		}
	}
	return nil, ReasonNoRoom
}

// sendSYN sends a copy of the inner SYN with the flow's ENO option.
func (m *Machine) sendSYN(f *flow, s *packet.Segment) {
	opts, ok := (&optionEdit{eno: f.localENO}).apply(s.Options())
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
			m.report(f.info(), StateFailed, ReasonNoAnswer)
		}
		m.offer(s)
	case s.Flags&(packet.SYN|packet.ACK) == packet.SYN:
		m.synCopy(f, s)
	case s.Flags&packet.RST != 0:
		if f.phase == phaseExchange {
			m.bury(f, fateDead)
			m.resetOuter(f)
			m.report(f.info(), StateFailed, ReasonRefused)
			return
		}
		m.refused(f, s, packet.FromInner)
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
		if f.sent < maxSYNs-1 || m.cfg.Require {
			m.sendSYN(f, s)
		} else {
			m.plainCopy(f, s)
		}
	case phasePlainSYN:
		m.plainCopy(f, s)
	}
	f.expires = m.now + offerIdle
}

// activeOuter takes a segment from the peer of an active opener.
func (m *Machine) activeOuter(f *flow, s *packet.Segment) {
	if f.phase == phaseExchange {
		m.exchange(f, s)
		return
	}
	switch {
	case s.Flags&packet.ACK != 0 && s.Ack != f.iss+1:
		// Of an older connection: the reset lets the peer forget that one.
		m.count(dropUnacceptable)
		if s.Flags&packet.RST == 0 {
			m.count(countResets)
			m.answer(f.key, packet.FromOuter, reset(s, packet.FromOuter))
		}
	case s.Flags&packet.RST != 0:
		if s.Flags&packet.ACK == 0 {
			m.count(dropUnacceptable)
			return
		}
		m.refused(f, s, packet.FromOuter)
	case s.Flags&packet.SYN == 0:
		m.count(dropUnacceptable)
	case s.Flags&packet.ACK == 0:
		// Both sides are active openers with b = 0 (RFC 8547 section 4.3).
		f.irs = s.Seq
		m.toPlain(f, s, packet.FromOuter, ReasonSimultaneous)
	case f.phase == phasePlainSYN:
		o := readSYNOptions(s.Options())
		if o.enos == 0 {
			m.remember(f)
		}
		m.bury(f, fatePlain)
		m.passPlain(s, packet.FromOuter)
		m.emit(Action{Kind: Undivert, Key: f.key})
	default:
		m.synAck(f, s)
	}
}

// synAck takes the first acceptable SYN-ACK.
func (m *Machine) synAck(f *flow, s *packet.Segment) {
	f.irs = s.Seq
	f.remote = readSYNOptions(s.Options())
	f.inner.Learn(s)
	f.tsOK = f.local.ts && f.remote.ts
	f.tsRemote = s.TSval

	sub, reason := m.negotiated(f)
	edit := optionEdit{mss: m.shownMSS(&f.remote, s.V6)}
	opts, ok := edit.apply(s.Options())
	if reason == "" && !ok {
		reason = ReasonNoRoom
	}
	if reason != "" {
		if m.cfg.RememberPlainFor > 0 {
			m.peers.add(&f.key, m.now+m.cfg.RememberPlainFor)
		}
		m.toPlain(f, s, packet.FromOuter, reason)
		return
	}
	f.phase = phaseExchange
	f.tep, f.tepByte = sub.TEP, sub.Byte()
	f.release = rewriteSYN(s, opts)
	f.ecnOK = f.ecnSYN && s.Flags&(packet.ECE|packet.CWR) == packet.ECE
	f.edge = int(s.Wnd)
	m.startExchange(f)

	if err := m.makeInit1(f); err != nil {
		m.abort(f, ReasonNoRandom)
		return
	}
	m.report(f.info(), StateNegotiating, "")
	// The first ACK stands alone: its loss, or that of Init1, costs nothing
	// more, and a middlebox sees an ordinary handshake (decision 12).
	m.sendAck(f)
	m.pump(f, false)
	m.arm(f)
}

// negotiated applies the rules of an active opener to the options of both SYNs
// (RFC 8547 sections 4.4 to 4.6).
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
	return NegotiatedTEP(&ours, &theirs)
}

func (m *Machine) makeInit1(f *flow) error {
	key, err := crypto.GenerateKey(f.tep, m.rand)
	if err != nil {
		return err
	}
	f.priv = key
	msg := crypto.Init1{Ciphers: m.cfg.AEADs, Pub: key.Public(false)}
	if _, err := io.ReadFull(m.rand, msg.Nonce[:]); err != nil {
		return err
	}
	f.nonceA = msg.Nonce
	f.init = msg.Append(nil)
	return nil
}

// finishActive takes the whole Init2 and completes the key agreement. It
// returns a Reason constant when the flow has to be aborted.
func (m *Machine) finishActive(f *flow, init2 []byte) (sess *crypto.Session, reason string) {
	msg, err := crypto.ParseInit2(f.tep, init2)
	if err != nil {
		return nil, initReason(err)
	}
	if !slices.Contains(m.cfg.AEADs, msg.Cipher) {
		return nil, ReasonCipherUnoffered
	}
	es, _, err := f.priv.Shared(msg.Pub)
	if err != nil {
		return nil, initReason(err)
	}
	sess = crypto.NewSession(crypto.RoleA, msg.Cipher, f.tepByte,
		Transcript(f.localENO, f.remote.option()), f.init, init2, f.nonceA[:], es)
	clear(es)
	return sess, ""
}
