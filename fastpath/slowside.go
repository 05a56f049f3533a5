package fastpath

import (
	"crypto/rand"
	"slices"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// slowSide is the slow path of one worker, and runs on its thread: an install
// and the release of the inner handshake then are one step, between which no
// segment of the flow can come, and a connection is opened without a thread
// having to wake another. It gives frames to the machine, carries out its
// actions, keeps the diversion and guard maps, and remembers what became of
// flows that were not encrypted. Key agreement that costs more than a few
// packets is computed by a pool, see agreement.
type slowSide struct {
	h *Host
	w *worker
	m *slowpath.Machine

	waiting []Event       // in order
	shed    uint64        // frames dropped because too many were waiting
	mapFull uint64        // flows for which there was no room in a map
	full    time.Duration // until then no flow is begun
	stale   uint64        // SYNs dropped because they may have become plain connections
	moved   uint64        // half-open flows given to other workers

	recent  []recentFlow // oldest first
	reasons map[string]uint64
	guarded map[packet.Key]bool // listed in the guard; true: encryption may be on
	lately  lately
	orphans map[packet.Key]bool // whose sockets could not be ended, without VLAN
	gone    []packet.Key        // that the machine has forgotten, see settle
}

const (
	maxWaiting = 8192 // events that wait for the slow path
	slowVector = 64   // events handled in one round: a flood of SYNs must not starve encrypted flows

	minHalfOpen = 1024 // half-open flows of one worker, at least
)

type recentFlow struct {
	at   time.Time
	info FlowInfo
}

// newSlowSide makes the slow path of one of h's workers. With own, that worker
// has a CPU of its own.
func newSlowSide(h *Host, own bool) *slowSide {
	s := &slowSide{h: h, reasons: make(map[string]uint64), guarded: make(map[packet.Key]bool), orphans: make(map[packet.Key]bool)}
	cfg := slowpath.Config{
		TEPs: h.cfg.TEPs, AEADs: h.cfg.AEADs, Policy: h.cfg.policy(), MTU: h.pathMTU(),
		Cache: h.cache, ResumeNonce: h.cfg.ResumeNonce, Offload: offloads(own), Limiter: h.limiter,
		MaxHalfOpen: max(slowpath.DefaultMaxHalfOpen/len(h.place.cpus), minHalfOpen), Room: s.room, Orphan: s.orphan,
	}
	if h.cfg.MaxHalfOpen != 0 {
		cfg.MaxHalfOpen = max(h.cfg.MaxHalfOpen/len(h.place.cpus), 1)
	}
	if h.owners != nil {
		cfg.Forgotten = func(k packet.Key) { s.gone = append(s.gone, k) }
	}
	s.m = slowpath.New(cfg, rand.Reader)
	return s
}

// room is slowpath.Config.Room.
func (s *slowSide) room() string {
	switch {
	case s.h.diverter.Flows() >= s.h.maxFlows(), s.w.now() < s.full:
		return slowpath.ReasonFlows
	case s.w.eng.Pressed():
		return slowpath.ReasonMemory
	}
	return ""
}

// orphan is slowpath.Config.Orphan: the socket could not be ended, or what it had
// sent may still be in the TAP's queue.
func (s *slowSide) orphan(k packet.Key) bool {
	k.VLAN = 0
	return s.stranded(k) || s.lately.has(k, s.w.now())
}

// stranded reports whether the socket of k, without VLAN, could not be ended, and
// is guarded until it is gone.
func (s *slowSide) stranded(k packet.Key) bool { return s.orphans[k] || s.h.orphans[k] }

// lately remembers flows that are gone, each for one to two times lateFor.
type lately struct {
	now, before map[packet.Key]bool
	turned      time.Duration
}

const lateFor = 2 * time.Second

func (l *lately) turn(now time.Duration) {
	if now-l.turned < lateFor {
		return
	}
	l.before, l.now = l.now, nil
	if now-l.turned >= 2*lateFor {
		l.before = nil
	}
	l.turned = now
}

func (l *lately) add(k packet.Key, now time.Duration) {
	if l.turn(now); l.now == nil {
		l.now = make(map[packet.Key]bool)
	}
	l.now[k] = true
}

func (l *lately) has(k packet.Key, now time.Duration) bool {
	l.turn(now)
	return l.now[k] || l.before[k]
}

// stalled tells that the worker did not run for the given time.
func (s *slowSide) stalled(gap time.Duration) {
	s.m.Stalled(gap)
	s.waiting = slices.DeleteFunc(s.waiting, func(ev Event) bool { return s.tooOld(&ev) })
	if gap >= beatStale {
		s.h.log.Warn("the daemon was stopped or starved; new connections were not encrypted meanwhile", "for", gap.Round(time.Millisecond).String())
	}
}

// tooOld reports whether an event is a SYN of a flow that is not known, which came
// before the worker stalled, and counts it. Since then a copy of it may have made
// a plain connection, which must not be taken for a new one.
func (s *slowSide) tooOld(ev *Event) bool {
	old := ev.Kind == SlowFrame && ev.Flags&(packet.SYN|packet.ACK) == packet.SYN && !s.m.Opens(ev.Key)
	if old {
		s.stale++
	}
	return old
}

// take queues the engine's events. Frames beyond the bound are shed, which
// costs new connections only.
func (s *slowSide) take(evs []Event) {
	for _, ev := range evs {
		if s.w.stalled && s.tooOld(&ev) {
			continue
		}
		if ev.Kind == SlowFrame && len(s.waiting) >= maxWaiting {
			s.shed++
			continue
		}
		s.waiting = append(s.waiting, ev)
	}
}

// round handles a vector of the waiting events and what is due, and reports
// whether there was anything to do.
func (s *slowSide) round(now time.Duration) bool {
	// Once more: the thread may have stood still since the ports were looked at.
	s.w.notice()
	s.take(s.w.eng.Events())
	at, due := s.m.Deadline()
	if due = due && at <= now; due {
		s.carryOut(s.m.Tick(now), now)
	}
	n := min(len(s.waiting), slowVector)
	for i := range n {
		s.handle(&s.waiting[i], now)
	}
	s.waiting = s.waiting[:copy(s.waiting, s.waiting[n:])]
	if n > 0 && s.m.Crowded() {
		if err := s.h.shed.crowded(time.Now(), s.h.diverter.Shed); err != nil {
			s.h.log.Warn("a flood of SYNs cannot be kept away", "err", err)
		}
	}
	for i := range s.gone {
		s.settle(&s.gone[i])
	}
	s.gone = s.gone[:0]
	return due || n > 0
}

// ours reports whether the frame of an event is for this worker. A SYN makes the
// worker that has it the owner of its flow; a frame of another one's flow goes
// there, and with the answer to an active open the flow comes to the worker that
// received it: further packets of the peer will arrive there, too.
func (s *slowSide) ours(ev *Event) bool {
	w, o := s.w, s.h.owners
	if o == nil {
		return true
	}
	var owner int
	if ev.Flags&(packet.SYN|packet.ACK) == packet.SYN {
		owner = o.claim(&ev.Key, w.id)
	} else {
		owner = o.owner(&ev.Key)
	}
	if owner >= 0 && owner != w.id {
		pkt := ev.Frame
		if ev.Dir == packet.FromInner && w.tap != nil {
			pkt = append(make([]byte, xdp.VnetHdrLen), pkt...)
		}
		w.handOver(owner, ev.Dir, pkt)
		return false
	}
	if ev.Via < 0 || ev.Dir != packet.FromOuter || ev.Flags&packet.SYN == 0 || ev.Flags&packet.ACK == 0 {
		return true
	}
	return !s.giveTo(w.peers[ev.Via], ev)
}

// giveTo moves a half-open flow to another worker together with the peer's
// answer, if that is the first one.
func (s *slowSide) giveTo(to *worker, ev *Event) bool {
	moved := s.m.Detach(ev.Key)
	if moved == nil {
		return false
	}
	// The flow is posted before anything of it is sent there: see collect.
	s.h.owners.move(&ev.Key, to.id)
	frame, key := ev.Frame, ev.Key
	adopt := func(w *worker) {
		now := w.now()
		if !w.slow.m.Adopt(moved, now) {
			return
		}
		w.slow.divert(key)
		w.slow.carryOut(w.slow.m.Input(packet.FromOuter, frame, now), now)
	}
	if !to.tryPost(adopt) {
		s.h.owners.move(&ev.Key, s.w.id)
		s.m.Adopt(moved, s.w.now())
		return false
	}
	delete(s.guarded, key)
	s.moved++
	return true
}

// settle gives up the ownership of a flow that this worker has nothing of any
// more.
func (s *slowSide) settle(k *packet.Key) {
	if o := s.h.owners; o != nil && !s.m.Knows(*k) && !s.w.eng.Has(k) {
		o.release(k, s.w.id)
	}
}

// divert lists a flow in the guard and in the diversion map, and steers its
// packets from the local stack to this worker. Without room it does neither.
func (s *slowSide) divert(k packet.Key) bool {
	if !s.protect(k, false) {
		return false
	}
	if !s.listed(s.h.diverter.InsertSteered(k.Bytes(), s.w.id)) {
		s.unguard(k, false)
		return false
	}
	return true
}

// fullFor is how long no flow is begun after a map took none: until after the
// first copy of the SYN that was lost.
const fullFor = 2 * time.Second

// listed takes the result of an insertion into a map. One that fails, because
// the map is full or the kernel has no memory for it, is not the last one.
func (s *slowSide) listed(err error) bool {
	if err == nil {
		return true
	}
	now := s.w.now()
	if s.mapFull++; now >= s.full {
		s.h.log.Warn("no room for a flow in the kernel's maps: new connections are not encrypted", "err", err)
	}
	s.full = now + fullFor
	return false
}

// finish handles what was left when the worker had stopped, so that no ended
// flow keeps its socket or its map entries.
func (s *slowSide) finish() {
	for now := s.w.now(); s.round(now); {
	}
	for k, agreed := range s.guarded {
		s.unguard(k, agreed)
	}
}

func (s *slowSide) handle(ev *Event, now time.Duration) {
	switch ev.Kind {
	case SlowFrame:
		if s.h.dead.reset(s.w.eng, ev, now) {
			return
		}
		if s.ours(ev) {
			s.carryOut(s.m.Input(ev.Dir, ev.Frame, now), now)
			s.settle(&ev.Key)
		}
	case FlowEnded:
		s.reasons[ev.Info.Reason]++
		if ev.Info.State == slowpath.StateFailed {
			s.remember(ev.Info)
		}
	case FlowGone:
		k := ev.Key
		k.VLAN = 0
		s.lately.add(k, now)
		s.m.Gone(ev.Key)
		if ev.Destroy {
			// The socket's reset may be among what is to be sent. What destroys a
			// socket resets its peer, too, which may have begun anew.
			s.w.transmit()
		}
		s.unguard(ev.Key, ev.Destroy)
		s.undivert(ev.Key)
		s.settle(&ev.Key)
	}
}

func (s *slowSide) carryOut(acts []slowpath.Action, now time.Duration) {
	eng := s.w.eng
	var refused []*slowpath.Job
	var unlisted []packet.Key // of which nothing must leave
	for i := range acts {
		a := &acts[i]
		if len(unlisted) > 0 && slices.Contains(unlisted, a.Key) {
			continue
		}
		switch a.Kind {
		case slowpath.SendOuter:
			eng.SendOuter(a.Frame, now)
		case slowpath.SendInner:
			eng.SendInner(a.Frame, now)
		case slowpath.Divert:
			if !s.divert(a.Key) {
				unlisted = append(unlisted, a.Key)
			}
		case slowpath.Undivert:
			s.w.transmit()
			// The guard goes first: what passes the diversion must not meet it.
			if _, ok := s.guarded[a.Key]; ok {
				s.unguard(a.Key, false)
			}
			s.undivert(a.Key)
		case slowpath.Unguard:
			s.unguard(a.Key, false)
		case slowpath.Guard:
			s.protect(a.Key, true)
		case slowpath.Install:
			s.protect(a.Est.Key, true)
			eng.Install(a.Est, now)
		case slowpath.Reinject:
			eng.Reinject(a.Dir, a.Frame, now)
		case slowpath.Agree:
			if !s.h.pool.add(s.w, a.Job) {
				refused = append(refused, a.Job)
			}
		case slowpath.Report:
			s.report(&a.Info)
		}
	}
	for _, j := range refused {
		s.carryOut(s.m.Agreed(j, now), now)
	}
	for _, k := range unlisted {
		// The next copy of the SYN finds that there is no room.
		s.m.Drop(k)
	}
}

func (s *slowSide) undivert(k packet.Key) {
	if err := s.h.diverter.Delete(k.Bytes()); err != nil {
		s.h.log.Warn("flow is still diverted", "flow", k.String(), "err", err)
	}
}

// protect lets the guard stand from the offer on (T22): until the inner handshake
// is released, a forged answer by a side door would be believed, and with it the
// beginning of a stream that is encrypted afterwards.
func (s *slowSide) protect(k packet.Key, agreed bool) bool {
	if s.h.gateway != nil {
		return true // its programs do it
	}
	before, ok := s.guarded[k]
	if !ok && !s.listed(s.h.guard.Insert(k.Bytes())) {
		return false
	}
	s.guarded[k] = agreed || before
	return true
}

func (s *slowSide) unguard(k packet.Key, destroy bool) {
	if s.h.gateway != nil {
		return
	}
	if destroy {
		if err := s.h.destroy(k.Bytes()); err != nil {
			s.h.log.Warn("socket of an aborted flow may be left", "flow", k.String(), "err", err)
			k.VLAN = 0
			s.orphans[k] = true
			return
		}
	}
	delete(s.guarded, k)
	bare := k
	bare.VLAN = 0
	if s.stranded(bare) {
		return
	}
	if err := s.h.guard.Delete(k.Bytes()); err != nil {
		s.h.log.Warn("flow is still guarded", "flow", k.String(), "err", err)
	}
}

func (s *slowSide) report(i *slowpath.Info) {
	switch i.State {
	case slowpath.StatePlain, slowpath.StateFailed:
		s.reasons[i.Reason]++
		s.remember(describe(i))
	}
}

func (s *slowSide) remember(f FlowInfo) {
	now := time.Now()
	k := 0
	for k < len(s.recent) && (now.Sub(s.recent[k].at) > keepRecent || len(s.recent)-k >= maxRecent) {
		k++
	}
	s.recent = append(s.recent[k:], recentFlow{now, f})
}

func describe(i *slowpath.Info) FlowInfo {
	f := FlowInfo{
		Local: i.Key.LocalAddr().String(), Remote: i.Key.RemoteAddr().String(), VLAN: i.Key.VLAN,
		State: i.State, Reason: i.Reason,
	}
	if i.TEP != 0 {
		f.TEP, f.Role = i.TEP.String(), i.Role.String()
	}
	return f
}

// describe lists half-open flows and the recent plain and failed ones.
func (s *slowSide) describe(now time.Duration) []FlowInfo {
	var fs []FlowInfo
	for _, i := range s.m.Flows() {
		f := describe(&i)
		f.Age = (now - i.Since).Seconds()
		fs = append(fs, f)
	}
	for _, r := range s.recent {
		if age := time.Since(r.at); age <= keepRecent {
			f := r.info
			f.Age = age.Seconds()
			fs = append(fs, f)
		}
	}
	return fs
}
