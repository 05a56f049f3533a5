package fastpath

import (
	"sync"
	"time"
)

// How long XDP passes SYNs to the stack when there were too many: the first time,
// and at most. It doubles when the next flood, or more of the same, comes within
// floodEvery. It ends before that when fewer than calmSYNs were passed in calmFor,
// but never before shedFirst.
const (
	shedFirst  = 8 * time.Second
	shedMost   = 64 * time.Second
	floodEvery = 2 * time.Minute
	calmFor    = 2 * time.Second
	calmSYNs   = 200
)

// shedder has XDP pass SYNs from the wire to the stack while a worker has too
// many half-open flows, and for a while after that: a flood then costs what it
// would cost without the daemon, and the time of the workers belongs to the flows
// that there are. Any goroutine may use it.
type shedder struct {
	mu    sync.Mutex
	on    bool
	since time.Time // when it was turned on
	until time.Time
	hold  time.Duration

	looked time.Time // when passed was read, since it was turned on
	passed uint64    // SYNs that were passed by then
}

// crowded is told by a worker that has too many half-open flows.
func (s *shedder) crowded(now time.Time, set func(bool) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.on {
		return nil
	}
	if s.hold = min(2*s.hold, shedMost); now.Sub(s.since) > floodEvery {
		s.hold = shedFirst
	}
	s.on, s.since, s.until = true, now, now.Add(s.hold)
	s.looked = time.Time{}
	return set(true)
}

// tick ends it in time. passed tells how many SYNs were ever passed.
func (s *shedder) tick(now time.Time, passed func() (uint64, error), set func(bool) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.on {
		return nil
	}
	calm := false
	if now.Before(s.until) {
		if now.Sub(s.since) < shedFirst-calmFor || now.Sub(s.looked) < calmFor {
			return nil
		}
		n, err := passed()
		if err != nil {
			return err
		}
		calm = !s.looked.IsZero() && n-s.passed < calmSYNs
		s.looked, s.passed = now, n
		if !calm {
			return nil
		}
	}
	s.on = false
	return set(false)
}
