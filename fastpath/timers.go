package fastpath

import "time"

// A flow's timers. Zero is off; a timer that is on holds the time it is due.
const (
	timerCtl    = iota // resend control bytes (Init2, rekey-only frames) outward (T8)
	timerAck           // delayed outer ACK (T1)
	timerInner         // resend custody inward, or probe the inner window (T13)
	timerHold          // sealed bytes wait for the peer's window: probe or send a part (T6)
	timerFin           // an outer FIN waits for its FINp (T9), or an opened FINp for its FIN
	timerRekey         // the key has been used long enough (TC 3.8)
	timerLinger        // a closed flow is forgotten (T20)
	numTimers
)

// timerHeap orders flows by when they want to be looked at next. A flow is in
// it at most once; arming a timer later than the flow's entry costs nothing,
// the entry is put right when it comes up.
type timerHeap struct{ h []timerEntry }

type timerEntry struct {
	at time.Duration
	f  *flow
}

func (t *timerHeap) push(at time.Duration, f *flow) {
	t.h = append(t.h, timerEntry{at, f})
	f.heapAt = at
	f.heapIx = len(t.h) - 1
	t.up(f.heapIx)
}

func (t *timerHeap) up(i int) {
	for i > 0 {
		p := (i - 1) / 2
		if t.h[p].at <= t.h[i].at {
			return
		}
		t.swap(i, p)
		i = p
	}
}

func (t *timerHeap) down(i int) {
	for {
		c := 2*i + 1
		if c >= len(t.h) {
			return
		}
		if c+1 < len(t.h) && t.h[c+1].at < t.h[c].at {
			c++
		}
		if t.h[i].at <= t.h[c].at {
			return
		}
		t.swap(i, c)
		i = c
	}
}

func (t *timerHeap) swap(i, j int) {
	t.h[i], t.h[j] = t.h[j], t.h[i]
	t.h[i].f.heapIx, t.h[j].f.heapIx = i, j
}

func (t *timerHeap) remove(f *flow) {
	i := f.heapIx
	if i < 0 {
		return
	}
	last := len(t.h) - 1
	if i != last {
		t.swap(i, last)
	}
	t.h[last] = timerEntry{}
	t.h = t.h[:last]
	f.heapIx, f.heapAt = -1, 0
	if i < last {
		t.down(i)
		t.up(i)
	}
}

// arm sets a timer, overwriting its former time.
func (e *Engine) arm(f *flow, which int, at time.Duration) {
	f.timers[which] = at
	if f.heapIx < 0 {
		e.timers.push(at, f)
	} else if at < f.heapAt {
		f.heapAt = at
		e.timers.h[f.heapIx].at = at
		e.timers.up(f.heapIx)
	}
}

func (f *flow) disarm(which int) { f.timers[which] = 0 }

// Deadline returns when Tick wants to be called next.
func (e *Engine) Deadline() (at time.Duration, ok bool) {
	if len(e.timers.h) > 0 {
		at, ok = e.timers.h[0].at, true
	}
	if (e.buf.rings > trimFloor || e.buf.rings > 0 && e.buf.short()) && (!ok || e.trimAt < at) {
		at, ok = e.trimAt, true
	}
	if e.tab.n > 0 && (!ok || e.patrolAt < at) {
		at, ok = e.patrolAt, true
	}
	return at, ok
}

// Tick runs the timers that are due at now, and flushes what they caused.
func (e *Engine) Tick(now time.Duration) {
	e.now = now
	for len(e.timers.h) > 0 && e.timers.h[0].at <= now {
		f := e.timers.h[0].f
		e.timers.remove(f)
		var next time.Duration
		for i := range f.timers {
			if at := f.timers[i]; at != 0 && at <= now {
				f.timers[i] = 0
				e.fire(f, i)
			}
			if f.gone {
				break
			}
		}
		if f.gone {
			continue
		}
		for _, at := range f.timers {
			if at != 0 && (next == 0 || at < next) {
				next = at
			}
		}
		// Firing may have put the flow back already, for another timer.
		e.timers.remove(f)
		if next != 0 {
			e.timers.push(next, f)
		}
	}
	e.flush()
}
