package slowpath

import (
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// phase is how far the opening of a flow has come.
type phase uint8

const (
	phaseOffered  phase = iota // active: the SYN left with ENO
	phasePlainSYN              // active: a copy of the SYN left without ENO
	phaseListen                // passive: the inner stack has the SYN, without ENO
	phaseAnswered              // passive: the SYN-ACK left with ENO
	phaseCrossed               // active: the peer's SYN came in place of a SYN-ACK
	phaseExchange              // both: encryption is on, Init messages are exchanged
)

// flow is a half-open connection. Offsets count bytes of a stream from 0, the
// first byte after the SYN.
type flow struct {
	key     packet.Key
	active  bool // the local stack opened the connection
	policy  Policy
	phase   phase
	since   time.Duration
	expires time.Duration // end of patience in this phase
	latest  time.Duration // exchange: expires is at most this
	due     time.Duration // position in the timer heap
	slot    int

	iss, irs      uint32 // local and remote initial sequence number
	local, remote synOptions
	localENO      []byte // option that this side sent
	tep           crypto.TEP
	tepByte       byte // as host B sent it
	aware         bool // the peer's a bit
	ecnSYN, ecnOK bool
	tsOK          bool
	tsLocal       uint32
	tsRemote      uint32
	outer, inner  packet.Template
	innerWnd      int
	release       []byte
	synack        []byte // the SYN-ACK as it left
	crossed       bool   // both SYNs crossed
	inward        []byte // crossed: the peer's SYN as the inner stack gets it, until that answers
	early         []byte // crossed: the peer's SYN-ACK, which came before ours left
	strayAck      uint32 // passive: acknowledgement of an older connection's socket
	hasStray      bool
	wasPlain      bool // passive: an older connection on these ports, of which there may be a socket, was plain
	copies        int  // passive: of the peer's SYN, before it was answered
	unreachable   bool // an ICMP error came about the SYN or SYN-ACK

	excused bool // this host did not run meanwhile

	sent      int           // transmissions of SYN or SYN-ACK
	firstSent time.Duration // of them
	rtt       time.Duration // 0 when not measured
	limited   time.Duration // no challenge before

	ticket *unused // active: proposed and burnt, passive: reserved
	nonce  []byte  // ours in the resumption suboption
	resume bool    // the negotiated suboption resumes with ticket
	theirs []byte  // nonce of the peer, when it does

	priv     *crypto.PrivateKey
	job      *Job // has priv meanwhile
	cipher   crypto.AEAD
	init     []byte   // our Init message
	nonceA   [32]byte // N_A
	fin      []byte   // the peer's FIN, which came while the job ran, or ahead of other bytes
	una, nxt int      // of init: acknowledged, sent
	top      int      // of init: most that was ever sent
	edge     int      // right edge of the peer's window
	rto      time.Duration
	rtoAt    time.Duration // 0 when not armed
	rx       reassembly
	rxEdge   int  // right edge advertised
	initLen  int  // message_len of the peer's Init message, 0 when not known
	heard    bool // a segment without SYN came: ENO options may stop (RFC 8547 section 4.6)
}

// role is the ENO role: B for a passive opener, and for the one host of a
// simultaneous open that sets b = 1 (RFC 8547 section 4.3).
func (f *flow) role() crypto.Role {
	if f.active && !f.policy.PassiveRole {
		return crypto.RoleA
	}
	return crypto.RoleB
}

func (f *flow) info() Info {
	i := Info{Key: f.key, State: StateOffered, Role: f.role(), TEP: f.tep, Since: f.since}
	switch f.phase {
	case phasePlainSYN:
		i.State, i.Reason = StatePlain, ReasonSYNRetries
	case phaseExchange:
		i.State = StateNegotiating
	}
	return i
}

// noAnswer is the reason of a flow whose handshake nobody went on with.
func (f *flow) noAnswer() string {
	if f.unreachable {
		return ReasonUnreachable
	}
	return ReasonNoAnswer
}

// noteSent records a transmission of the SYN or SYN-ACK.
func (f *flow) noteSent(now time.Duration) {
	if f.sent == 0 {
		f.firstSent = now
	}
	f.sent++
}

// noteAnswered measures the round trip by Karn's rule and returns an upper
// bound of it.
func (f *flow) noteAnswered(now time.Duration) time.Duration {
	bound := now - f.firstSent
	if f.sent == 1 {
		f.rtt = bound
		f.rto = min(max(3*bound, minRTO), maxRTO)
	} else {
		f.rto = min(max(bound, initialRTO), maxRTO)
	}
	return bound
}

// rxNext returns the outer offset that is expected next.
func (f *flow) rxNext() int { return f.rx.inOrder() }

// scaled returns a peer's window field in bytes.
func (f *flow) scaled(wnd uint16) int {
	if f.local.hasWS && f.remote.hasWS {
		return int(wnd) << f.remote.wscale
	}
	return int(wnd)
}

// window returns the window field to advertise and moves the right edge: it
// never retreats (T13) and stays within the bounds of reassembly (T19). Behind
// the Init message no more is promised than the inner stack did: Linux sizes its
// segments by the largest window it saw, and waits for a timer with each that no
// later window holds.
func (f *flow) window() uint16 {
	next := f.rxNext()
	inner := f.initLen + f.innerWnd
	if f.initLen == 0 {
		inner = next + max(f.innerWnd, leastWindow)
	}
	edge := max(f.rxEdge, min(next+openWindow, f.initLen+rxAhead-openWindow, inner), next)
	shift := uint8(0)
	if f.local.hasWS && f.remote.hasWS {
		shift = f.local.wscale
	}
	w := min((edge-next+1<<shift-1)>>shift, 0xffff)
	f.rxEdge = max(f.rxEdge, next+w<<shift)
	return uint16(w)
}

// maxMSS is the largest segment that the MTU allows, options included.
func (m *Machine) maxMSS(v6 bool) int {
	if v6 {
		return m.cfg.MTU - packet.IPv6Len - packet.TCPLen
	}
	return m.cfg.MTU - packet.IPv4Len - packet.TCPLen
}

// minMSS keeps a hostile MSS option from cutting segments to nothing; Linux
// has the same floor.
const minMSS = 48

// mss returns the size in bytes of option and payload bytes that the sender of
// a SYN with the given options takes, no more than the MTU allows.
func (m *Machine) mss(o *synOptions, v6 bool) int {
	n := o.mss
	if n == 0 && v6 {
		n = defaultMSS6
	} else if n == 0 {
		n = defaultMSS4
	}
	return max(min(n, m.maxMSS(v6)), minMSS)
}

// shownMSS is the MSS that the inner stack sees in place of the peer's
// (invariant 7).
func (m *Machine) shownMSS(o *synOptions, v6 bool) int {
	return max(m.mss(o, v6)-crypto.Overhead, minMSS)
}

// announcedMSS is the MSS option of a SYN or SYN-ACK of the inner stack, for
// optionEdit: 0, as it is, unless it lets the peer send more than the MTU allows.
func (m *Machine) announcedMSS(o *synOptions, v6 bool) int {
	if most := m.maxMSS(v6); o.mss > most {
		return max(most, minMSS)
	}
	return 0
}

// outerSegment composes a segment to the peer with payload at stream offset off.
func (m *Machine) outerSegment(f *flow, flags uint8, off int, payload []byte) []byte {
	var opts [packet.MaxOptions]byte
	h := packet.Header{
		Seq: f.iss + 1 + uint32(off), Ack: f.irs + 1 + uint32(f.rxNext()),
		Flags: flags, Opts: f.appendOptions(opts[:0]),
	}
	if flags&packet.RST == 0 {
		h.Wnd = f.window()
	}
	return compose(&f.outer, &h, payload)
}

// appendOptions appends the options of a segment to the peer.
func (f *flow) appendOptions(b []byte) []byte {
	if f.tsOK {
		b = append(b,
			packet.OptNOP, packet.OptNOP, packet.OptTimestamp, 10,
			byte(f.tsLocal>>24), byte(f.tsLocal>>16), byte(f.tsLocal>>8), byte(f.tsLocal),
			byte(f.tsRemote>>24), byte(f.tsRemote>>16), byte(f.tsRemote>>8), byte(f.tsRemote))
	}
	if f.active && !f.heard {
		b = append(appendNonSYN(b), packet.OptNOP, packet.OptNOP)
	}
	return b
}

func (m *Machine) sendAck(f *flow) {
	m.emit(Action{Kind: SendOuter, Key: f.key, Frame: m.outerSegment(f, packet.ACK, f.top, nil)})
}

// challenge answers an unacceptable segment, not too often.
func (m *Machine) challenge(f *flow) {
	if m.now < f.limited {
		return
	}
	f.limited = m.now + challengePeriod
	m.count(countChallenges)
	if f.phase == phaseAnswered {
		// Not an ACK: the first segment without SYN lets the peer leave
		// ENO out, and then its own could look like that of a plain
		// connection (RFC 8547 section 4.6).
		m.resendSYNACK(f)
		return
	}
	m.sendAck(f)
}

// pump sends what the peer's window allows of the Init message from nxt on, at
// least one byte when probe is set. The segment with the last byte has PSH
// (RFC 8548 section 3.3). It reports whether anything was sent.
func (m *Machine) pump(f *flow, probe bool) bool {
	limit := min(f.edge, len(f.init))
	if probe {
		limit = min(max(limit, f.nxt+1), len(f.init))
	}
	var opts [packet.MaxOptions]byte
	most := m.mss(&f.remote, f.outer.V6()) - len(f.appendOptions(opts[:0]))
	sent := false
	for f.nxt < limit {
		n := min(most, limit-f.nxt)
		flags := uint8(packet.ACK)
		if f.nxt+n == len(f.init) {
			flags |= packet.PSH
		}
		m.emit(Action{Kind: SendOuter, Key: f.key, Frame: m.outerSegment(f, flags, f.nxt, f.init[f.nxt:f.nxt+n])})
		f.nxt += n
		f.top = max(f.top, f.nxt)
		sent = true
	}
	return sent
}

// arm starts the retransmission timer when there is something to retransmit.
func (m *Machine) arm(f *flow) {
	f.rtoAt = 0
	if f.una < len(f.init) {
		f.rtoAt = m.now + f.rto
	}
}

// retransmit sends the unacknowledged part of the Init message again, and
// waits twice as long at first (RFC 6298 section 5).
func (m *Machine) retransmit(f *flow) {
	m.count(countRetransmits)
	f.nxt = f.una
	m.pump(f, true)
	f.rto = max(f.rto, min(2*f.rto, backoffRTO))
	m.arm(f)
}

// resetOuter resets the peer, at the end of what was transmitted (T15).
func (m *Machine) resetOuter(f *flow) {
	m.count(countResets)
	h := packet.Header{
		Flags: packet.RST | packet.ACK,
		Seq:   f.iss + 1 + uint32(f.top), Ack: f.irs + 1 + uint32(f.rxNext()),
	}
	if f.phase == phaseListen {
		h.Seq = 0
	}
	m.emit(Action{Kind: SendOuter, Key: f.key, Frame: compose(&f.outer, &h, nil)})
}

// resetInner resets the inner stack with numbers that it accepts in SYN-SENT
// and in SYN-RECEIVED.
func (m *Machine) resetInner(f *flow) {
	m.count(countResets)
	h := packet.Header{Flags: packet.RST | packet.ACK, Ack: f.iss + 1}
	if !f.active || f.crossed {
		h = packet.Header{Flags: packet.RST, Seq: f.irs + 1}
	}
	m.emit(Action{Kind: SendInner, Key: f.key, Frame: compose(&f.inner, &h, nil)})
}
