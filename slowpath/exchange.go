package slowpath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"slices"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// Limits of the exchange's deadline.
const (
	deadlineRTTs   = 4  // at least so many round trips (T19)
	deadlineFactor = 10 // but at most so many times the configured deadline
	// With a peer whose segments come, so many times the configured deadline: two
	// losses in a row take 3 s where TCP waits a second at first (RFC 6298).
	deadlineHeard = 3
)

// startExchange turns encryption on: from here on the flow is encrypted or
// failed (invariant 8).
func (m *Machine) startExchange(f *flow) {
	f.phase = phaseExchange
	bound := f.noteAnswered(m.now)
	f.latest = m.now + deadlineFactor*m.cfg.Deadline
	f.expires = min(m.now+max(m.cfg.Deadline, deadlineRTTs*bound), f.latest)
	switch {
	case f.resume:
		sess := f.ticket.session(f.tepByte, f.nonce, f.theirs)
		m.cfg.Cache.served(f.ticket, !f.policy.NoCache)
		f.ticket = nil
		m.count(countResumed)
		m.install(f, sess, nil)
	case f.role() == crypto.RoleA:
		m.report(f.info(), StateNegotiating, "")
		m.beginExchange(f)
	default:
		m.report(f.info(), StateNegotiating, "")
	}
}

// proceeded gives more time to a peer of which something new came, unless so many
// flows are half-open that it may be a flood.
func (m *Machine) proceeded(f *flow) {
	if !m.pressed() {
		f.expires = max(f.expires, min(m.now+deadlineHeard*m.cfg.Deadline, f.latest))
	}
}

// exchange takes a segment of the peer while Init messages are exchanged:
// validity first, then acknowledgement, then data (T12).
func (m *Machine) exchange(f *flow, s *packet.Segment) {
	next := f.rxNext()
	off := int(packet.SeqDiff(s.Seq, f.irs+1))
	n := s.Len()
	inWindow := off >= next && off <= f.rxEdge
	switch {
	case s.Flags&packet.RST != 0:
		m.exchangeReset(f, off == next, inWindow)
		return
	case s.Flags&packet.SYN != 0:
		if f.active && s.Flags&packet.ACK != 0 && s.Seq == f.irs && s.Ack == f.iss+1 && !f.heard {
			// Our ACK was lost, and perhaps Init1 as well (T18).
			m.sendAck(f)
			f.nxt = f.una
			m.pump(f, false)
			m.arm(f)
			return
		}
		m.count(dropUnacceptable)
		m.challenge(f)
		return
	case f.tsOK && s.HasTS && packet.TSOlder(s.TSval, f.tsRemote),
		off > f.rxEdge, off+n < next:
		m.count(dropUnacceptable)
		m.challenge(f)
		return
	case s.Flags&packet.ACK == 0:
		m.count(dropUnacceptable)
		return
	}
	ack := int(packet.SeqDiff(s.Ack, f.iss+1))
	if ack < 0 || ack > f.top {
		m.count(dropUnacceptable)
		m.challenge(f)
		return
	}
	if f.tsOK && s.HasTS && off <= next {
		f.tsRemote = s.TSval
	}
	if !f.heard {
		f.heard = true
		m.proceeded(f)
	}
	if off <= next {
		f.inner.Learn(s)
	}
	m.acknowledged(f, ack, f.scaled(s.Wnd))
	if n > 0 {
		m.data(f, s, off)
		return
	}
	if s.Flags&packet.FIN != 0 && off == next {
		m.ended(f, s)
	}
}

// exchangeReset treats a reset of the peer: exactly at the next byte it counts,
// elsewhere in the window it is challenged (T15).
func (m *Machine) exchangeReset(f *flow, exact, inWindow bool) {
	switch {
	case exact:
		if f.active {
			// It may be a middlebox that lets ENO pass, but not what follows.
			m.remember(f)
		}
		m.bury(f, fateDead)
		m.resetInner(f)
		m.report(f.info(), StateFailed, ReasonRefused)
	case inWindow:
		m.challenge(f)
	default:
		m.count(dropUnacceptable)
	}
}

// acknowledged takes an acceptable acknowledgement and window.
func (m *Machine) acknowledged(f *flow, ack, wnd int) {
	edge := max(f.edge, ack+wnd)
	if ack < f.una || ack == f.una && edge == f.edge {
		return
	}
	// What went beyond the window was a probe. Where it was not acknowledged it
	// was not taken.
	f.nxt = max(min(f.nxt, f.edge), ack)
	f.edge = edge
	progress := ack > f.una
	f.una = ack
	if m.pump(f, false) || progress {
		m.arm(f)
	}
}

// data takes payload of the peer's stream at the given offset.
func (m *Machine) data(f *flow, s *packet.Segment, off int) {
	before, held := f.rxNext(), len(f.rx.buf)
	end := off + s.Len()
	if grow := end - held; grow > 0 && end > rxFair && m.rxHeld+grow > rxTotal {
		m.count(dropLimit)
		return
	}
	f.rx.insert(off, s.Payload(), f.rxEdge)
	m.rxHeld += len(f.rx.buf) - held
	got := f.rxNext()
	if got > before {
		m.proceeded(f)
		if reason := m.progress(f); reason != "" {
			m.abort(f, reason)
			return
		}
		if m.flows[f.key] != f {
			if s.Flags&packet.FIN != 0 {
				// The FIN belongs to the frames that came with it.
				m.emit(Action{Kind: Reinject, Dir: packet.FromOuter, Key: f.key, Frame: bytes.Clone(s.Frame)})
			}
			return
		}
		if s.Flags&packet.FIN != 0 && off+s.Len() == got {
			m.ended(f, s)
			if f.job == nil {
				return
			}
		}
	} else if s.Flags&packet.FIN != 0 && off > before {
		f.fin = bareFIN(s)
	}
	m.sendAck(f)
}

// bareFIN returns a FIN that came ahead of other bytes, without its own, which
// reassembly has. The fast path gets it when it gets those.
func bareFIN(s *packet.Segment) []byte {
	b := packet.Rewrite(nil, s, s.Options(), nil)
	binary.BigEndian.PutUint32(b[s.L4+tcpSeq:], s.Seq+uint32(s.Len()))
	packet.FullChecksum(b, s.L3, s.L4, s.V6)
	return b
}

// ended takes a FIN in order. Behind the whole Init message it belongs to the
// frames, and waits for the fast path as they do.
func (m *Machine) ended(f *flow, s *packet.Segment) {
	if f.job == nil || f.job.peer == nil {
		m.abort(f, ReasonTruncated)
		return
	}
	f.fin = bytes.Clone(s.Frame)
}

// progress looks at the peer's stream, and completes the exchange when the Init
// message is there. It returns a Reason constant when the flow has to be
// aborted.
func (m *Machine) progress(f *flow) (reason string) {
	if f.job != nil {
		return ""
	}
	stream := f.rx.buf[:f.rxNext()]
	if f.initLen == 0 {
		magic := uint32(crypto.Init1Magic)
		if f.role() == crypto.RoleA {
			magic = crypto.Init2Magic
		}
		n, err := crypto.InitLen(stream, magic)
		if err != nil {
			return initReason(err)
		}
		f.initLen = n
	}
	if f.initLen == 0 || len(stream) < f.initLen {
		return ""
	}
	pub, reason := m.readInit(f, stream[:f.initLen])
	if reason != "" {
		return reason
	}
	return m.agree(f, pub)
}

// readInit reads the peer's whole Init message, settles the cipher and returns
// the peer's key in its wire encoding. It returns a Reason constant when the flow
// has to be aborted.
func (m *Machine) readInit(f *flow, theirs []byte) (pub []byte, reason string) {
	if f.role() == crypto.RoleA {
		msg, err := crypto.ParseInit2(f.tep, theirs)
		if err != nil {
			return nil, initReason(err)
		}
		if !slices.Contains(m.cfg.AEADs, msg.Cipher) {
			return nil, ReasonCipherUnoffered
		}
		f.cipher = msg.Cipher
		return msg.Pub, ""
	}
	msg, err := crypto.ParseInit1(f.tep, theirs)
	if err != nil {
		return nil, initReason(err)
	}
	var ok bool
	if f.cipher, ok = crypto.ChooseCipher(m.cfg.AEADs, msg.Ciphers); !ok {
		return nil, ReasonNoCommonCipher
	}
	f.nonceA = msg.Nonce
	return msg.Pub, ""
}

// complete makes the session out of the ephemeral secret es and installs the
// flow; short is the peer's reading of pubkey_len. It returns a Reason constant
// when the flow has to be aborted.
func (m *Machine) complete(f *flow, es []byte, short bool) (reason string) {
	stream := f.rx.buf[:f.rxNext()]
	theirs := stream[:f.initLen]
	transcript, init1, init2 := Transcript(f.localENO, f.remote.option()), f.init, theirs
	if f.role() == crypto.RoleB {
		msg := crypto.Init2{Cipher: f.cipher, Pub: f.priv.Public(short)}
		if _, err := io.ReadFull(m.rand, msg.Nonce[:]); err != nil {
			return ReasonNoRandom
		}
		f.init = msg.Append(nil)
		transcript, init1, init2 = Transcript(f.remote.option(), f.localENO), theirs, f.init
	}
	sess := crypto.NewSession(f.role(), f.cipher, f.tepByte, transcript, init1, init2, f.nonceA[:], es)
	if m.cfg.Cache != nil && !f.policy.NoCache {
		m.cfg.Cache.add(&f.key, f.active, f.tep, sess.AEAD(), f.role(), sess.NextSecret(), m.now)
	} else {
		sess.NextSecret().Erase()
	}
	m.install(f, sess, stream[f.initLen:])
	return ""
}

// initReason names a failure of the key exchange.
func initReason(err error) string {
	switch {
	case errors.Is(err, crypto.ErrBadMagic):
		return ReasonBadMagic
	case errors.Is(err, crypto.ErrBadKey), errors.Is(err, crypto.ErrZeroShared):
		return ReasonBadKey
	}
	return ReasonBadInit
}

// install hands the flow to the fast path and lets the inner stack see the end
// of its handshake.
func (m *Machine) install(f *flow, sess *crypto.Session, pending []byte) {
	v6 := f.outer.V6()
	// First what this side still says by itself: the fast path may answer the
	// pending bytes at once, with a window that must not retreat (T13).
	if resumed := f.resume && !f.active; !resumed && (f.role() == crypto.RoleA || !m.pump(f, false)) {
		m.sendAck(f)
	}
	est := &Established{
		Key: f.key, Session: sess, Role: f.role(), TEP: f.tep, Active: f.active, Crossed: f.crossed, PeerAppAware: f.aware, Resumed: f.resume, Unheard: f.active && !f.heard,
		ISS: f.iss, IRS: f.irs,
		PeerMSS: m.mss(&f.remote, v6), InnerMSS: m.mss(&f.local, v6),
		WScaleOK: f.local.hasWS && f.remote.hasWS, SACKOK: f.local.sackOK && f.remote.sackOK,
		TSOK: f.tsOK, ECNOK: f.ecnOK, TSLocal: f.tsLocal, TSRemote: f.tsRemote,
		TxInit: f.init, TxAcked: f.una, PeerWnd: f.edge - f.una,
		RxOffset: f.initLen, RxPending: bytes.Clone(pending), RxEdge: f.rxEdge,
		InnerWnd:  f.innerWnd,
		OuterTmpl: f.outer, InnerTmpl: f.inner,
		Release: f.release, RTT: f.rtt,
	}
	if est.WScaleOK {
		est.LocalWScale, est.RemoteWScale = f.local.wscale, f.remote.wscale
	}
	if f.tsOK {
		capTSval(f.release, f.tsRemote)
	}
	m.emit(Action{Kind: Install, Key: f.key, Est: est})
	m.emit(Action{Kind: SendInner, Key: f.key, Frame: bytes.Clone(f.release)})
	if f.fin != nil {
		m.emit(Action{Kind: Reinject, Dir: packet.FromOuter, Key: f.key, Frame: f.fin})
	}
	m.bury(f, fateHanded)
	i := f.info()
	m.report(i, StateEncrypted, "")
}
