package slowpath

import (
	"bytes"
	"errors"
	"io"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// Limits of the exchange's deadline.
const (
	deadlineRTTs   = 4  // at least so many round trips (T19)
	deadlineFactor = 10 // but at most so many times the configured deadline
)

// startExchange turns encryption on: from here on the flow is encrypted or
// failed (invariant 8).
func (m *Machine) startExchange(f *flow) {
	bound := f.noteAnswered(m.now)
	f.expires = m.now + min(max(m.cfg.Deadline, deadlineRTTs*bound), deadlineFactor*m.cfg.Deadline)
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
	case f.tsOK && s.HasTS && packet.SeqDiff(s.TSval, f.tsRemote) < 0,
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
	f.heard = true
	if off <= next {
		f.inner.Learn(s)
	}
	m.acknowledged(f, ack, f.scaled(s.Wnd))
	if n > 0 {
		m.data(f, s, off)
		return
	}
	if s.Flags&packet.FIN != 0 && off == next {
		m.abort(f, ReasonTruncated)
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
	f.edge = edge
	progress := ack > f.una
	f.una = ack
	f.nxt = max(f.nxt, ack)
	if m.pump(f, false) || progress {
		m.arm(f)
	}
}

// data takes payload of the peer's stream at the given offset.
func (m *Machine) data(f *flow, s *packet.Segment, off int) {
	before, held := f.rxNext(), len(f.rx.buf)
	if grow := off + s.Len() - held; grow > 0 && m.rxHeld+grow > rxTotal {
		m.count(dropLimit)
		return
	}
	f.rx.insert(off, s.Payload(), f.rxEdge)
	m.rxHeld += len(f.rx.buf) - held
	got := f.rxNext()
	if got > before {
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
			m.abort(f, ReasonTruncated)
			return
		}
	}
	m.sendAck(f)
}

// progress looks at the peer's stream, and completes the exchange when the Init
// message is there. It returns a Reason constant when the flow has to be
// aborted.
func (m *Machine) progress(f *flow) (reason string) {
	stream := f.rx.buf[:f.rxNext()]
	if f.initLen == 0 {
		magic := uint32(crypto.Init1Magic)
		if f.active {
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
	theirs := stream[:f.initLen]
	var sess *crypto.Session
	if f.active {
		sess, reason = m.finishActive(f, theirs)
	} else {
		sess, reason = m.finishPassive(f, theirs)
	}
	if reason == "" {
		m.install(f, sess, stream[f.initLen:])
	}
	return reason
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
	acts := len(m.acts)
	m.emit(Action{Kind: Install, Key: f.key})
	if f.active || !m.pump(f, false) {
		m.sendAck(f)
	}
	est := &Established{
		Key: f.key, Session: sess, Role: f.role(), TEP: f.tep, Active: f.active,
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
	m.acts[acts].Est = est
	m.emit(Action{Kind: SendInner, Key: f.key, Frame: bytes.Clone(f.release)})
	m.bury(f, fateHanded)
	i := f.info()
	m.report(i, StateEncrypted, "")
}

// finishPassive takes the whole Init1, chooses the cipher, completes the key
// agreement and makes Init2. It returns a Reason constant when the flow has to
// be aborted.
func (m *Machine) finishPassive(f *flow, init1 []byte) (sess *crypto.Session, reason string) {
	theirs, err := crypto.ParseInit1(f.tep, init1)
	if err != nil {
		return nil, initReason(err)
	}
	ours := crypto.Init2{}
	var ok bool
	if ours.Cipher, ok = crypto.ChooseCipher(m.cfg.AEADs, theirs.Ciphers); !ok {
		return nil, ReasonNoCommonCipher
	}
	if _, err := io.ReadFull(m.rand, ours.Nonce[:]); err != nil {
		return nil, ReasonNoRandom
	}
	if f.priv, err = crypto.GenerateKey(f.tep, m.rand); err != nil {
		return nil, ReasonNoRandom
	}
	es, shortLen, err := f.priv.Shared(theirs.Pub)
	if err != nil {
		return nil, initReason(err)
	}
	ours.Pub = f.priv.Public(shortLen)
	f.init = ours.Append(nil)
	sess = crypto.NewSession(crypto.RoleB, ours.Cipher, f.tepByte,
		Transcript(f.remote.option(), f.localENO), init1, f.init, theirs.Nonce[:], es)
	clear(es)
	return sess, ""
}
