package fastpath

import (
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// shortScenario is a whole life in few packets: Init2 still on its way, data
// both ways in several frames, a rekey, both ends of stream.
func shortScenario(variant int) *scenario {
	sc := plainScenario(uint64(variant))
	sc.rekeyFrames = 3
	sc.limit = 3 * time.Minute
	f := &sc.flows[0]
	f.initAcked = 0
	f.sack, f.ts = variant&1 != 0, variant&2 != 0
	for k := range f.model {
		f.model[k].lossy = true
		f.model[k].gso = 0
		f.app[k] = appConfig{total: 4500, write: 1500}
	}
	if variant&4 != 0 {
		f.app[0].closeWait = true
		f.app[1].total = 10
	}
	f.fix()
	return sc
}

// dropRun plays a scenario in which the packets with the given numbers get
// lost: on the wire, or between an engine and its stack.
func dropRun(t *testing.T, variant int, wire bool, drop ...int) int {
	t.Helper()
	s := newSim(shortScenario(variant), nil)
	defer s.close()
	n := 0
	s.drop = func(onWire bool) bool {
		if onWire != wire {
			return false
		}
		n++
		for _, d := range drop {
			if n-1 == d {
				return true
			}
		}
		return false
	}
	if err := s.run(); err != "" {
		t.Errorf("variant %d, wire %v, without packets %v: %s", variant, wire, drop, err)
	}
	return n
}

// Every single packet, and on the wire every pair of those near one another,
// is lost in turn: the connection ends well all the same.
func TestSimDropEach(t *testing.T) {
	for variant := range 8 {
		for _, wire := range []bool{true, false} {
			n := dropRun(t, variant, wire)
			if n < 10 {
				t.Fatalf("variant %d has only %d packets", variant, n)
			}
			for i := range n {
				dropRun(t, variant, wire, i)
				if !wire || testing.Short() {
					continue
				}
				for j := i + 1; j < min(n, i+8); j++ {
					dropRun(t, variant, wire, i, j)
				}
			}
		}
	}
}

// Segments without data of the inner stack, the Init message and rekey answers,
// are lost in every pair.
func TestSimDropControl(t *testing.T) {
	sc := func() *scenario {
		sc := shortScenario(3)
		// One side says nothing by itself: all it sends is control.
		sc.flows[0].app[1].total = 0
		sc.flows[0].app[1].closeWait = true
		sc.flows[0].app[0] = appConfig{total: 6000, write: 700, writeGap: 20 * time.Millisecond}
		return sc
	}
	run := func(drop ...int) (n int) {
		s := newSim(sc(), nil)
		defer s.close()
		s.dropSegment = func(from int, g *packet.Segment) bool {
			if from != 1 || g.Len() == 0 {
				return false
			}
			n++
			for _, d := range drop {
				if n-1 == d {
					return true
				}
			}
			return false
		}
		if err := s.run(); err != "" {
			t.Errorf("without control segments %v: %s", drop, err)
		}
		if s.flows[0].wire[1].rekeys == 0 && s.flows[0].wire[0].rekeys == 0 {
			t.Error("nobody rekeyed")
		}
		return n
	}
	n := run()
	for i := range n {
		for j := i; j < n+2; j++ {
			run(i, j)
		}
	}
	if n < 3 {
		t.Errorf("only %d control segments", n)
	}
}
