package slowpath

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// hosts are two hosts that open connections one after the other.
type hosts struct {
	t      testing.TB
	a, b   Config
	wire   func(n int, from *simHost, f []byte) []delivery
	opened int
}

func newHosts(t testing.TB) *hosts {
	return &hosts{
		t: t,
		a: Config{Cache: NewCache(0, 0), ResumeNonce: 8},
		b: Config{Cache: NewCache(0, 0), ResumeNonce: 8},
	}
}

// open opens a connection from a to b, and returns what it was and both ends.
func (h *hosts) open() (outcome string, s *sim) {
	h.t.Helper()
	return h.between(&h.a, &h.b)
}

func (h *hosts) between(a, b *Config) (outcome string, s *sim) {
	h.t.Helper()
	h.opened++
	s = newSim(h.t, link{}, a, b)
	s.a.m.rand, s.b.m.rand = seeded(uint64(1000+2*h.opened)), seeded(uint64(1001+2*h.opened))
	s.wire = h.wire
	return s.open(), s
}

// encrypted opens a connection that has to be encrypted, and resumed or not.
func (h *hosts) encrypted(resumed bool) *sim {
	h.t.Helper()
	return h.wants(&h.a, &h.b, resumed)
}

func (h *hosts) wants(a, b *Config, resumed bool) *sim {
	h.t.Helper()
	outcome, s := h.between(a, b)
	if outcome != "encrypted" || s.a.est.Resumed != resumed || s.b.est.Resumed != resumed {
		s.dump()
		h.t.Fatalf("connection %d: %s, want encrypted, resumed %v", h.opened, outcome, resumed)
	}
	return s
}

func TestResume(t *testing.T) {
	h := newHosts(t)
	first := h.encrypted(false)
	var vbits []bool
	h.wire = func(_ int, _ *simHost, f []byte) []delivery {
		if p := parse(t, f, packet.FromInner); p.Flags&packet.SYN != 0 {
			o := readSYNOptions(p.Options())
			e, err := ParseENO(o.option())
			if err != nil {
				t.Error(err)
			}
			s := e.Subs[len(e.Subs)-1]
			vbits = append(vbits, isResumption(s) && len(s.Data) == maxResumeData)
		}
		return []delivery{{f, 0}}
	}
	second := h.encrypted(true)
	if len(vbits) != 2 || !vbits[0] || !vbits[1] {
		t.Errorf("resumption suboptions with whole nonces in SYN and SYN-ACK: %v", vbits)
	}
	a := second.a.est
	if a.Session.ID() == first.a.est.Session.ID() {
		t.Error("the session ID is the same")
	}
	if id := a.Session.ID(); id[0] != byte(a.TEP)|enoV {
		t.Errorf("session ID begins with %#x", id[0])
	}
	if len(a.TxInit) != 0 || a.RxOffset != 0 {
		t.Errorf("Init of %d bytes sent, %d received", len(a.TxInit), a.RxOffset)
	}
	// One round trip: the SYN-ACK lets the application go on.
	if got, want := second.a.stack.established, 2*second.delay; got != want {
		t.Errorf("connect took %v, want %v", got, want)
	}
}

// Every secret serves once, and none is left out.
func TestResumeThousand(t *testing.T) {
	h := newHosts(t)
	ids := make(map[[crypto.SessionIDLen]byte]bool)
	for i := range 1000 {
		s := h.encrypted(i > 0)
		ids[s.a.est.Session.ID()] = true
	}
	if len(ids) != 1000 {
		t.Errorf("%d different session IDs", len(ids))
	}
}

// Either host may open the next connection; the keys stay with the roles of the
// original session (RFC 8548 section 3.5).
func TestResumeSwapsRoles(t *testing.T) {
	h := newHosts(t)
	h.encrypted(false)
	for i := range 6 {
		// The hosts of the simulation go by their place, the caches by their host.
		a, b := &h.a, &h.b
		if i%2 == 0 {
			a, b = b, a
			swapPeers(a.Cache, b.Cache)
		}
		s := h.wants(a, b, true)
		if i%2 == 0 {
			swapPeers(a.Cache, b.Cache)
		}
		if got := s.a.est.Session.Role(); (got == crypto.RoleB) != (i%2 == 0) {
			t.Errorf("connection %d: the opener keeps role %v", i, got)
		}
	}
}

// swapPeers makes the entries fit the addresses that the hosts have in the
// other place.
func swapPeers(caches ...*Cache) {
	for _, c := range caches {
		peers := make(map[[16]byte][]*chain)
		for addr, chains := range c.peers {
			addr[15] = 3 - addr[15]
			for _, h := range chains {
				h.peer = addr
			}
			peers[addr] = chains
		}
		c.peers = peers
	}
}

// A host that has forgotten costs nothing but the fresh exchange.
func TestResumeAfterRestart(t *testing.T) {
	for name, restart := range map[string]func(h *hosts){
		"passive": func(h *hosts) { h.b.Cache = NewCache(0, 0) },
		"active":  func(h *hosts) { h.a.Cache = NewCache(0, 0) },
		"flushed": func(h *hosts) { h.b.Cache.Flush(netip.Addr{}) },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHosts(t)
			h.encrypted(false)
			h.encrypted(true)
			restart(h)
			s := h.encrypted(false)
			if got, want := s.a.stack.established, 4*s.delay; got != want {
				t.Errorf("connect took %v, want the %v of a fresh exchange", got, want)
			}
			h.encrypted(true)
		})
	}
}

// Every frame of the handshake is lost in turn, and every pair: the outcome is
// always an encrypted connection, of the same kind at both ends.
func TestResumeLoss(t *testing.T) {
	for first := range 6 {
		for second := first; second < 8; second++ {
			t.Run(fmt.Sprintf("%d,%d", first, second), func(t *testing.T) {
				h := newHosts(t)
				h.encrypted(false)
				h.wire = func(n int, _ *simHost, f []byte) []delivery {
					if n == first || n == second {
						return nil
					}
					return []delivery{{f, 0}}
				}
				outcome, s := h.open()
				if outcome == "encrypted" {
					if s.a.est.Resumed != s.b.est.Resumed {
						t.Error("resumed at one end only")
					}
				} else if outcome != "plain" {
					// Two SYNs lost: the third goes without ENO (T19).
					s.dump()
					t.Errorf("outcome %s", outcome)
				}
				h.wire = nil
				if outcome, _ := h.open(); outcome != "encrypted" && outcome != "plain" {
					t.Errorf("next connection: %s", outcome)
				}
			})
		}
	}
}

// The SYN of a connection that was resumed is worth nothing when it is replayed:
// the secret is used.
func TestReplayedProposal(t *testing.T) {
	h := newHosts(t)
	h.encrypted(false)
	var syn []byte
	h.wire = func(_ int, _ *simHost, f []byte) []delivery {
		if p := parse(t, f, packet.FromInner); isSYN(p) {
			syn = bytes.Clone(f)
		}
		return []delivery{{f, 0}}
	}
	h.encrypted(true)

	if sub := h.answerTo(t, syn); sub.V {
		t.Errorf("a used proposal is answered with resumption: %+v", sub)
	}
	if n := h.b.Cache.List(0)[0].Next; n != 2 {
		t.Errorf("next secret %d, want 2", n)
	}
}

// A proposal whose connection does not come about costs no secret of the passive
// opener, and two at the same time do not get the same one.
func TestUnusedProposal(t *testing.T) {
	h := newHosts(t)
	h.encrypted(false)
	var syn []byte
	h.wire = func(_ int, _ *simHost, f []byte) []delivery {
		if p := parse(t, f, packet.FromInner); isSYN(p) && syn == nil {
			syn = bytes.Clone(f)
		}
		return nil
	}
	h.open()
	s := newScript(t, h.b)
	s.input(packet.FromOuter, replay(t, syn, 1))
	if sub := s.answer(t); !sub.V {
		t.Fatal("an unused proposal is not answered with resumption")
	}
	other := New(h.b, seeded(3))
	if acts := other.Input(packet.FromOuter, replay(t, syn, 2), s.now); len(acts) == 0 {
		t.Fatal("no answer")
	}
	for _, f := range other.flows {
		if f.resume {
			t.Error("the secret is promised to two connections")
		}
	}
	s.tick(2 * time.Minute)
	s = newScript(t, h.b)
	s.input(packet.FromOuter, replay(t, syn, 3))
	if sub := s.answer(t); !sub.V {
		t.Error("the secret did not come back")
	}
}

// replay is a captured SYN with another port and sequence number.
func replay(t *testing.T, syn []byte, n byte) []byte {
	f := bytes.Clone(syn)
	p := parse(t, f, packet.FromOuter)
	f[p.L4+1] += n
	f[p.L4+7] += n
	f[p.L4+tcpChecksum], f[p.L4+tcpChecksum+1] = 0, 0
	return f
}

// answer lets the inner stack answer the SYN that the script's Machine took,
// and returns the suboption that left.
func (s *script) answer(t *testing.T) Suboption {
	t.Helper()
	syn := s.one(SendInner)
	x := tcp{
		src: 2, dst: 1, sport: serverPort, dport: uint16(syn.Frame[syn.L4])<<8 | uint16(syn.Frame[syn.L4+1]),
		seq: localISS, ack: syn.Seq + 1, flags: packet.SYN | packet.ACK, wnd: 65160, opts: linuxSYN(1460, 11, 21),
	}
	s.input(packet.FromInner, s.link.frame(x))
	o := readSYNOptions(s.one(SendOuter).Options())
	e, err := ParseENO(o.option())
	if err != nil || len(e.Subs) != 1 || !e.PassiveRole() {
		t.Fatalf("answer %+v, %v", e, err)
	}
	return e.Subs[0]
}

// answerTo is the answer of a new Machine of host b to a captured SYN.
func (h *hosts) answerTo(t *testing.T, syn []byte) Suboption {
	s := newScript(t, h.b)
	s.input(packet.FromOuter, replay(t, syn, 1))
	return s.answer(t)
}

// Two hosts that propose the same secret at the same time, in two connections,
// fall back to fresh exchange in both (RFC 8548 section 3.5).
func TestCrossingProposals(t *testing.T) {
	h := newHosts(t)
	h.encrypted(false)
	all := func(crypto.TEP, crypto.AEAD) bool { return true }
	l := link{}
	ka, kb := l.key(1, clientPort, 2, serverPort), l.key(2, clientPort, 1, serverPort)
	ua, ub := h.a.Cache.propose(&ka, all, 0), h.b.Cache.propose(&kb, all, 0)
	if ua == nil || ub == nil || ua.i != 1 || ub.i != 1 {
		t.Fatalf("proposals %+v, %+v", ua, ub)
	}
	ha, hb := ua.ours(), ub.ours()
	if u := h.b.Cache.reserve(ha[:], ua.c.tep, all, 0); u != nil {
		t.Error("b agrees to a secret that it proposed itself")
	}
	if u := h.a.Cache.reserve(hb[:], ub.c.tep, all, 0); u != nil {
		t.Error("a agrees to a secret that it proposed itself")
	}
}

// Policies of one side alone are enough (RFC 8548 section 3.5).
func TestResumePolicies(t *testing.T) {
	set := func(p Policy) func(*packet.Key, packet.Direction) Policy {
		return func(*packet.Key, packet.Direction) Policy { return p }
	}
	for _, x := range []struct {
		name string
		a, b Policy
	}{
		{name: "a ignores", a: Policy{NoResume: true}},
		{name: "b ignores", b: Policy{NoResume: true}},
		{name: "a keeps nothing", a: Policy{NoCache: true}},
		{name: "b keeps nothing", b: Policy{NoCache: true}},
	} {
		t.Run(x.name, func(t *testing.T) {
			h := newHosts(t)
			h.a.Policy, h.b.Policy = set(x.a), set(x.b)
			for range 3 {
				h.encrypted(false)
			}
			if n := len(h.a.Cache.List(0)); x.a.NoCache && n != 0 {
				t.Errorf("a keeps %d sessions", n)
			}
			if n := len(h.b.Cache.List(0)); x.b.NoCache && n != 0 {
				t.Errorf("b keeps %d sessions", n)
			}
		})
	}
}

// Any pair of nonce lengths works, and what algorithms are no longer wanted is
// not resumed.
func TestResumeConfigs(t *testing.T) {
	for _, n := range [][2]int{{0, 0}, {0, 8}, {8, 0}, {3, 5}} {
		h := newHosts(t)
		h.a.ResumeNonce, h.b.ResumeNonce = n[0], n[1]
		h.encrypted(false)
		h.encrypted(true)
		h.encrypted(true)
	}
	h := newHosts(t)
	h.encrypted(false)
	// P-256 had no room beside the resumption suboption.
	h.b.TEPs = []crypto.TEP{crypto.TEPP256}
	if outcome, _ := h.open(); outcome != "plain" {
		t.Errorf("outcome %s", outcome)
	}
	h.encrypted(false)
	h = newHosts(t)
	h.encrypted(false)
	h.a.AEADs = []crypto.AEAD{crypto.ChaCha20Poly1305}
	h.encrypted(false)
	h.encrypted(true)
}

// With a full set of other options, and resumption, the SYN still offers the
// most preferred other TEP that fits; the TEP of the session is not repeated.
func TestResumeOffer(t *testing.T) {
	h := newHosts(t)
	h.encrypted(false)
	s := newScript(t, h.a)
	syn := s.connect()
	e, err := ParseENO(s.localENO)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(e.Subs); n != 2 || e.Subs[0].TEP != crypto.TEPX448 || !isResumption(e.Subs[1]) || e.Subs[1].TEP != crypto.TEPX25519 {
		t.Errorf("offer %x with options %x", s.localENO, syn.Options())
	}
	// Copies of the SYN carry the same option (RFC 8547 section 4.6).
	before := s.localENO
	if s.connect(); !bytes.Equal(before, s.localENO) {
		t.Errorf("copy of the SYN offers %x, the SYN %x", s.localENO, before)
	}
}

func TestCache(t *testing.T) {
	all := func(crypto.TEP, crypto.AEAD) bool { return true }
	key := func(n byte, port uint16) packet.Key {
		return packet.KeyOf(netip.MustParseAddrPort("10.0.0.1:99"), netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 1, n}), port))
	}
	made := byte(0)
	secret := func(n byte) *crypto.Secret {
		s := crypto.NewSession(crypto.RoleA, crypto.AES128GCM, byte(crypto.TEPX25519), nil, nil, nil, []byte{n}, []byte{1})
		return s.NextSecret()
	}
	add := func(c *Cache, n byte, port uint16, now time.Duration) {
		k := key(n, port)
		made++
		c.add(&k, true, crypto.TEPX25519, crypto.AES128GCM, crypto.RoleA, secret(made), now)
	}
	size := func(c *Cache) int { return len(c.List(0)) }

	t.Run("a peer cannot fill it", func(t *testing.T) {
		c := NewCache(100, 0)
		for range 50 {
			add(c, 1, 80, 0)
		}
		add(c, 2, 80, 0)
		if n := size(c); n != chainsPerPeer+1 {
			t.Errorf("%d chains", n)
		}
		if n := len(c.halves); n != (chainsPerPeer+1)*lookahead {
			t.Errorf("%d identifiers", n)
		}
	})
	t.Run("strangers do not evict who comes back", func(t *testing.T) {
		c := NewCache(10, 0)
		add(c, 1, 80, 0)
		k := key(1, 80)
		c.served(c.propose(&k, all, 0), true)
		for n := byte(2); n < 100; n++ {
			add(c, n, 80, 0)
		}
		if n := size(c); n != 10 {
			t.Errorf("%d chains", n)
		}
		if c.propose(&k, all, 0) == nil {
			t.Error("the peer that came back was evicted")
		}
	})
	t.Run("expiry", func(t *testing.T) {
		c := NewCache(0, time.Minute)
		add(c, 1, 80, 0)
		k := key(1, 80)
		if c.propose(&k, all, 59*time.Second) == nil {
			t.Error("expired early")
		}
		if c.propose(&k, all, time.Minute) != nil || len(c.halves) != 0 || len(c.peers) != 0 {
			t.Error("not expired")
		}
	})
	t.Run("the same endpoint first, then what the peer opened", func(t *testing.T) {
		c := NewCache(0, 0)
		add(c, 1, 80, 0)
		add(c, 1, 443, 1)
		k := key(1, 8080)
		if u := c.propose(&k, all, 2); u != nil {
			t.Errorf("a session of port %d proposed to port 8080", u.c.port)
		}
		c.add(&k, false, crypto.TEPX25519, crypto.AES128GCM, crypto.RoleB, secret(77), 2)
		for port, want := range map[uint16]uint16{80: 80, 443: 443, 8080: 0} {
			k := key(1, port)
			if u := c.propose(&k, all, 3); u == nil || u.c.port != want {
				t.Errorf("port %d: %+v", port, u)
			}
		}
	})
	t.Run("a chain whose peer opened a connection later", func(t *testing.T) {
		c := NewCache(0, 0)
		add(c, 1, 80, 0)
		k, other := key(1, 80), key(1, 8080)
		c.restore(c.reserve(halfOf(c, &k), crypto.TEPX25519, all, 1))
		if c.propose(&other, all, 1) != nil {
			t.Error("proposed to another port after a connection that came to nothing")
		}
		c.served(c.propose(&k, all, 1), true)
		if c.propose(&other, all, 1) != nil {
			t.Error("proposed to another port after a connection of ours")
		}
		c.served(c.reserve(c.peers[k.Remote][0].next().theirs[:], crypto.TEPX25519, all, 1), true)
		if c.propose(&other, all, 1) == nil {
			t.Error("not proposed to another port of a peer that opens connections")
		}
	})
	t.Run("the peer may skip secrets", func(t *testing.T) {
		c, p := NewCache(0, 0), NewCache(0, 0)
		k := key(1, 80)
		mine, theirs := secret(1), secret(1)
		c.add(&k, true, crypto.TEPX25519, crypto.AES128GCM, crypto.RoleB, mine, 0)
		p.add(&k, true, crypto.TEPX25519, crypto.AES128GCM, crypto.RoleA, theirs, 0)
		var taken []*unused
		for range lookahead + 1 {
			taken = append(taken, p.propose(&k, all, 0))
		}
		for i, want := range []bool{false, true, true, true, true} {
			i = len(taken) - 1 - i
			half := taken[i].ours()
			if got := c.reserve(half[:], crypto.TEPX25519, all, 0) != nil; got != want {
				t.Errorf("secret %d known: %v, want %v", taken[i].i, got, want)
			}
		}
		half := taken[lookahead].ours()
		if c.reserve(half[:], crypto.TEPX448, all, 0) != nil {
			t.Error("known for another TEP")
		}
		if c.reserve(half[:], crypto.TEPX25519, all, 0) == nil {
			t.Error("not known after those before it were used")
		}
		if c.reserve(half[:], crypto.TEPX25519, all, 0) != nil {
			t.Error("known twice")
		}
	})
	t.Run("a peer that skips for ever", func(t *testing.T) {
		c, p := NewCache(0, 0), NewCache(0, 0)
		k := key(1, 80)
		c.add(&k, true, crypto.TEPX25519, crypto.AES128GCM, crypto.RoleB, secret(1), 0)
		p.add(&k, true, crypto.TEPX25519, crypto.AES128GCM, crypto.RoleA, secret(1), 0)
		for range 100 {
			p.propose(&k, all, 0)
			half := p.propose(&k, all, 0).ours()
			if c.reserve(half[:], crypto.TEPX25519, all, 0) == nil {
				t.Fatal("lost the chain")
			}
			if n := len(c.halves); n > maxUnused {
				t.Fatalf("%d secrets kept", n)
			}
		}
	})
	t.Run("flush", func(t *testing.T) {
		c := NewCache(0, 0)
		add(c, 1, 80, 0)
		add(c, 1, 81, 0)
		add(c, 2, 80, 0)
		k := key(1, 81)
		u := c.reserve(halfOf(c, &k), crypto.TEPX25519, all, 0)
		if n := c.Flush(netip.MustParseAddr("10.0.1.1")); n != 2 {
			t.Errorf("flushed %d", n)
		}
		c.restore(u)
		if len(c.peers) != 1 || len(c.halves) != lookahead {
			t.Error("what was flushed came back")
		}
		if n := c.Flush(netip.Addr{}); n != 1 || len(c.halves) != 0 {
			t.Errorf("flushed %d of all", n)
		}
	})
}

// halfOf is the identifier half that the peer of k would send.
func halfOf(c *Cache, k *packet.Key) []byte {
	for _, h := range c.peers[k.Remote] {
		if h.port == k.RPort {
			return h.secrets[0].theirs[:]
		}
	}
	return nil
}
