package slowpath

import (
	"fmt"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// mishap is what happens to one frame on the wire.
type mishap struct {
	name string
	fn   func(f []byte) []delivery
}

var mishaps = []mishap{
	{"drop", func([]byte) []delivery { return nil }},
	{"dup", func(f []byte) []delivery { return []delivery{{f, 0}, {f, 0}} }},
	{"late dup", func(f []byte) []delivery { return []delivery{{f, 0}, {f, 1700 * time.Millisecond}} }},
	{"reorder", func(f []byte) []delivery { return []delivery{{f, 2 * time.Millisecond}} }},
	{"delay", func(f []byte) []delivery { return []delivery{{f, 400 * time.Millisecond}} }},
	{"long delay", func(f []byte) []delivery { return []delivery{{f, 1300 * time.Millisecond}} }},
}

// handshakeFrames is more than the frames of a handshake with one loss.
const handshakeFrames = 9

// withMishaps runs a connection whose i-th frames meet with mishaps.
func withMishaps(t *testing.T, bad map[int]mishap, rtt time.Duration) {
	t.Helper()
	c := &Config{TEPs: []crypto.TEP{crypto.TEPX25519}}
	s := newSim(t, link{}, c, c)
	s.delay = rtt / 2
	lostSYNs := 0
	s.wire = func(n int, _ *simHost, f []byte) []delivery {
		m, ok := bad[n]
		if !ok {
			return []delivery{{f, 0}}
		}
		if p := parse(t, f, packet.FromInner); p.Flags&packet.SYN != 0 {
			lostSYNs++
		}
		return m.fn(f)
	}
	switch got := s.open(); {
	case got == "encrypted", got == "plain" && lostSYNs == 2:
	default:
		t.Errorf("outcome %s", got)
	}
	if t.Failed() {
		s.dump()
	}
}

func TestLossOfOne(t *testing.T) {
	for _, rtt := range []time.Duration{time.Millisecond, 10 * time.Millisecond, 300 * time.Millisecond} {
		for i := range handshakeFrames {
			for _, m := range mishaps {
				t.Run(fmt.Sprintf("%v/%d %s", rtt, i, m.name), func(t *testing.T) {
					withMishaps(t, map[int]mishap{i: m}, rtt)
				})
			}
		}
	}
}

func TestLossOfTwo(t *testing.T) {
	for i := range handshakeFrames {
		for j := range i {
			for _, m := range mishaps {
				for _, n := range mishaps {
					t.Run(fmt.Sprintf("%d %s, %d %s", j, n.name, i, m.name), func(t *testing.T) {
						withMishaps(t, map[int]mishap{i: m, j: n}, 10*time.Millisecond)
					})
				}
			}
		}
	}
}

// A round trip so long that the inner stack repeats its SYN meanwhile.
func TestLongRoundTrip(t *testing.T) {
	for _, rtt := range []time.Duration{1100 * time.Millisecond, 1500 * time.Millisecond, 2900 * time.Millisecond} {
		t.Run(rtt.String(), func(t *testing.T) {
			for i := range 4 {
				withMishaps(t, map[int]mishap{8 + i: mishaps[0]}, rtt)
			}
		})
	}
}

// Random loss, duplication and reordering all the time.
func TestRandomWire(t *testing.T) {
	outcomes := map[string]int{}
	for seed := range uint64(300) {
		r := seeded(1000 + seed)
		c := &Config{TEPs: []crypto.TEP{crypto.TEPX25519}, Deadline: 20 * time.Second}
		s := newSim(t, link{v6: seed%2 == 0}, c, c)
		s.undivertDelay = time.Duration(seed%3) * 100 * time.Microsecond
		s.wire = func(_ int, _ *simHost, f []byte) []delivery {
			d := time.Duration(r.Uint64()%20) * time.Millisecond
			switch r.Uint64() % 6 {
			case 0:
				return nil
			case 1:
				return []delivery{{f, d}, {f, 3 * d}}
			}
			return []delivery{{f, d}}
		}
		got := s.open()
		outcomes[got]++
		if got != "encrypted" && got != "plain" {
			t.Errorf("seed %d: outcome %s", seed, got)
		}
		if t.Failed() {
			s.dump()
			t.FailNow()
		}
	}
	if outcomes["encrypted"] < 200 {
		t.Errorf("outcomes %v", outcomes)
	}
}
