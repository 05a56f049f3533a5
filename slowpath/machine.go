package slowpath

import (
	"bytes"
	"cmp"
	"container/heap"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// Defaults of Config.
const (
	DefaultMaxHalfOpen  = 16384
	DefaultDeadline     = 3 * time.Second
	DefaultRememberFor  = 60 * time.Second
	DefaultTombstoneFor = 5 * time.Second
	defaultMTU          = 1500
)

// Timing of the handshake.
const (
	minRTO          = 200 * time.Millisecond
	maxRTO          = 3 * time.Second
	initialRTO      = time.Second
	backoffRTO      = 800 * time.Millisecond // the exchange backs off no further: its time is short
	offerIdle       = 10 * time.Second       // a SYN without an answer is given up
	answerIdle      = 40 * time.Second       // longer than any pause between SYN-ACK copies of Linux
	answerPressed   = 4 * time.Second        // the same when an eighth of MaxHalfOpen is used
	challengePeriod = 500 * time.Millisecond // rate limit of answers to unacceptable segments (RFC 5961 section 7)
	handedQuiet     = 500 * time.Millisecond // see Machine.afresh
	maxSYNs         = 3                      // this copy of a SYN goes without ENO (T19)

	// synCopies is longer than any pause between copies of a SYN: Linux waits
	// at most two minutes.
	synCopies = 130 * time.Second

	tombsPerFlow = 4 // bound of tombs, in units of MaxHalfOpen
)

// Machine negotiates and agrees on keys for all flows that are being opened.
// It is sans-I/O and belongs to one goroutine. Its time is a monotonic clock of
// the caller's choice, which never goes back.
//
// Frames in the actions it returns begin with the Ethernet header. The IPv4
// header checksum is right, the TCP checksum field is zero: the port that sends
// the frame fills it in. Reinject returns its frame as it came.
type Machine struct {
	cfg  Config
	rand io.Reader
	now  time.Duration
	acts []Action
	seg  packet.Segment

	flows  map[packet.Key]*flow
	timers timerHeap
	tombs  graveyard
	peers  peerMemory
	costly *Limiter

	wanting []*flow // for which Ahead may make keys

	rxHeld int // bytes in the reassembly buffers of all flows
	counts map[string]uint64
}

// New returns a Machine for the given policy; zero fields of cfg get their
// defaults, nil TEPs and AEADs are all that exist. random is the source of
// nonces and private keys, read only inside Input, Ahead and Agreed.
func New(cfg Config, random io.Reader) *Machine {
	if cfg.TEPs == nil {
		cfg.TEPs = crypto.AllTEPs
	}
	if cfg.AEADs == nil {
		cfg.AEADs = crypto.AllAEADs
	}
	cfg.MTU = cmp.Or(cfg.MTU, defaultMTU)
	cfg.MaxHalfOpen = cmp.Or(cfg.MaxHalfOpen, DefaultMaxHalfOpen)
	cfg.Deadline = cmp.Or(cfg.Deadline, DefaultDeadline)
	cfg.RememberFor = cmp.Or(cfg.RememberFor, DefaultRememberFor)
	cfg.TombstoneFor = cmp.Or(cfg.TombstoneFor, DefaultTombstoneFor)
	m := &Machine{
		cfg: cfg, rand: random,
		flows:  make(map[packet.Key]*flow),
		peers:  peerMemory{known: make(map[peer]standing)},
		costly: cmp.Or(cfg.Limiter, NewLimiter()),
		counts: make(map[string]uint64),
	}
	m.tombs.init()
	return m
}

// Input takes one frame that the fast path does not own: a SYN, a segment of a
// flow between its Divert and its Install or Undivert, a straggler, or an ICMP
// error about such a flow. dir says where it came from. Checksums have been verified, or the frame is from this
// machine. A super-segment has to be cut before. A SYN on the tuple of an
// encrypted flow may only come here when the fast path has given the flow up.
//
// frame is only used during the call. The actions are valid until the next
// call of the Machine, their frames for as long as they are wanted.
func (m *Machine) Input(dir packet.Direction, frame []byte, now time.Duration) []Action {
	m.begin(now)
	s := &m.seg
	err := packet.Parse(frame, dir, s)
	if err == packet.ErrNotTCP && dir == packet.FromOuter {
		m.icmp(frame)
		return m.acts
	}
	if err != nil {
		m.count(dropMalformed)
		return m.acts
	}
	if s.Flags&packet.SYN != 0 && s.Flags&(packet.FIN|packet.RST) != 0 {
		m.count(dropBadFlags)
		return m.acts
	}
	if f := m.flows[s.Key]; f != nil {
		m.segment(f, s, dir)
		return m.acts
	}
	t := m.tombs.byKey[s.Key]
	if t != nil && t.expires <= m.now {
		m.unbury(t)
		t = nil
	}
	switch isSYN := s.Flags&(packet.SYN|packet.ACK) == packet.SYN; {
	case t != nil && !(isSYN && m.afresh(t, s, dir)):
		m.straggler(t, s, dir)
	case !isSYN:
		m.count(dropUnknown)
	default:
		if t != nil {
			m.unbury(t)
		}
		if dir == packet.FromInner {
			m.offer(s)
		} else {
			m.accept(s)
		}
	}
	return m.acts
}

// icmp passes on an ICMP error about a SYN or SYN-ACK, whose numbers are the
// inner stack's own: what becomes of the attempt is for that one to decide, as it
// would be without encryption. Errors about Init messages mean nothing to it.
func (m *Machine) icmp(frame []byte) {
	var e packet.ICMPError
	if packet.ParseICMP(frame, &e) != nil {
		m.count(dropMalformed)
		return
	}
	f := m.flows[e.Key]
	if f == nil || f.phase == phaseExchange || f.phase == phaseListen || e.TooBig || e.Seq != f.iss {
		m.count(dropICMP)
		return
	}
	f.unreachable = true
	m.send(f.key, packet.FromOuter, bytes.Clone(e.Frame))
}

// segment gives a segment to the side of its flow that it came from.
func (m *Machine) segment(f *flow, s *packet.Segment, dir packet.Direction) {
	switch {
	case f.active && dir == packet.FromInner:
		m.activeInner(f, s)
	case f.active:
		m.activeOuter(f, s)
	case dir == packet.FromInner:
		m.passiveInner(f, s)
	default:
		m.passiveOuter(f, s)
	}
	if m.flows[f.key] == f {
		m.timers.schedule(f)
	}
}

// Tick carries out what is due by now. The actions are valid until the next
// call of the Machine.
func (m *Machine) Tick(now time.Duration) []Action {
	m.begin(now)
	for len(m.timers) > 0 && m.timers[0].due <= m.now {
		f := m.timers[0]
		if f.expires <= m.now {
			m.expire(f)
			continue
		}
		m.retransmit(f)
		m.timers.schedule(f)
	}
	for t := m.tombs.first(); t != nil && t.expires <= m.now; t = m.tombs.first() {
		m.unbury(t)
	}
	return m.acts
}

// Deadline returns when Tick wants to be called; ok is false when nothing is
// pending.
func (m *Machine) Deadline() (at time.Duration, ok bool) {
	if len(m.timers) > 0 {
		at, ok = m.timers[0].due, true
	}
	if t := m.tombs.first(); t != nil && (!ok || t.expires < at) {
		at, ok = t.expires, true
	}
	return at, ok
}

// SetMTU changes Config.MTU for flows that begin from now on.
func (m *Machine) SetMTU(mtu int) { m.cfg.MTU = mtu }

// Crowded reports whether SYNs from the wire begin no flow because there are too
// many half-open ones. Most are left for connections of this host.
func (m *Machine) Crowded() bool { return 4*len(m.flows) >= m.cfg.MaxHalfOpen }

func (m *Machine) room() string {
	if m.cfg.Room == nil {
		return ""
	}
	return m.cfg.Room()
}

// Drop forgets the half-open flow k, whose SYN went nowhere.
func (m *Machine) Drop(k packet.Key) {
	if f := m.flows[k]; f != nil {
		m.remove(f)
	}
}

// Opens reports whether the flow k is half-open.
func (m *Machine) Opens(k packet.Key) bool { return m.flows[k] != nil }

// Stalled tells that the Machine was given nothing for the time of gap although
// peers may have answered: their time to do so begins where it was interrupted, and
// an exchange that times out is not held against them.
func (m *Machine) Stalled(gap time.Duration) {
	for _, f := range m.flows {
		f.excused = true
		f.expires += gap
		f.latest += gap
		m.timers.schedule(f)
	}
}

// Len returns the number of half-open flows.
func (m *Machine) Len() int { return len(m.flows) }

// Flows describes the half-open flows, oldest first.
func (m *Machine) Flows() []Info {
	infos := make([]Info, 0, len(m.flows))
	for _, f := range m.flows {
		infos = append(infos, f.info())
	}
	slices.SortFunc(infos, func(a, b Info) int { return cmp.Compare(a.Since, b.Since) })
	return infos
}

// Counters returns the event counts since New, by name.
func (m *Machine) Counters() map[string]uint64 { return maps.Clone(m.counts) }

// Names of the counters.
const (
	countOffered     = "offered"             // SYNs that left with ENO for the first time
	countAnswered    = "answered"            // SYN-ACKs that left with ENO for the first time
	countEncrypted   = "encrypted"           // flows given to the fast path
	countProposed    = "resume_proposed"     // SYNs that left with a resumption suboption for the first time
	countResumed     = "resumed"             // encrypted flows that resumed a session
	countRefused     = "resume_refused"      // proposals that the peer answered with a fresh exchange
	countUnknown     = "resume_unknown"      // proposals of peers that name no unused secret
	countPlain       = "plain"               // flows that became or stayed plain
	countFailed      = "failed"              // flows that ended in the handshake
	countRetransmits = "retransmits"         // Init segments sent again by the timer
	countChallenges  = "challenge_acks"      // answers to unacceptable segments
	countResets      = "resets_sent"         // resets sent in either direction
	countAsked       = "unacceptable_passed" // segments that only the inner stack knows what to do with
	countAbsorbed    = "absorbed"            // copies that the inner stack sent while it has to wait
	countStragglers  = "stragglers"          // segments of decided flows
	dropMalformed    = "drop_malformed"      // not a TCP segment that can be worked on
	dropBadFlags     = "drop_bad_flags"      // SYN with FIN or RST
	dropUnknown      = "drop_unknown"        // no SYN and no flow
	dropUnacceptable = "drop_unacceptable"   // outside of window or acknowledgement range
	dropInner        = "drop_inner"          // from the inner stack, of no use in this state
	dropLimit        = "drop_limit"          // no memory for the bytes or the flow
	dropDead         = "drop_dead"           // of an aborted flow
	dropICMP         = "drop_icmp"           // an ICMP error that concerns no SYN or SYN-ACK
)

func (m *Machine) count(name string) { m.counts[name]++ }

func (m *Machine) begin(now time.Duration) {
	m.now = max(m.now, now)
	clear(m.acts)
	m.acts = m.acts[:0]
}

func (m *Machine) emit(a Action) { m.acts = append(m.acts, a) }

// send passes frame on in the direction away from dir.
func (m *Machine) send(k packet.Key, dir packet.Direction, frame []byte) {
	kind := SendOuter
	if dir == packet.FromOuter {
		kind = SendInner
	}
	m.emit(Action{Kind: kind, Key: k, Frame: frame})
}

// answer returns a frame to the side that dir names.
func (m *Machine) answer(k packet.Key, dir packet.Direction, frame []byte) {
	if frame != nil {
		m.send(k, dir^1, frame)
	}
}

func (m *Machine) report(i Info, s State, reason string) {
	i.State, i.Reason = s, reason
	switch s {
	case StatePlain:
		m.count(countPlain)
	case StateFailed:
		m.count(countFailed)
	case StateEncrypted:
		m.count(countEncrypted)
	}
	m.emit(Action{Kind: Report, Key: i.Key, Info: i})
}

// add starts a half-open flow.
func (m *Machine) add(f *flow) {
	m.flows[f.key] = f
	f.due = f.expires
	heap.Push(&m.timers, f)
	m.emit(Action{Kind: Divert, Key: f.key})
	m.report(f.info(), StateOffered, "")
}

// remove ends a half-open flow and wipes its secrets.
func (m *Machine) remove(f *flow) {
	delete(m.flows, f.key)
	heap.Remove(&m.timers, f.slot)
	m.rxHeld -= len(f.rx.buf)
	m.wipe(f)
}

// wipe erases what a flow keeps secret.
func (m *Machine) wipe(f *flow) {
	if f.priv != nil {
		f.priv.Erase()
		f.priv = nil
	}
	f.job = nil
	switch t := f.ticket; {
	case t == nil:
	case f.active:
		// Proposed is used (RFC 8548 section 3.5).
		t.secret.Erase()
	default:
		m.cfg.Cache.restore(t)
	}
	f.ticket = nil
}

// policy returns the policy for a flow whose SYN came from dir.
func (m *Machine) policy(k *packet.Key, dir packet.Direction) Policy {
	if m.cfg.Policy == nil {
		return Policy{}
	}
	return m.cfg.Policy(k, dir)
}

// bury ends a half-open flow and leaves a tombstone.
func (m *Machine) bury(f *flow, how fate) {
	m.remove(f)
	m.entomb(&tomb{
		key: f.key, fate: how, iss: f.iss, irs: f.irs,
		hasISS: f.active || f.phase >= phaseAnswered, hasIRS: !f.active || f.phase >= phaseCrossed,
		unanswered: how == fatePlain && f.expires <= m.now,
	})
}

// entomb leaves a tombstone for a flow that has none yet. At the limit another
// one goes.
func (m *Machine) entomb(t *tomb) {
	if len(m.tombs.byKey) >= tombsPerFlow*m.cfg.MaxHalfOpen {
		m.unbury(m.tombs.least())
	}
	t.born = m.now
	m.prolong(t)
}

// prolong gives a tombstone that is in no list its whole lifetime.
func (m *Machine) prolong(t *tomb) {
	t.expires = m.now + m.cfg.TombstoneFor
	if t.unanswered {
		t.expires = m.now + synCopies
	}
	m.tombs.add(t)
}

// unbury forgets a decided flow. One that was aborted stays diverted until
// now, so that nothing of the peer's reaches a socket that may not have seen
// its reset.
func (m *Machine) unbury(t *tomb) {
	m.tombs.remove(t)
	if t.fate == fateDead {
		m.emit(Action{Kind: Undivert, Key: t.key})
	}
	if m.cfg.Forgotten != nil {
		m.cfg.Forgotten(t.key)
	}
}

// Gone tells that the fast path has given up the flow k, which it had taken
// over: the next SYN of that tuple begins another connection.
func (m *Machine) Gone(k packet.Key) {
	if t := m.tombs.byKey[k]; t != nil && t.fate == fateHanded {
		m.tombs.remove(t)
	}
}

// afresh reports whether the SYN s begins another connection than the one of
// t: a flow's identity includes both ISNs (T20).
func (m *Machine) afresh(t *tomb, s *packet.Segment, dir packet.Direction) bool {
	known, isn := t.hasISS, t.iss
	if dir == packet.FromOuter {
		known, isn = t.hasIRS, t.irs
	}
	if known && s.Seq == isn {
		return false
	}
	// A blind SYN may have waited here while the flow was installed. The fast
	// path, which knows whether the flow lives, answers it.
	if t.fate == fateHanded && dir == packet.FromOuter && m.now-t.born < handedQuiet {
		return false
	}
	return known || t.fate != fatePlain
}

// straggler treats a segment of a decided flow.
func (m *Machine) straggler(t *tomb, s *packet.Segment, dir packet.Direction) {
	m.count(countStragglers)
	switch t.fate {
	case fatePlain:
		if t.unanswered && s.Flags&packet.SYN != 0 {
			m.tombs.remove(t)
			m.prolong(t)
		}
		m.passPlain(s, dir)
	case fateHanded:
		m.emit(Action{Kind: Reinject, Dir: dir, Key: s.Key, Frame: bytes.Clone(s.Frame)})
	case fateDead:
		m.count(dropDead)
		if s.Flags&packet.RST != 0 {
			return
		}
		m.count(countResets)
		m.answer(s.Key, dir, Reset(s, dir))
		if dir == packet.FromInner {
			// The inner stack had not heard of the end: stay.
			m.tombs.remove(t)
			m.prolong(t)
		}
	}
}

// passPlain passes on a segment of a plain flow; what comes from the wire
// loses its ENO option, to which the inner stack could not answer.
func (m *Machine) passPlain(s *packet.Segment, dir packet.Direction) {
	f := copyFrame(s)
	if dir == packet.FromOuter && s.Flags&packet.SYN != 0 {
		o := readSYNOptions(s.Options())
		f = stripSYN(s, &o)
	}
	m.send(s.Key, dir, f)
}

// plainSYN lets a SYN of a flow that is not negotiated go its way, or refuses
// it. The flow is not diverted.
func (m *Machine) plainSYN(s *packet.Segment, dir packet.Direction, reason string) {
	info := Info{Key: s.Key, Since: m.now}
	if dir == packet.FromOuter {
		info.Role = crypto.RoleB
	}
	if m.policy(&s.Key, dir).Verdict == Require {
		m.count(countResets)
		m.answer(s.Key, dir, Reset(s, dir))
		m.report(info, StateFailed, ReasonRequired)
		return
	}
	if reason != ReasonPolicy {
		// Copies have to be treated alike (RFC 8547 section 4.6).
		t := &tomb{key: s.Key, fate: fatePlain, unanswered: true}
		if dir == packet.FromInner {
			t.hasISS, t.iss = true, s.Seq
		} else {
			t.hasIRS, t.irs = true, s.Seq
		}
		m.entomb(t)
	}
	m.passPlain(s, dir)
	m.report(info, StatePlain, reason)
}

// toPlain ends the negotiation of f without encryption. The segment that
// decided is passed on after the tombstone stands and before the diversion
// goes (T17).
func (m *Machine) toPlain(f *flow, s *packet.Segment, dir packet.Direction, reason string) {
	if f.policy.Verdict == Require {
		m.abort(f, ReasonRequired)
		return
	}
	m.bury(f, fatePlain)
	m.passPlain(s, dir)
	m.emit(Action{Kind: Undivert, Key: f.key})
	m.report(f.info(), StatePlain, reason)
}

// refused ends a flow that a reset of one side ended; the reset is passed on.
func (m *Machine) refused(f *flow, s *packet.Segment, dir packet.Direction) {
	m.bury(f, fatePlain)
	m.send(s.Key, dir, copyFrame(s))
	m.emit(Action{Kind: Undivert, Key: f.key})
	m.report(f.info(), StateFailed, ReasonRefused)
}

// abort resets both sides.
func (m *Machine) abort(f *flow, reason string) {
	m.bury(f, fateDead)
	m.resetOuter(f)
	m.resetInner(f)
	m.report(f.info(), StateFailed, reason)
}

// AbortAll ends every half-open flow with the given reason, its nonces and keys
// with it. The actions are valid until the next call of the Machine.
func (m *Machine) AbortAll(reason string, now time.Duration) []Action {
	m.begin(now)
	for _, f := range slices.Collect(maps.Values(m.flows)) {
		m.abort(f, reason)
	}
	return m.acts
}

// AbortAgreed is AbortAll for the flows of which the peer may take encryption for
// agreed. The others may become plain without this Machine.
func (m *Machine) AbortAgreed(reason string, now time.Duration) []Action {
	m.begin(now)
	for _, f := range slices.Collect(maps.Values(m.flows)) {
		if f.phase >= phaseAnswered {
			m.abort(f, reason)
		}
	}
	return m.acts
}

// remember makes a note of a peer with which ENO did not work.
func (m *Machine) remember(f *flow) {
	m.peers.add(&f.key, m.now+m.cfg.RememberFor)
}

// expire ends a flow whose time is over.
func (m *Machine) expire(f *flow) {
	switch f.phase {
	case phaseExchange:
		if f.active && !f.excused {
			m.remember(f)
		}
		m.abort(f, ReasonTimeout)
	case phaseAnswered, phaseCrossed:
		// The inner stack may still wait for the final ACK, and must not
		// take a late one for that of a plain connection.
		m.abort(f, f.noAnswer())
	default:
		m.bury(f, fatePlain)
		m.emit(Action{Kind: Undivert, Key: f.key})
		if f.phase != phasePlainSYN {
			m.report(f.info(), StateFailed, f.noAnswer())
		}
	}
}
