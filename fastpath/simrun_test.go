package fastpath

import (
	"flag"
	"fmt"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

var (
	simSeed     = flag.Uint64("sim.seed", 0, "run the simulator with this seed alone")
	simFirst    = flag.Uint64("sim.first", 1, "the first seed of a run over many")
	simSegments = flag.String("sim.segments", "", "how many segments on the wire a run over many seeds takes, such as 1e9")
	simProgress = flag.Duration("sim.progress", 0, "print how far a run over many seeds has come, that often")
	simFailures = flag.Int("sim.failures", 10, "how many failing seeds end a run over many")
	simTrace    = flag.Bool("sim.trace", false, "log every packet")
)

// simGoal returns how many segments a run has to simulate: so many as the flag
// says, or the default.
func simGoal(t *testing.T) uint64 {
	if *simSegments == "" {
		if testing.Short() {
			return simSegmentsDefault / 20
		}
		return simSegmentsDefault
	}
	n, err := strconv.ParseFloat(*simSegments, 64)
	if err != nil || n < 1 {
		t.Fatalf("-sim.segments=%s: not a number of segments", *simSegments)
	}
	return uint64(n)
}

// simTally adds up what the seeds of a run did.
type simTally struct {
	segs, bytes, steps, flows, seeds uint64
	virtual                          time.Duration
	reasons                          map[string]int
}

func (a *simTally) add(s *sim) {
	a.seeds++
	a.segs += uint64(s.segs)
	a.bytes += s.bytes
	a.steps += uint64(s.steps)
	a.flows += uint64(len(s.flows))
	a.virtual += s.now
	for r, k := range s.reasons {
		a.reasons[r] += k
	}
}

func (a *simTally) String() string {
	return fmt.Sprintf("%d seeds, %d connections, %d segments, %d bytes, %d steps, %v of virtual time",
		a.seeds, a.flows, a.segs, a.bytes, a.steps, a.virtual.Round(time.Second))
}

// simRun plays the scenarios of ascending seeds on all CPUs until so many
// segments have been on the wire. A seed that failed is reported with the
// command that plays it again.
func simRun(t *testing.T, goal uint64, scenario func(seed uint64) *scenario) *simTally {
	t.Helper()
	// Each seed makes engines of its own, which live for milliseconds.
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	total := &simTally{reasons: map[string]int{}}
	next, failed := *simFirst, 0
	one := *simSeed != 0
	if one {
		next, goal = *simSeed, 1
	}
	var mu sync.Mutex
	start, shown := time.Now(), time.Now()
	var shownSegs uint64
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			var pool umemPool
			defer pool.close()
			for {
				mu.Lock()
				if total.segs >= goal || failed >= *simFailures || one && next > *simSeed {
					mu.Unlock()
					return
				}
				seed := next
				next++
				mu.Unlock()
				s := newSim(scenario(seed), &pool)
				err := s.guarded()
				s.close()
				if err == "" {
					err = s.stalled(&pool)
				}
				mu.Lock()
				total.add(s)
				if err != "" {
					failed++
					t.Errorf("seed %d: %s\nreplay: go test ./fastpath -run '^%s$' -sim.seed=%d", seed, err, t.Name(), seed)
				}
				if d := time.Since(shown); *simProgress > 0 && d >= *simProgress {
					fmt.Printf("%s: %v, next seed %d, %.0f segments a minute, %d failures; %v\n",
						time.Now().Format(time.DateTime), time.Since(start).Round(time.Second), next, float64(total.segs-shownSegs)/d.Minutes(), failed, total)
					shown, shownSegs = time.Now(), total.segs
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	d := time.Since(start)
	t.Logf("%v in %v: %.0f segments and %.0f connections a second; flows ended: %v",
		total, d.Round(time.Millisecond), float64(total.segs)/d.Seconds(), float64(total.flows)/d.Seconds(), total.reasons)
	return total
}

// guarded is run, with a panic as a violation.
func (s *sim) guarded() (err string) {
	defer func() {
		if p := recover(); p != nil {
			s.fail("panic: %v\n%s", p, debug.Stack())
			err = s.err
		}
	}()
	return s.run()
}

// umemPool keeps the packet memory of simulations that ended well.
type umemPool struct{ free []*xdp.Umem }

func (p *umemPool) get(chunks, size int) *xdp.Umem {
	if p != nil {
		for i, u := range p.free {
			if u.Chunks() == chunks && u.ChunkSize() == size {
				p.free = append(p.free[:i], p.free[i+1:]...)
				return u
			}
		}
	}
	u, err := xdp.NewUmem(xdp.UmemConfig{Chunks: chunks, ChunkSize: size})
	if err != nil {
		panic(err)
	}
	return u
}

// put takes packet memory back; of one with chunks missing nothing is used again.
func (p *umemPool) put(u *xdp.Umem) {
	if p == nil || u.Available() != u.Chunks() {
		u.Close()
		return
	}
	p.free = append(p.free, u)
}

func (p *umemPool) close() {
	for _, u := range p.free {
		u.Close()
	}
	p.free = nil
}
