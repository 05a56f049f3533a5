package slowpath

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

func anyExchange(crypto.TEP, crypto.AEAD) bool { return true }

// withSecret returns a configuration and the cache of its peer, which share one
// key exchange for the given TEP; role is that of the configured host.
func withSecret(role crypto.Role, tep crypto.TEP) (cfg Config, peer *Cache) {
	secret := func() *crypto.Secret {
		s := crypto.NewSession(role, crypto.AES128GCM, byte(tep), nil, nil, nil, []byte{1}, []byte{1})
		return s.NextSecret()
	}
	cfg = Config{Cache: NewCache(0, 0), ResumeNonce: 8}
	peer = NewCache(0, 0)
	k, r := link{}.key(1, clientPort, 2, serverPort), link{}.key(2, serverPort, 1, clientPort)
	cfg.Cache.add(&k, true, tep, crypto.AES128GCM, role, secret(), 0)
	peer.add(&r, true, tep, crypto.AES128GCM, role.Peer(), secret(), 0)
	return cfg, peer
}

var peerNonce = []byte("NONCE-99")

// proposed begins a passive open by a peer that proposes resumption, and brings
// it to the point where the first ACK is awaited.
func (s *script) proposed(peer *Cache) *unused {
	s.t.Helper()
	r := s.link.key(2, serverPort, 1, clientPort)
	u := peer.propose(&r, anyExchange, 0)
	if u == nil {
		s.t.Fatal("nothing to propose")
	}
	s.peerENO = AppendOffer(nil, 0, nil, u.suboption(peerNonce))
	s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: withENO(linuxSYN(1400, 21, 0), s.peerENO)})
	return u
}

// wantResumed checks the keys of a resumed flow against the peer's.
func (s *script) wantResumed(e *Established, u *unused) {
	s.t.Helper()
	o, err := ParseENO(s.localENO)
	if err != nil {
		s.t.Fatal(err)
	}
	mine := o.Subs[len(o.Subs)-1].Data[crypto.ResumeLen:]
	want := u.session(byte(e.TEP)|enoV, peerNonce, mine)
	if !e.Resumed || e.Session.ID() != want.ID() || e.Session.Role() != want.Role().Peer() {
		s.t.Fatal("session ID or role differs from the peer's")
	}
	if len(e.TxInit)+e.RxOffset+len(e.RxPending) != 0 {
		s.t.Errorf("Init of %d, %d bytes, %d pending", len(e.TxInit), e.RxOffset, len(e.RxPending))
	}
}

// The segment that enables encryption goes on to the fast path, whatever it
// brings and wherever in the stream: the pure ACK may be lost or late.
func TestResumedFirstSegment(t *testing.T) {
	for _, role := range []crypto.Role{crypto.RoleA, crypto.RoleB} {
		for name, first := range map[string]tcp{
			"pure ACK":     firstACK(true, 0, nil),
			"frames":       firstACK(true, 0, []byte("frames")),
			"second frame": firstACK(true, 1000, []byte("frames")),
		} {
			t.Run(name, func(t *testing.T) {
				cfg, peer := withSecret(role, crypto.TEPX25519)
				s := newScript(t, cfg)
				u := s.proposed(peer)
				s.answered()
				s.outer(first)
				s.wantKinds(Install, SendInner, Reinject)
				s.wantResumed(s.installed(), u)
				if ack := s.one(SendInner); ack.Seq != peerISS+1 || ack.Len() != 0 || hasENO(ack.Options()) || ack.Flags != packet.ACK {
					t.Errorf("released %+v", ack)
				}
				for _, a := range s.acts {
					if a.Kind == Reinject && !bytes.Equal(parse(t, a.Frame, packet.FromOuter).Payload(), first.data) {
						t.Error("the frames are lost")
					}
				}
				s.wantReport(StateEncrypted, "")
				if c := s.m.Counters(); c[countResumed] != 1 {
					t.Errorf("counters %v", c)
				}
			})
		}
	}
}

// Without ENO in the first ACK the secret was not used.
func TestResumedWithoutENOInAck(t *testing.T) {
	cfg, peer := withSecret(crypto.RoleB, crypto.TEPX25519)
	s := newScript(t, cfg)
	u := s.proposed(peer)
	half := u.ours()
	s.answered()
	if cfg.Cache.reserve(half[:], crypto.TEPX25519, anyExchange, 0) != nil {
		t.Error("promised twice")
	}
	s.outer(firstACK(false, 0, []byte("plain")))
	s.wantReport(StatePlain, ReasonNoENOInAck)
	if cfg.Cache.reserve(half[:], crypto.TEPX25519, anyExchange, 0) == nil {
		t.Error("the secret did not come back")
	}
}

// tightSYNACK is a peer's SYN-ACK whose options leave room for resumption.
func tightSYNACK(eno []byte) tcp {
	x := synack(nil)
	x.opts = withENO([]byte{2, 4, 5, 120, 1, 3, 3, 7}, eno)
	return x
}

// An active opener goes on at once: the ACK with ENO, the keys, and the SYN-ACK
// for the inner stack.
func TestResumedSYNACK(t *testing.T) {
	for _, role := range []crypto.Role{crypto.RoleA, crypto.RoleB} {
		cfg, peer := withSecret(role, crypto.TEPX25519)
		s := newScript(t, cfg)
		s.connect()
		o, err := ParseENO(s.localENO)
		if err != nil {
			t.Fatal(err)
		}
		half := o.Subs[len(o.Subs)-1].Data[:crypto.ResumeLen]
		u := peer.reserve(half, crypto.TEPX25519, anyExchange, 0)
		if u == nil {
			t.Fatal("the peer does not know the secret")
		}
		s.peerENO = AppendAnswer(nil, enoA, u.suboption(peerNonce))
		s.outer(tightSYNACK(s.peerENO))
		s.wantKinds(SendOuter, Install, SendInner)
		e := s.installed()
		s.wantResumed(e, u)
		if !e.Unheard || !e.PeerAppAware {
			t.Errorf("unheard %v, application-aware peer %v", e.Unheard, e.PeerAppAware)
		}
		if ack := s.one(SendOuter); !hasENO(ack.Options()) || ack.Ack != peerISS+1 || ack.Len() != 0 {
			t.Errorf("sent %+v", ack)
		}
	}
}

// The secret that follows is kept by the cache alone: a copy in the session would
// lie in memory as long as the connection lasts, when later connections that it
// secured are over.
func TestNextSecretNotInSession(t *testing.T) {
	h := newHosts(t)
	for _, resumed := range []bool{false, true} {
		s := h.encrypted(resumed)
		if resumed {
			wantErased(t, s.a.est.Session.NextSecret())
			wantErased(t, s.b.est.Session.NextSecret())
		}
	}
	h.a.Policy = always(Policy{NoCache: true, NoResume: true})
	wantErased(t, h.encrypted(false).a.est.Session.NextSecret())
}

func wantErased(t *testing.T, s *crypto.Secret) {
	t.Helper()
	defer func() {
		if recover() == nil {
			t.Error("a secret is still there")
		}
	}()
	s.Next()
}

// A connection that may resume but must not leave anything to resume ends the
// secrets of its key exchange (RFC 8548 section 3.5).
func TestResumeWithoutCaching(t *testing.T) {
	h := newHosts(t)
	h.encrypted(false)
	h.b.Policy = always(Policy{NoCache: true})
	h.encrypted(true)
	if n := len(h.b.Cache.List(0)); n != 0 {
		t.Errorf("%d exchanges are kept", n)
	}
	if n := len(h.a.Cache.List(0)); n != 1 {
		t.Errorf("the other host keeps %d exchanges", n)
	}
	h.encrypted(false)
}

// The limit of costly key agreements is none for those who need none.
func TestResumeBeyondP521Limit(t *testing.T) {
	cfg, peer := withSecret(crypto.RoleB, crypto.TEPP521)
	s := newScript(t, cfg)
	s.m.costly.p521 = bucket{rate: p521PerSecond, last: s.now}
	s.proposed(peer)
	s.answered()
	s.outer(firstACK(true, 0, nil))
	if !s.installed().Resumed {
		t.Error("not resumed")
	}
}

// A proposal with too much data is no offer of that TEP at all, a SYN without
// randomness for a nonce offers nothing, and costs no secret.
func TestResumeRefused(t *testing.T) {
	cfg, peer := withSecret(crypto.RoleB, crypto.TEPX25519)
	s := newScript(t, cfg)
	r := s.link.key(2, serverPort, 1, clientPort)
	u := peer.propose(&r, anyExchange, 0)
	s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 1000, opts: withENO(nil, AppendOffer(nil, 0, nil, u.suboption(make([]byte, 9))))})
	s.wantReport(StatePlain, ReasonNoCommonTEP)

	cfg, _ = withSecret(crypto.RoleA, crypto.TEPX25519)
	s = newScript(t, cfg)
	s.m.rand = bytes.NewReader(nil)
	s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 11, 0)})
	s.wantReport(StatePlain, ReasonNoRandom)
	if n := cfg.Cache.List(0)[0].Next; n != 1 {
		t.Errorf("next secret %d, want 1", n)
	}
}

// A SYN-ACK whose options leave no room for resumption asks for fresh exchange,
// and the secret goes back.
func TestResumeNoRoomInSYNACK(t *testing.T) {
	cfg, peer := withSecret(crypto.RoleB, crypto.TEPX25519)
	s := newScript(t, cfg)
	half := s.proposed(peer).ours()
	s.inner(tcp{seq: localISS, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: 65160, opts: append(linuxSYN(1460, 11, 21), 254, 4, 0, 0)})
	o := readSYNOptions(s.one(SendOuter).Options())
	if want := option(1, x25519); !bytes.Equal(o.option(), want) {
		t.Errorf("answered %x, want %x", o.option(), want)
	}
	if cfg.Cache.reserve(half[:], crypto.TEPX25519, anyExchange, 0) == nil {
		t.Error("the secret did not come back")
	}
}

// In a simultaneous open host A proposes, and resumes if the SYN of host B names
// the same secret; otherwise the exchange is fresh and the session is not
// forgotten (RFC 8548 section 3.5).
func TestResumeSimultaneousOpen(t *testing.T) {
	for _, compatible := range []bool{true, false} {
		cfg, peer := withSecret(crypto.RoleA, crypto.TEPX25519)
		s := newScript(t, cfg)
		s.connect()
		o, err := ParseENO(s.localENO)
		if err != nil {
			t.Fatal(err)
		}
		u := peer.reserve(o.Subs[len(o.Subs)-1].Data[:crypto.ResumeLen], crypto.TEPX25519, anyExchange, 0)
		s.peerENO = option(1, x25519)
		if compatible {
			s.peerENO = AppendAnswer(nil, 0, u.suboption(peerNonce))
		}
		syn := tightSYNACK(s.peerENO)
		syn.flags, syn.ack = packet.SYN, 0
		s.outer(syn)
		s.wantKinds(SendInner)
		s.inner(tcp{seq: localISS, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: 65160, opts: linuxSYN(1460, 11, 21)})
		if out := readSYNOptions(s.one(SendOuter).Options()); !bytes.Equal(out.option(), s.localENO) {
			t.Errorf("the SYN-ACK offers %x, the SYN %x", out.option(), s.localENO)
		}
		s.outer(tightSYNACK(s.peerENO))
		if !compatible {
			s.wantReport(StateNegotiating, "")
			if len(cfg.Cache.List(0)) != 1 {
				t.Error("the session is forgotten")
			}
			continue
		}
		s.wantKinds(SendOuter, SendOuter, Install, SendInner)
		s.wantResumed(s.installed(), u)
		if e := s.installed(); !e.Active || !e.Crossed {
			t.Error("the local stack is not said to be in SYN-RECEIVED")
		}
		// The window of a SYN-ACK is not scaled, that of the ACK made of it is.
		if ack := s.one(SendInner); ack.Flags != packet.ACK || ack.Seq != peerISS+1 || ack.Wnd != 65160>>7 {
			t.Errorf("released flags %#x, seq %d, window %d", ack.Flags, ack.Seq, ack.Wnd)
		}
	}
}

// cross brings a simultaneous open to the point where the inner stack is in
// SYN-RECEIVED.
func (s *script) cross() {
	s.t.Helper()
	s.connect()
	s.peerENO = option(1, x25519)
	s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: withENO(linuxSYN(1400, 21, 0), s.peerENO)})
	s.wantKinds(SendInner)
	s.inner(tcp{seq: localISS, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: 65160, opts: linuxSYN(1460, 11, 21)})
	s.one(SendOuter)
}

// What may still disable ENO after both SYNs crossed, and what must not (RFC
// 8547 section 4.6).
func TestCrossedDecides(t *testing.T) {
	syn := tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: linuxSYN(1400, 22, 0)}
	for _, x := range []struct {
		name   string
		seg    tcp
		reason string // of a plain flow; "" when nothing is decided
	}{
		{"copy of the SYN without ENO", syn, ReasonSYNRetries},
		{"SYN-ACK without ENO", synack(nil), ReasonNoENOInAck},
		{"SYN-ACK with another option", synack(option(1, x448)), ReasonNoENOInAck},
		{"ACK without ENO", firstACK(false, 0, nil), ReasonNoENOInAck},
		{"copy of the SYN", tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: withENO(linuxSYN(1400, 22, 0), option(1, x25519))}, ""},
		{"SYN of another connection", tcp{seq: peerISS + 9, flags: packet.SYN, wnd: 65160}, ""},
		{"old timestamp", tcp{seq: peerISS + 1, ack: localISS + 1, flags: packet.ACK, opts: timestamps(20, 11)}, ""},
		{"other acknowledgement", tcp{seq: peerISS + 1, ack: localISS + 2, flags: packet.ACK, opts: timestamps(22, 11)}, ""},
		{"reset beside the mark", tcp{seq: peerISS + 2, flags: packet.RST}, ""},
	} {
		t.Run(x.name, func(t *testing.T) {
			s := newScript(t, Config{TEPs: []crypto.TEP{crypto.TEPX25519}})
			s.cross()
			s.outer(x.seg)
			if x.reason == "" {
				if s.m.Len() != 1 || len(s.sent(SendInner)) != 0 {
					t.Fatalf("decided: %+v", s.acts)
				}
				s.outer(synack(s.peerENO))
				s.wantReport(StateNegotiating, "")
				if n := len(s.payload()); n == 0 {
					t.Error("no Init1")
				}
				return
			}
			s.wantKinds(SendInner, Undivert)
			s.wantReport(StatePlain, x.reason)
		})
	}
}

// Our SYN-ACK may have been lost when that of the peer comes. It goes once more, ahead
// of anything without SYN, as it was.
func TestCrossedSYNACKAgain(t *testing.T) {
	s := newScript(t, Config{TEPs: []crypto.TEP{crypto.TEPX25519}})
	s.cross()
	first := s.one(SendOuter).Frame
	s.outer(synack(s.peerENO))
	if out := s.sent(SendOuter); !bytes.Equal(out[0].Frame, first) || out[1].Flags&packet.SYN != 0 {
		t.Errorf("then %+v", out)
	}
}

// An abort after both SYNs crossed resets an inner stack in SYN-RECEIVED, which
// takes only the exact number.
func TestCrossedAbort(t *testing.T) {
	s := newScript(t, Config{TEPs: []crypto.TEP{crypto.TEPX25519}})
	s.cross()
	s.outer(synack(s.peerENO))
	s.tick(time.Minute)
	s.wantReport(StateFailed, ReasonTimeout)
	if rst := s.one(SendInner); rst.Flags&packet.RST == 0 || rst.Seq != peerISS+1 {
		t.Errorf("flags %#x, seq %d", rst.Flags, rst.Seq)
	}
}

// Those who share an address with a peer that comes back, or with one that never
// does, do not take each other's place for ever.
func TestCacheSharedAddress(t *testing.T) {
	c := NewCache(0, 0)
	key := link{}.key(1, clientPort, 2, serverPort)
	add := func(n int) *chain {
		s := crypto.NewSession(crypto.RoleA, crypto.AES128GCM, x25519, nil, nil, nil, binary.BigEndian.AppendUint16(nil, uint16(n)), []byte{1})
		c.add(&key, false, crypto.TEPX25519, crypto.AES128GCM, crypto.RoleB, s.NextSecret(), 0)
		chains := c.peers[key.Remote]
		return chains[len(chains)-1]
	}
	back := func(h *chain) bool {
		if h.age == nil {
			return false
		}
		c.served(c.reserve(h.secrets[0].theirs[:], h.tep, anyExchange, 0), true)
		return true
	}
	first := add(0)
	back(first)
	for n := range 3 * chainsPerPeer {
		add(1 + n)
	}
	if !back(first) {
		t.Error("the host that comes back lost its place to strangers")
	}
	for n := range 3 * chainsPerPeer {
		if !back(add(100 + n)) {
			t.Fatal("no place for another host")
		}
	}
	if back(first) || len(c.peers[key.Remote]) != chainsPerPeer {
		t.Errorf("%d key exchanges of one address", len(c.peers[key.Remote]))
	}
}

// Sessions that were resumed expire in their turn, too, and an idle host may be
// told the time.
func TestCacheExpiryOrder(t *testing.T) {
	c := NewCache(0, time.Hour)
	k := func(n byte) packet.Key { return link{}.key(1, clientPort, n, serverPort) }
	for n := range byte(6) {
		s := crypto.NewSession(crypto.RoleA, crypto.AES128GCM, x25519, nil, nil, nil, binary.BigEndian.AppendUint16(nil, uint16(n)), []byte{1})
		key := k(10 + n)
		c.add(&key, true, crypto.TEPX25519, crypto.AES128GCM, crypto.RoleA, s.NextSecret(), time.Duration(n)*time.Minute)
	}
	for _, n := range []byte{15, 10, 12} {
		key := k(n)
		u := c.propose(&key, anyExchange, 6*time.Minute)
		c.served(u, true)
	}
	for i := range 6 {
		c.Expire(time.Hour + time.Duration(i)*time.Minute)
		if n := len(c.peers); n != 5-i || len(c.halves) != n*lookahead || c.all.Len() != n || c.untried.Len()+c.proven.Len() != n {
			t.Errorf("%d exchanges, %d identifiers left", n, len(c.halves))
		}
	}
}

// What comes of a SYN whose options leave no room for resumption, but for fresh
// exchange: the secret stays for the next one.
func TestResumeNoRoomInSYN(t *testing.T) {
	cfg, _ := withSecret(crypto.RoleA, crypto.TEPX25519)
	s := newScript(t, cfg)
	s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240, opts: append(linuxSYN(1460, 11, 0), 254, 4, 0, 0)})
	o := readSYNOptions(s.one(SendOuter).Options())
	if e, err := ParseENO(o.option()); err != nil || e.Vacuous() || isResumption(e.Subs[len(e.Subs)-1]) {
		t.Errorf("offer %x", o.option())
	}
	if l := cfg.Cache.List(0); len(l) != 1 || l[0].Next != 1 {
		t.Errorf("cached: %+v", l)
	}
	s = newScript(t, cfg)
	s.connect()
	if e, err := ParseENO(s.localENO); err != nil || !isResumption(e.Subs[len(e.Subs)-1]) {
		t.Errorf("offer %x", s.localENO)
	}
	if n := cfg.Cache.List(0)[0].Next; n != 2 {
		t.Errorf("next secret %d, want 2", n)
	}
}

// Without randomness for a nonce a proposal is not answered, and stays unused.
func TestResumeAnswerWithoutRandomness(t *testing.T) {
	cfg, peer := withSecret(crypto.RoleB, crypto.TEPX25519)
	s := newScript(t, cfg)
	s.m.rand = bytes.NewReader(nil)
	half := s.proposed(peer).ours()
	s.wantReport(StatePlain, ReasonNoRandom)
	if cfg.Cache.reserve(half[:], crypto.TEPX25519, anyExchange, 0) == nil {
		t.Error("the secret did not come back")
	}
}

// The peer's SYN-ACK may come before the inner stack has answered its SYN.
func TestCrossedEarly(t *testing.T) {
	s := newScript(t, Config{TEPs: []crypto.TEP{crypto.TEPX25519}})
	s.connect()
	s.peerENO = option(1, x25519)
	s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: withENO(linuxSYN(1400, 21, 0), s.peerENO)})
	s.outer(synack(s.peerENO))
	s.none()
	s.inner(tcp{seq: localISS, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: 65160, opts: linuxSYN(1460, 11, 21)})
	s.wantReport(StateNegotiating, "")
	if n, err := crypto.InitLen(s.payload(), crypto.Init1Magic); err != nil || n == 0 {
		t.Errorf("no Init1: %v", err)
	}
}

// The peer's SYN may be lost on its way to the inner stack, whose own SYN comes
// again then.
func TestCrossedSYNLost(t *testing.T) {
	s := newScript(t, Config{TEPs: []crypto.TEP{crypto.TEPX25519}})
	s.connect()
	s.peerENO = option(1, x25519)
	s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: withENO(linuxSYN(1400, 21, 0), s.peerENO)})
	syn := bytes.Clone(s.one(SendInner).Frame)
	for range 2 {
		s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 11, 0)})
		if again := s.one(SendInner).Frame; !bytes.Equal(again, syn) {
			t.Fatalf("the SYN is repeated as %x, it was %x", again, syn)
		}
	}
	s.inner(tcp{seq: localISS, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: 65160, opts: linuxSYN(1460, 11, 21)})
	s.one(SendOuter)
}

// The SYN-ACK of the inner stack may have no room for the option of its SYN: ENO
// is over then.
func TestCrossedNoRoom(t *testing.T) {
	s := newScript(t, Config{TEPs: []crypto.TEP{crypto.TEPX25519}})
	s.connect()
	s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: withENO(linuxSYN(1400, 21, 0), option(1, x25519))})
	s.inner(tcp{seq: localISS, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: 65160, opts: append(linuxSYN(1460, 11, 21), append([]byte{254, 20}, make([]byte, 18)...)...)})
	s.wantKinds(SendOuter, Undivert)
	s.wantReport(StatePlain, ReasonNoRoom)
}

// When all have come back, the one that did so first goes first.
func TestCacheEvictsProven(t *testing.T) {
	c := NewCache(3, 0)
	for n := range byte(4) {
		s := crypto.NewSession(crypto.RoleA, crypto.AES128GCM, x25519, nil, nil, nil, []byte{n}, []byte{1})
		k := link{}.key(1, clientPort, 10+n, serverPort)
		c.add(&k, true, crypto.TEPX25519, crypto.AES128GCM, crypto.RoleA, s.NextSecret(), 0)
		c.served(c.propose(&k, anyExchange, 0), true)
	}
	first := link{}.key(1, clientPort, 10, serverPort)
	if c.all.Len() != 3 || c.propose(&first, anyExchange, 0) != nil {
		t.Errorf("%d exchanges", c.all.Len())
	}
}
