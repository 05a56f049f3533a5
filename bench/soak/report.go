package main

import (
	"context"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// progress logs now and then how it goes.
func (s *soak) progress(ctx context.Context) {
	every := min(max(s.duration/60, 2*time.Second), time.Minute)
	for wait(ctx, every) {
		line := s.counts()
		for _, h := range s.hosts {
			if m, err := h.sample(ctx); err == nil {
				line += fmt.Sprintf("; %s: %d flows, %d goroutines, %d files, heap %.1f MiB, RSS %.1f MiB", h.name, m.flows, m.goroutines, m.fds, mib(m.heap), mib(m.rss))
			}
		}
		s.log("%s", line)
	}
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }

func (s *soak) counts() string {
	return fmt.Sprintf("%d connections: %d exact, %d reset as planned, %d ended by outages, %d with a reason; %d MiB; asked: %d encrypted (%d resumed), %d plain",
		s.nextID.Load(), atomic.LoadUint64(&s.sum.exact), atomic.LoadUint64(&s.sum.planned), atomic.LoadUint64(&s.sum.disturbed), atomic.LoadUint64(&s.sum.explained),
		atomic.LoadInt64(&s.sum.bytes)>>20, atomic.LoadUint64(&s.sum.encrypted), atomic.LoadUint64(&s.sum.resumed), atomic.LoadUint64(&s.sum.plain))
}

// quiet lets all connections end and returns what the daemons use then.
func (s *soak) quiet(ctx context.Context) (out [2]*sample) {
	s.paused.Store(true)
	defer s.paused.Store(false)
	for s.active.Load() > 0 && wait(ctx, 50*time.Millisecond) {
	}
	for i, h := range s.hosts {
		s.settle(ctx, h)
		if m, err := h.sample(ctx); err == nil {
			out[i] = &m
		} else if ctx.Err() == nil {
			s.problem("metrics of %s: %v", h.name, err)
		}
	}
	return out
}

// settle waits until a daemon has no flows.
func (s *soak) settle(ctx context.Context, h *host) {
	deadline := time.Now().Add(patience)
	for {
		d := h.daemon()
		if d == nil {
			return
		}
		fs, err := d.Flows(ctx)
		left := slices.DeleteFunc(fs, func(f fastpath.FlowInfo) bool {
			return f.State == slowpath.StatePlain || f.State == slowpath.StateFailed
		})
		switch {
		case ctx.Err() != nil, err == nil && len(left) == 0:
			return
		case time.Now().After(deadline):
			s.problem("%s still has flows although nobody is connected: %v %+v", h.name, err, left)
			return
		}
		wait(ctx, 100*time.Millisecond)
	}
}

// What a daemon may use more at the end of the second era than at its beginning.
const (
	moreGoroutines = 2
	moreFiles      = 2
	moreMemory     = 1.2
	moreBytes      = 16 << 20
)

func (s *soak) compare(name string, before, after *sample) {
	if before == nil || after == nil {
		// Too short a run for the comparison.
		s.log("%s: not compared", name)
		return
	}
	s.log("%s, without connections, at the beginning and the end of the second era: goroutines %d, %d; files %d, %d; heap %.1f, %.1f MiB; RSS %.1f, %.1f MiB", name,
		before.goroutines, after.goroutines, before.fds, after.fds, mib(before.heap), mib(after.heap), mib(before.rss), mib(after.rss))
	switch {
	case after.goroutines > before.goroutines+moreGoroutines:
		s.problem("%s: goroutines grew from %d to %d", name, before.goroutines, after.goroutines)
	case after.fds > before.fds+moreFiles:
		s.problem("%s: open files grew from %d to %d", name, before.fds, after.fds)
	case float64(after.rss) > moreMemory*float64(before.rss)+moreBytes:
		s.problem("%s: memory grew from %.1f to %.1f MiB", name, mib(before.rss), mib(after.rss))
	}
}

// report stops the daemons, and says how it all ended.
func (s *soak) report() error {
	for _, h := range s.hosts {
		d := h.daemon()
		if d == nil {
			continue
		}
		s.settle(s.ctx, h)
		h.keepReasons(s.ctx, d)
		if err := d.Stop(); err != nil {
			s.problem("the daemon of %s did not stop well: %v\n%s", h.name, err, tail(d.Logs()))
		}
	}
	if s.sum.exact == 0 || s.sum.encrypted == 0 {
		s.problem("no stream was exact, or none was encrypted: this was no test")
	}
	s.log("end after %v: %s", time.Since(s.begin).Round(time.Second), s.counts())
	s.log("restarts %d, kills %d, hangs %d, cache flushes %d, rekey commands %d", s.sum.restarts, s.sum.kills, s.sum.hangs, s.sum.flushes, s.sum.rekeys)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log("ended by outages: %s", list(s.sum.disturbances))
	s.log("ended with a reason: %s", list(s.sum.explanations))
	for _, h := range s.hosts {
		s.log("reasons at %s, as far as its daemons could be asked: %s", h.name, list(h.reasons))
	}
	s.log("this program: %d goroutines", runtime.NumGoroutine())
	if n := len(s.problems); n > 0 {
		return fmt.Errorf("%d problems, the first: %s", n, s.problems[0])
	}
	s.log("no problem: every stream was exact, or was reset with a reason")
	return nil
}

func list(m map[string]uint64) string {
	text := ""
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if text != "" {
			text += ", "
		}
		text += fmt.Sprintf("%s %d", k, m[k])
	}
	if text == "" {
		return "none"
	}
	return text
}
