package slowpath

import (
	"fmt"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// pair is two hosts, 1 and 2, with a cache each, that open connections to each
// other, also at the same time.
type pair struct {
	t      testing.TB
	c      [2]Config
	opened int
	used   [2]map[string]bool // identifiers of the secrets that secured a connection of the host
}

func newPair(t testing.TB) *pair {
	p := &pair{t: t}
	for i := range p.c {
		p.c[i] = Config{TEPs: []crypto.TEP{crypto.TEPX25519}, Cache: NewCache(0, 0), ResumeNonce: 8, Deadline: 20 * time.Second}
		p.used[i] = make(map[string]bool)
	}
	return p
}

// conn is one connection of a pair.
type conn struct {
	s      *sim
	second bool // host 2 opens it
	half   string
}

// opening prepares a connection that host 1, or host 2, opens.
func (p *pair) opening(second bool, wire func(n int, from *simHost, f []byte) []delivery) *conn {
	p.opened++
	c := &conn{s: newSim(p.t, link{}, &p.c[0], &p.c[1]), second: second}
	c.s.a.m.rand, c.s.b.m.rand = seeded(uint64(1000+2*p.opened)), seeded(uint64(1001+2*p.opened))
	c.s.wire = func(n int, from *simHost, f []byte) []delivery {
		if seg := parse(p.t, f, packet.FromInner); isSYN(seg) {
			o := readSYNOptions(seg.Options())
			if e, err := ParseENO(o.option()); err == nil {
				for _, sub := range e.Subs {
					if isResumption(sub) {
						c.half = string(sub.Data[:crypto.ResumeLen])
					}
				}
			}
		}
		if wire == nil {
			return []delivery{{f, 0}}
		}
		return wire(n, from, f)
	}
	return c
}

// run lets connections happen at the same time, and returns their outcomes.
func (p *pair) run(cs ...*conn) (outcomes []string) {
	p.t.Helper()
	for _, c := range cs {
		from, to := c.s.a, c.s.b
		if c.second {
			from, to = to, from
		}
		to.stack.state = "listen"
		from.stack.connect()
	}
	for now := time.Duration(0); now < 130*time.Second; now += time.Millisecond {
		if now > 2*time.Second {
			now += 100 * time.Millisecond
		}
		for _, c := range cs {
			c.s.run(now)
		}
	}
	for _, c := range cs {
		outcomes = append(outcomes, c.s.outcome())
		for i, h := range []*simHost{c.s.a, c.s.b} {
			if h.est == nil || !h.est.Resumed {
				continue
			}
			if c.half == "" || p.used[i][c.half] {
				p.t.Errorf("host %d: a secret was used twice", i+1)
			}
			p.used[i][c.half] = true
		}
		if c.s.a.est != nil && c.s.b.est != nil && c.s.a.est.Resumed != c.s.b.est.Resumed {
			p.t.Error("resumed at one end only")
		}
		if p.t.Failed() {
			c.s.dump()
		}
	}
	return outcomes
}

// resumed reports whether a connection resumed a session.
func (c *conn) resumed() bool { return c.s.a.est != nil && c.s.a.est.Resumed }

// Two connections that are opened in both directions at once propose the same
// secret: both fall back to fresh exchange (RFC 8548 section 3.5), and what
// comes of them resumes again, in either direction.
func TestCrossingConnections(t *testing.T) {
	p := newPair(t)
	p.run(p.opening(false, nil))
	a, b := p.opening(false, nil), p.opening(true, nil)
	for _, o := range p.run(a, b) {
		if o != "encrypted" {
			t.Fatalf("outcome %s", o)
		}
	}
	if a.half == "" || b.half == "" || a.resumed() || b.resumed() {
		t.Fatalf("proposed %x, %x; resumed %v, %v", a.half, b.half, a.resumed(), b.resumed())
	}
	for range 3 {
		for _, second := range []bool{true, false} {
			c := p.opening(second, nil)
			if o := p.run(c); o[0] != "encrypted" || !c.resumed() {
				t.Fatalf("outcome %s, resumed %v", o, c.resumed())
			}
		}
	}
	// Each direction prefers the sessions that it began: they do not clash
	// again.
	a, b = p.opening(false, nil), p.opening(true, nil)
	if o := p.run(a, b); o[0] != "encrypted" || o[1] != "encrypted" || !a.resumed() || !b.resumed() {
		t.Errorf("outcomes %v, resumed %v, %v", o, a.resumed(), b.resumed())
	}
}

// Connections opened one right after the other all resume, also when their SYNs
// arrive in another order.
func TestParallelResumption(t *testing.T) {
	for _, backwards := range []bool{false, true} {
		p := newPair(t)
		p.run(p.opening(false, nil))
		var cs []*conn
		for i := range lookahead {
			delay := time.Duration(0)
			if backwards {
				delay = time.Duration(lookahead-i) * 10 * time.Millisecond
			}
			cs = append(cs, p.opening(false, func(n int, _ *simHost, f []byte) []delivery {
				if n == 0 {
					return []delivery{{f, delay}}
				}
				return []delivery{{f, 0}}
			}))
		}
		for i, o := range p.run(cs...) {
			if o != "encrypted" || !cs[i].resumed() {
				t.Errorf("backwards %v, connection %d: %s, resumed %v", backwards, i, o, cs[i].resumed())
			}
		}
	}
}

// Whatever the wire does to connections in both directions, one after the other
// and at the same time, both ends agree and no secret serves twice.
func TestResumeRandomWire(t *testing.T) {
	outcomes := map[string]int{}
	for seed := range uint64(25) {
		r := seeded(3000 + seed)
		wire := func(_ int, _ *simHost, f []byte) []delivery {
			d := time.Duration(r.Uint64()%20) * time.Millisecond
			switch r.Uint64() % 8 {
			case 0:
				return nil
			case 1:
				return []delivery{{f, d}, {f, 3 * d}}
			}
			return []delivery{{f, d}}
		}
		p := newPair(t)
		if seed%2 == 0 {
			p.c[1].Offload = offloaded
		}
		for range 10 {
			var cs []*conn
			for range 1 + r.Uint64()%3 {
				c := p.opening(r.Uint64()%2 == 0, wire)
				c.s.computing = 4 * time.Millisecond
				cs = append(cs, c)
			}
			for i, o := range p.run(cs...) {
				outcomes[fmt.Sprint(o, " ", cs[i].resumed())]++
				if o != "encrypted" && o != "plain" {
					t.Errorf("seed %d: outcome %s", seed, o)
				}
			}
			if t.Failed() {
				t.FailNow()
			}
		}
	}
	if outcomes["encrypted true"] < 150 {
		t.Errorf("outcomes %v", outcomes)
	}
	t.Log(outcomes)
}
