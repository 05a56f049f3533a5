package fastpath

import (
	"crypto/rand"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// slowSide runs the slow path's machine on a goroutine of its own, off the
// workers: it carries out the machine's actions, keeps the diversion and guard
// maps, and remembers what became of flows that were not encrypted.
type slowSide struct {
	h      *Host
	m      *slowpath.Machine
	events chan []Event
	calls  chan func(*slowSide)
	stop   chan struct{}
	done   chan struct{}

	recent  []recentFlow // oldest first
	reasons map[string]uint64
	guarded map[packet.Key]bool
	tick    *time.Timer
	pulse   uint64 // the worker's, when last looked at
}

// How often the heartbeat is given, and how long after the last one the daemon
// counts as hung.
const (
	beatEvery = 100 * time.Millisecond
	beatStale = time.Second
)

type recentFlow struct {
	at   time.Time
	info FlowInfo
}

func newSlowSide(h *Host) *slowSide {
	return &slowSide{
		h: h,
		m: slowpath.New(slowpath.Config{
			TEPs: h.cfg.TEPs, AEADs: h.cfg.AEADs, Ports: h.cfg.selects(), Require: h.cfg.Require, MTU: h.caps.MTU,
		}, rand.Reader),
		events: make(chan []Event, 64), calls: make(chan func(*slowSide)), stop: make(chan struct{}), done: make(chan struct{}),
		reasons: make(map[string]uint64), guarded: make(map[packet.Key]bool), tick: time.NewTimer(time.Hour),
	}
}

func (s *slowSide) now() time.Duration { return time.Since(s.h.start) }

func (s *slowSide) run() {
	defer close(s.done)
	beat := time.NewTicker(beatEvery)
	defer beat.Stop()
	for {
		if at, ok := s.m.Deadline(); ok {
			s.tick.Reset(max(0, at-s.now()))
		}
		select {
		case evs := <-s.events:
			s.handle(evs)
		case fn := <-s.calls:
			fn(s)
		case <-s.tick.C:
			s.carryOut(s.m.Tick(s.now()))
		case <-beat.C:
			s.beat()
		case <-s.stop:
			return
		}
	}
}

// beat tells the BPF programs that the daemon works, as long as the worker's
// rounds go on. Without it they take it for hung, and divert no more SYNs.
func (s *slowSide) beat() {
	w := s.h.worker
	n := w.pulse.Load()
	if n == s.pulse && !w.asleep.Load() {
		return
	}
	s.pulse = n
	if err := s.h.diverter.Beat(); err != nil {
		s.h.log.Warn("heartbeat", "err", err)
	}
}

// call runs fn on the slow path's goroutine and waits for it.
func (s *slowSide) call(fn func(*slowSide)) {
	ran := make(chan struct{})
	select {
	case s.calls <- func(s *slowSide) { fn(s); close(ran) }:
		<-ran
	case <-s.done:
	}
}

func (s *slowSide) quit() { close(s.stop) }

// finish handles what was still queued when worker and slow path had stopped,
// so that no ended flow keeps its socket or its map entries.
func (s *slowSide) finish() {
	for {
		select {
		case evs := <-s.events:
			s.handle(evs)
			continue
		default:
		}
		break
	}
	s.handle(s.h.worker.waiting)
	for k := range s.guarded {
		s.unguard(k, true)
	}
}

func (s *slowSide) handle(evs []Event) {
	for i := range evs {
		ev := &evs[i]
		switch ev.Kind {
		case SlowFrame:
			s.carryOut(s.m.Input(ev.Dir, ev.Frame, s.now()))
		case FlowEnded:
			s.reasons[ev.Info.Reason]++
			if ev.Info.State == slowpath.StateFailed {
				s.remember(ev.Info)
			}
		case FlowGone:
			s.m.Gone(ev.Key)
			s.unguard(ev.Key, ev.Destroy)
			s.undivert(ev.Key)
		}
	}
}

func (s *slowSide) carryOut(acts []slowpath.Action) {
	w := s.h.worker
	for i := range acts {
		a := &acts[i]
		switch a.Kind {
		case slowpath.SendOuter:
			w.send(message{kind: msgSendOuter, frame: a.Frame})
		case slowpath.SendInner:
			w.send(message{kind: msgSendInner, frame: a.Frame})
		case slowpath.Divert:
			if err := s.h.diverter.Insert(a.Key.Bytes()); err != nil {
				s.h.log.Warn("flow cannot be diverted", "flow", a.Key.String(), "err", err)
			}
		case slowpath.Undivert:
			s.undivert(a.Key)
		case slowpath.Install:
			// The guard stands before the inner handshake is released (T22).
			s.guarded[a.Est.Key] = true
			if err := s.h.guard.Insert(a.Est.Key.Bytes()); err != nil {
				s.h.log.Warn("flow cannot be guarded", "flow", a.Est.Key.String(), "err", err)
			}
			w.send(message{kind: msgInstall, est: a.Est})
		case slowpath.Reinject:
			w.send(message{kind: msgReinject, dir: a.Dir, frame: a.Frame})
		case slowpath.Report:
			s.report(&a.Info)
		}
	}
}

func (s *slowSide) undivert(k packet.Key) {
	if err := s.h.diverter.Delete(k.Bytes()); err != nil {
		s.h.log.Warn("flow is still diverted", "flow", k.String(), "err", err)
	}
}

func (s *slowSide) unguard(k packet.Key, destroy bool) {
	if destroy {
		if err := xdp.DestroySocket(k.Bytes()); err != nil {
			s.h.log.Warn("socket of an aborted flow may be left", "flow", k.String(), "err", err)
			return
		}
	}
	delete(s.guarded, k)
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
	s.recent = append(append(s.recent[:0], s.recent[k:]...), recentFlow{now, f})
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
func (s *slowSide) describe() []FlowInfo {
	now := s.now()
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
