package fastpath

import (
	"fmt"
	"math"
	"slices"
	"time"
)

// Progress: no connection may rest for longer than plain model TCP does under
// the same seed, times a factor.

const (
	stallFactor = 3
	stallTwins  = 12
	stallRTO    = 4 * time.Second // the longest timeout of a model
	stallChance = 1e-7            // that packets are lost so often in a row is bad luck
)

// stalled compares the longest pause of each connection with that of its twin
// without encryption. Chance strikes other packets of the twin: so many losses
// in a row as chance may bring are nobody's fault, nor is the longest outage, and
// before a connection is found guilty the worst of several twins counts.
func (s *sim) stalled(pool *umemPool) string {
	if s.sc.mayAbort && s.sc.net[0].attack+s.sc.net[1].attack > 0 {
		// An attacker in the path can put both ends out of step, as in TCP.
		return ""
	}
	free := s.badLuck()
	base := make([]time.Duration, len(s.flows))
	for twin := range stallTwins {
		worst := -1
		for i, f := range s.flows {
			if f.stall() > free+stallFactor*base[i] {
				worst = i
			}
		}
		if worst < 0 {
			return ""
		}
		if twin == stallTwins-1 {
			return fmt.Sprintf("at %v: flow %d stalled for %v, plain TCP for %v; luck is worth %v", s.now, worst, s.flows[worst].stall(), base[worst], free)
		}
		p := newSim(s.sc.plainTwin(uint64(twin)), pool)
		err := p.guarded()
		p.close()
		if err != "" {
			return fmt.Sprintf("%s, in plain twin %d", err, twin)
		}
		for i, f := range p.flows {
			base[i] = max(base[i], f.stall())
		}
	}
	return ""
}

// badLuck is for how long timeouts in a row may go on by chance.
func (s *sim) badLuck() time.Duration {
	pass := 1.0
	var outage time.Duration
	for i, n := range s.nodes {
		c := &s.sc.net[i]
		pass *= (1 - c.loss) * (1 - c.corrupt) * (1 - c.tapLoss) * (1 - c.tapReadLoss)
		outage += n.longest
	}
	rounds := 4.0
	if pass < 1 {
		rounds += math.Log(stallChance) / math.Log(1-pass)
	}
	return outage + time.Duration(rounds*float64(stallRTO))
}

func (f *simFlow) stall() time.Duration { return max(f.m[0].stall, f.m[1].stall) }

// plainTwin is the same scenario between hosts without daemons.
func (sc *scenario) plainTwin(k uint64) *scenario {
	t := *sc
	t.lives, t.resume, t.daemon = true, false, [2]bool{}
	t.seed ^= k << 48
	for i := range t.net {
		n := &t.net[i]
		n.forge, n.attack = 0, 0
		n.loss += sc.net[i].tapReadLoss + sc.net[1-i].tapLoss
	}
	t.flows = slices.Clone(sc.flows)
	for i := range t.flows {
		t.flows[i].warp = [2]warp{}
		t.flows[i].crossing = sc.lives && t.flows[i].crossing
	}
	return &t
}
