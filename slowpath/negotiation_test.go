package slowpath

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// stripENO is a middlebox that removes ENO options.
func stripENO(t *testing.T, f []byte) []byte {
	p := parse(t, f, packet.FromInner)
	opts, ok := (&optionEdit{}).apply(p.Options())
	if !ok {
		t.Fatal("options do not fit")
	}
	return packet.Rewrite(nil, p, opts, p.Payload())
}

// A middlebox removes ENO from the segments that match: the outcome is plain on
// both sides, with a reason that says where it was lost.
func TestStripping(t *testing.T) {
	const synAck = packet.SYN | packet.ACK
	for _, x := range []struct {
		name     string
		match    func(flags uint8, fromA bool) bool
		outcome  string
		ra, rb   string
		failures bool
	}{
		{name: "SYN", match: func(f uint8, a bool) bool { return a && f == packet.SYN }, outcome: "plain", ra: ReasonPeerNoENO},
		{name: "SYN-ACK", match: func(f uint8, a bool) bool { return f == synAck }, outcome: "plain", ra: ReasonPeerNoENO, rb: ReasonNoENOInAck},
		{name: "all", match: func(uint8, bool) bool { return true }, outcome: "plain", ra: ReasonPeerNoENO},
		{name: "from B", match: func(f uint8, a bool) bool { return !a }, outcome: "plain", ra: ReasonPeerNoENO, rb: ReasonNoENOInAck},
		{name: "from A", match: func(f uint8, a bool) bool { return a }, outcome: "plain", ra: ReasonPeerNoENO},
	} {
		t.Run(x.name, func(t *testing.T) {
			for _, delay := range []time.Duration{0, 100 * time.Microsecond, time.Second} {
				s := newSim(t, link{}, &Config{}, &Config{})
				s.undivertDelay = delay
				s.wire = func(_ int, h *simHost, f []byte) []delivery {
					if x.match(parse(t, f, packet.FromInner).Flags, h == s.a) {
						f = stripENO(t, f)
					}
					return []delivery{{f, 0}}
				}
				got := s.open()
				if got != x.outcome || s.a.last().Reason != x.ra || s.b.last().Reason != x.rb {
					s.dump()
					t.Fatalf("outcome %s, reasons %q, %q", got, s.a.last().Reason, s.b.last().Reason)
				}
			}
		})
	}
}

// ENO removed from the third segment only: host B has to fall back (RFC 8547
// section 4.6), host A must not, so the connection fails; nothing that the
// application wrote is on the wire in the clear.
func TestStrippedThirdACK(t *testing.T) {
	s := newSim(t, link{}, &Config{}, &Config{})
	s.wire = func(_ int, h *simHost, f []byte) []delivery {
		p := parse(t, f, packet.FromInner)
		if bytes.Contains(p.Payload(), []byte(clientData)) {
			t.Error("plaintext of the client")
		}
		if p.Flags&packet.SYN == 0 {
			f = stripENO(t, f)
		}
		return []delivery{{f, 0}}
	}
	s.b.stack.state = "listen"
	s.a.stack.connect()
	s.run(130 * time.Second)
	if s.a.stack.state != "reset" || s.b.stack.state == "listen" || s.a.est != nil || s.b.est != nil {
		s.dump()
		t.Errorf("stacks %s and %s", s.a.stack.state, s.b.stack.state)
	}
	if s.b.last().Reason != ReasonNoENOInAck {
		t.Errorf("reason of B: %q", s.b.last().Reason)
	}
}

// One side has no daemon.
func TestNoDaemon(t *testing.T) {
	for _, c := range [][2]*Config{{&Config{}, nil}, {nil, &Config{}}, {nil, nil}} {
		s := newSim(t, link{v6: true}, c[0], c[1])
		if got := s.open(); got != "plain" {
			s.dump()
			t.Errorf("outcome %s", got)
		}
	}
}

// The peer is not told of a larger segment than the MTU, which may be below that
// of the inner stack, allows. A change is for flows that begin after it.
func TestAnnouncedMSS(t *testing.T) {
	mss := func(p *packet.Segment) int {
		o := readSYNOptions(p.Options())
		return o.mss
	}
	for _, c := range []struct{ mtu, want int }{{1500, 1460}, {1400, 1360}, {9000, 1460}} {
		s := newScript(t, Config{})
		s.m.SetMTU(c.mtu)
		if n := mss(s.connect()); n != c.want {
			t.Errorf("MTU %d: the SYN announces %d, want %d", c.mtu, n, c.want)
		}
		s = newScript(t, Config{})
		s.m.SetMTU(c.mtu)
		s.listening(crypto.TEPX25519)
		if n := mss(s.answered()); n != c.want {
			t.Errorf("MTU %d: the SYN-ACK announces %d, want %d", c.mtu, n, c.want)
		}
	}
}

// Before a SYN-ACK that lets the peer turn encryption on leaves, the guard
// keeps what the peer then sends from the inner stack (T22). At the end flows of
// which that is so are aborted; the others may become plain.
func TestGuardedWhenAnswered(t *testing.T) {
	s := newScript(t, Config{})
	s.listening(crypto.TEPX25519)
	if s.m.AbortAgreed("end", s.now); s.m.Len() != 1 {
		t.Error("a flow that was not answered is aborted")
	}
	s.answered()
	s.wantKinds(Guard, SendOuter)
	s.acts = s.m.AbortAgreed("end", s.now)
	s.wantKinds(SendOuter, SendInner)
	s.wantReport(StateFailed, "end")

	s = newScript(t, Config{})
	s.connect()
	if s.m.AbortAgreed("end", s.now); s.m.Len() != 1 {
		t.Error("an offer is aborted")
	}
}

// Why an active opener stays plain after the SYN-ACK. The SYN-ACK is passed on
// as it came, but for ENO, after the tombstone and before Undivert (T17).
func TestActivePlain(t *testing.T) {
	syn := linuxSYN(1400, 21, 11)
	for _, x := range []struct {
		name   string
		opts   []byte
		reason string
	}{
		{"no ENO", syn, ReasonPeerNoENO},
		{"experimental option", withENO(syn, []byte{253, 6, 0x45, 0x4e, 1, x25519}), ReasonPeerNoENO},
		{"duplicate", withENO(withENO(syn, option(1, x25519)), option(1, x25519)), ReasonDuplicateENO},
		{"ill-formed", withENO(syn, option(1, 0x80)), ReasonIllFormed},
		{"vacuous", withENO(syn, option(1)), ReasonVacuous},
		{"empty", withENO(syn, option()), ReasonVacuous},
		{"no common TEP", withENO(syn, option(1, 0x30)), ReasonNoCommonTEP},
		{"resumption that was not offered", withENO(syn, option(1, 0xa3, 1, 2, 3, 4, 5, 6, 7, 8, 9)), ReasonNoCommonTEP},
		{"b = 0", withENO(syn, option(x25519)), ReasonRoleConflict},
		{"no room for an MSS option", append(append([]byte{254, 37, 0, 0}, make([]byte, 33)...), 69, 3, 1)[:40], ReasonVacuous},
		{"malformed options", withENO(syn, []byte{69, 1, 0, 0}), ReasonPeerNoENO},
	} {
		t.Run(x.name, func(t *testing.T) {
			s := newScript(t, Config{})
			s.connect()
			y := synack(nil)
			y.opts = x.opts
			s.outer(y)
			s.wantKinds(SendInner, Undivert)
			s.wantReport(StatePlain, x.reason)
			in := s.one(SendInner)
			o := readSYNOptions(in.Options())
			if in.Seq != peerISS || in.Flags != packet.SYN|packet.ACK || o.enos != 0 || in.Wnd != 65160 {
				t.Errorf("passed on: %+v", in)
			}
			if was := readSYNOptions(x.opts); o.mss != was.mss {
				t.Errorf("MSS %d", o.mss)
			}
			// Stragglers pass; the connection is not offered again.
			s.inner(tcp{seq: localISS + 1, ack: peerISS + 1, flags: packet.ACK, wnd: 500, data: []byte("data")})
			s.wantKinds(SendOuter)
			s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 12, 0)})
			s.wantKinds(SendOuter)
			if hasENO(s.one(SendOuter).Options()) {
				t.Error("offered again")
			}
			s.outer(y)
			s.wantKinds(SendInner)
			s.tick(DefaultTombstoneFor)
			s.outer(s.data(0, 0, []byte("x")))
			s.wantKinds()
		})
	}
}

// Why a passive opener stays plain after the SYN. Nothing is diverted.
func TestPassivePlain(t *testing.T) {
	syn := linuxSYN(1400, 21, 0)
	offer := option(x25519)
	for _, x := range []struct {
		name   string
		cfg    Config
		opts   []byte
		reason string
	}{
		{"duplicate", Config{}, withENO(withENO(syn, offer), offer), ReasonDuplicateENO},
		{"ill-formed", Config{}, withENO(syn, option(0x80, 1)), ReasonIllFormed},
		{"vacuous", Config{}, withENO(syn, option()), ReasonVacuous},
		{"role", Config{}, withENO(syn, option(1, x25519)), ReasonRoleConflict},
		{"no common TEP", Config{TEPs: []crypto.TEP{crypto.TEPP521}}, withENO(syn, offer), ReasonNoCommonTEP},
		{"TEP repeated", Config{}, withENO(syn, option(x25519, x25519)), ReasonNoCommonTEP},
		{"MPTCP", Config{}, withENO([]byte{30, 4, 0, 0}, offer), ReasonOptionConflict},
		{"TCP-MD5", Config{}, withENO(append([]byte{19, 18}, make([]byte, 16)...), offer), ReasonOptionConflict},
		{"TCP-AO", Config{}, withENO([]byte{29, 4, 0, 0}, offer), ReasonOptionConflict},
		{"policy", Config{Policy: plainIf(func(k *packet.Key) bool { return k.LPort == clientPort || k.RPort == serverPort })}, withENO(syn, offer), ReasonPolicy},
		{"no ENO", Config{}, syn, ReasonPeerNoENO},
		{"no room for an MSS option", Config{}, append(append([]byte{254, 37, 0, 0}, make([]byte, 33)...), 69, 3, x25519), ReasonNoRoom},
	} {
		t.Run(x.name, func(t *testing.T) {
			s := newScript(t, x.cfg)
			for range 2 { // a copy is treated alike
				s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: x.opts, data: []byte("early")})
				s.wantKinds(SendInner)
				in := s.one(SendInner)
				o, was := readSYNOptions(in.Options()), readSYNOptions(x.opts)
				if o.enos != 0 || o.mss != was.mss || in.Seq != peerISS || in.Flags != packet.SYN {
					t.Errorf("passed on: %+v", in)
				}
				// Data of a SYN with ENO is discarded (RFC 8547 section 4.7).
				if want := was.enos == 0; (in.Len() > 0) != want {
					t.Errorf("%d bytes of data", in.Len())
				}
			}
			if s.m.Len() != 0 {
				t.Error("a flow was made")
			}
			s = newScript(t, x.cfg)
			s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: x.opts})
			s.wantReport(StatePlain, x.reason)
			// A later connection with the same ports is looked at afresh.
			s.outer(tcp{seq: peerISS + 1, flags: packet.SYN, wnd: 65160, opts: x.opts})
			s.wantReport(StatePlain, x.reason)
		})
	}
}

// Why an active opener does not offer.
func TestNotEligible(t *testing.T) {
	syn := linuxSYN(1460, 11, 0)
	for _, x := range []struct {
		name   string
		cfg    Config
		opts   []byte
		data   string
		reason string
	}{
		{"policy", Config{Policy: plainIf(func(k *packet.Key) bool { return k.LPort != serverPort && k.RPort != clientPort })}, syn, "", ReasonPolicy},
		{"data", Config{}, syn, "x", ReasonSYNData},
		{"Fast Open cookie", Config{}, withENO(syn, []byte{34, 6, 1, 2, 3, 4}), "", ReasonOptionConflict},
		{"Fast Open request", Config{}, withENO(syn, []byte{34, 2}), "", ReasonOptionConflict},
		{"old Fast Open", Config{}, withENO(syn, []byte{254, 4, 0xf9, 0x89}), "", ReasonOptionConflict},
		{"MPTCP", Config{}, withENO(syn, []byte{30, 4, 0, 0}), "", ReasonOptionConflict},
		{"TCP-MD5", Config{}, withENO(nil, append([]byte{19, 18}, make([]byte, 16)...)), "", ReasonOptionConflict},
		{"TCP-AO", Config{}, withENO(syn, []byte{29, 4, 0, 0}), "", ReasonOptionConflict},
		{"ENO of its own", Config{}, withENO(syn, option(x25519)), "", ReasonOptionConflict},
		{"no room", Config{}, append([]byte{254, 38}, make([]byte, 38)...), "", ReasonNoRoom},
	} {
		t.Run(x.name, func(t *testing.T) {
			s := newScript(t, x.cfg)
			f := tcp{seq: localISS, flags: packet.SYN, wnd: 64240, opts: x.opts, data: []byte(x.data)}
			s.inner(f)
			s.wantKinds(SendOuter)
			s.wantReport(StatePlain, x.reason)
			f.src, f.dst, f.sport, f.dport = 1, 2, clientPort, serverPort
			if !bytes.Equal(s.one(SendOuter).Frame, s.link.frame(f)) {
				t.Error("the SYN was changed")
			}
			if _, pending := s.m.Deadline(); pending != (x.reason != ReasonPolicy) {
				t.Error("tombstone missing or not wanted")
			}
		})
	}
}

// With --require nothing plain passes, except by policy.
func TestRequire(t *testing.T) {
	r := Config{Policy: required}
	t.Run("not eligible", func(t *testing.T) {
		s := newScript(t, r)
		s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 1, 0), data: []byte("x")})
		s.wantKinds(SendInner)
		s.wantReport(StateFailed, ReasonRequired)
		if p := s.one(SendInner); p.Flags != packet.RST|packet.ACK || p.Ack != localISS+2 {
			t.Errorf("reset %+v", p)
		}
	})
	t.Run("SYN-ACK without ENO", func(t *testing.T) {
		s := newScript(t, r)
		s.connect()
		s.outer(synack(nil))
		s.wantKinds(SendOuter, SendInner)
		s.wantReport(StateFailed, ReasonRequired)
		if p := s.one(SendOuter); p.Flags&packet.RST == 0 || p.Seq != localISS+1 {
			t.Errorf("outer reset %+v", p)
		}
		if p := s.one(SendInner); p.Flags != packet.RST|packet.ACK || p.Ack != localISS+1 {
			t.Errorf("inner reset %+v", p)
		}
	})
	t.Run("copies of the SYN keep ENO", func(t *testing.T) {
		s := newScript(t, r)
		for range 6 {
			s.connect()
			if len(s.localENO) == 0 {
				t.Fatal("a SYN without ENO")
			}
			s.tick(time.Second)
		}
	})
	t.Run("SYN without ENO", func(t *testing.T) {
		s := newScript(t, r)
		s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 1000, opts: linuxSYN(1460, 1, 0)})
		s.wantKinds(SendOuter)
		s.wantReport(StateFailed, ReasonRequired)
		if p := s.one(SendOuter); p.Flags != packet.RST|packet.ACK || p.Ack != peerISS+1 {
			t.Errorf("reset %+v", p)
		}
	})
	t.Run("first ACK without ENO", func(t *testing.T) {
		s := newScript(t, r)
		s.listening(crypto.TEPX25519)
		s.answered()
		s.outer(firstACK(false, 0, []byte("GET /")))
		s.wantKinds(SendOuter, SendInner)
		s.wantReport(StateFailed, ReasonRequired)
	})
	t.Run("policy", func(t *testing.T) {
		s := newScript(t, Config{Policy: plainIf(func(*packet.Key) bool { return true })})
		s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240})
		s.wantKinds(SendOuter)
	})
	t.Run("simultaneous open", func(t *testing.T) {
		s := newScript(t, r)
		s.connect()
		s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 1000})
		s.wantKinds(SendOuter, SendInner)
		s.wantReport(StateFailed, ReasonRequired)
	})
	s := newSim(t, link{}, &r, &r)
	if got := s.open(); got != "encrypted" {
		t.Errorf("outcome %s", got)
	}
}

// Copies of the SYN: two with the same ENO option, the third without (T19).
func TestSYNCopies(t *testing.T) {
	s := newScript(t, Config{})
	first := s.connect()
	eno := bytes.Clone(s.localENO)
	s.tick(time.Second)
	s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 12, 0)})
	s.wantKinds(SendOuter)
	second := s.one(SendOuter)
	if o := readSYNOptions(second.Options()); !bytes.Equal(o.option(), eno) || second.Seq != first.Seq || second.TSval != 12 {
		t.Errorf("second SYN %+v", o)
	}
	s.tick(2 * time.Second)
	for i := range 2 {
		s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 13, 0)})
		s.wantKinds([]ActionKind{Unguard, SendOuter}[i:]...)
		if hasENO(s.one(SendOuter).Options()) {
			t.Error("the third SYN has ENO")
		}
	}
	if fs := s.m.Flows(); len(fs) != 1 || fs[0].State != StatePlain || fs[0].Reason != ReasonSYNRetries {
		t.Errorf("flows %+v", fs)
	}
	// The answer shows that ENO does not pass, or that the path loses packets.
	s.outer(synack(nil))
	s.wantKinds(SendInner, Undivert)
	s.inner(tcp{seq: 99, flags: packet.SYN, wnd: 64240})
	s.wantReport(StateOffered, "")
}

// A path on which only the SYN without ENO was answered, twice in a row, is not
// tried with ENO for a while. Once it may have been chance.
func TestUnansweredOffers(t *testing.T) {
	x := newScript(t, Config{})
	seq := uint32(localISS)
	open := func(lost bool) (plain bool) {
		seq += 100
		syn := tcp{seq: seq, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 11, 0)}
		answer := synack(AppendAnswer(nil, 0, Suboption{TEP: crypto.TEPX25519}))
		x.inner(syn)
		if !hasENO(x.one(SendOuter).Options()) {
			x.wantReport(StatePlain, ReasonRemembered)
			return true
		}
		if lost {
			for range 2 {
				x.tick(time.Second)
				x.inner(syn)
			}
			answer = synack(nil)
		}
		answer.ack = seq + 1
		x.outer(answer)
		x.inner(tcp{seq: seq + 1, flags: packet.RST})
		x.tick(2 * DefaultTombstoneFor)
		return false
	}
	for i, c := range []struct{ lost, plain bool }{{true, false}, {false, false}, {true, false}, {true, false}, {false, true}} {
		if plain := open(c.lost); plain != c.plain {
			t.Errorf("connection %d: plain %v", i, plain)
		}
	}
	for i := range 3 { // the last time is long ago
		x.tick(DefaultRememberFor)
		if open(true) {
			t.Errorf("connection %d after a while is plain", i)
		}
	}
}

// A late answer to the first SYN, after ENO was given up: plain, but ENO works.
func TestLateAnswer(t *testing.T) {
	s := newScript(t, Config{})
	for range 3 {
		s.connect()
		s.tick(time.Second)
	}
	s.outer(synack(AppendAnswer(nil, 0, Suboption{TEP: crypto.TEPX25519})))
	s.wantKinds(SendInner, Undivert)
	if in := s.one(SendInner); hasENO(in.Options()) {
		t.Error("ENO shown to the inner stack")
	}
	s.inner(tcp{seq: 99, flags: packet.SYN, wnd: 64240})
	s.wantReport(StateOffered, "")

	// The peer's SYN may come instead: the flow was counted as plain already.
	s = newScript(t, Config{})
	for range 3 {
		s.connect()
		s.tick(time.Second)
	}
	s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 1000, opts: withENO(linuxSYN(1400, 1, 0), option(1, x25519))})
	s.wantKinds(SendInner, Undivert)
	if in := s.one(SendInner); hasENO(in.Options()) || s.m.Counters()[countPlain] != 1 {
		t.Errorf("passed on %+v, counters %v", in, s.m.Counters())
	}
}

// Nobody answers the SYN, or the inner stack does not.
func TestNoAnswer(t *testing.T) {
	s := newScript(t, Config{})
	s.connect()
	s.tick(offerIdle)
	s.wantKinds(Undivert)
	s.wantReport(StateFailed, ReasonNoAnswer)
	// A copy of the SYN, later: never offered again in this connection (T17).
	s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240})
	s.wantKinds(SendOuter)
	if hasENO(s.one(SendOuter).Options()) {
		t.Error("offered again")
	}

	s = newScript(t, Config{})
	s.listening(crypto.TEPX25519)
	s.tick(offerIdle)
	s.wantKinds(Undivert)
	s.wantReport(StateFailed, ReasonNoAnswer)

	s = newScript(t, Config{})
	s.listening(crypto.TEPX25519)
	s.answered()
	s.tick(answerIdle)
	s.wantKinds(SendOuter, SendInner)
	s.wantReport(StateFailed, ReasonNoAnswer)
}

// After ENO was given up, what the inner stack says next shows that it was
// answered past this machine: the connection is plain, and so is the next one.
func TestAnsweredElsewhere(t *testing.T) {
	s := newScript(t, Config{})
	for range 3 {
		s.connect()
		s.tick(time.Second)
	}
	s.inner(tcp{seq: localISS + 1, ack: peerISS + 1, flags: packet.ACK | packet.PSH, wnd: 1000, data: []byte("hello")})
	s.wantKinds(SendOuter, Undivert)
	if p := s.one(SendOuter); string(p.Payload()) != "hello" {
		t.Errorf("passed on: %+v", p)
	}
	s.inner(tcp{seq: 99, flags: packet.SYN, wnd: 64240})
	s.wantReport(StatePlain, ReasonRemembered)
}

// The inner stack may have answered where it is not heard: the third copy of a
// SYN becomes plain, whatever the peer offers, unless it must not, and unless the
// copies were made on the way.
func TestUnheardAnswer(t *testing.T) {
	for _, x := range []struct {
		name    string
		verdict Verdict
		pause   time.Duration
		plain   bool
	}{
		{"sent again", Encrypt, time.Second, true},
		{"duplicated", Encrypt, time.Millisecond, false},
		{"required", Require, time.Second, false},
	} {
		t.Run(x.name, func(t *testing.T) {
			s := newScript(t, Config{Policy: always(Policy{Verdict: x.verdict})})
			s.listening(crypto.TEPX25519)
			for range 2 {
				s.tick(x.pause)
				s.listening(crypto.TEPX25519)
			}
			if !x.plain {
				s.wantKinds(SendInner)
				return
			}
			s.wantKinds(SendInner, Undivert)
			s.wantReport(StatePlain, ReasonSYNRetries)
			if hasENO(s.one(SendInner).Options()) {
				t.Error("ENO shown to the inner stack")
			}
		})
	}
}

// Copies on the passive side get the recorded SYN-ACK (T18).
func TestPassiveCopies(t *testing.T) {
	s := newScript(t, Config{})
	s.listening(crypto.TEPX25519)
	s.listening(crypto.TEPX25519)
	s.wantKinds(SendInner)
	first := s.answered()
	s.listening(crypto.TEPX25519)
	s.wantKinds(SendOuter)
	if p := s.one(SendOuter); !bytes.Equal(p.Frame, first.Frame) {
		t.Error("not the recorded SYN-ACK")
	}
	s.inner(tcp{seq: localISS, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: 65160, opts: linuxSYN(1460, 15, 21)})
	s.wantKinds(SendOuter)
	p := s.one(SendOuter)
	o := readSYNOptions(p.Options())
	if !bytes.Equal(o.option(), s.localENO) || p.Seq != localISS || p.TSval != 15 {
		t.Errorf("copy of the SYN-ACK: %+v", p)
	}
	// Another ISN is not of this connection.
	s.inner(tcp{seq: localISS + 5, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: 65160})
	s.wantKinds()
	s.outer(firstACK(true, 0, nil))
	s.inner(tcp{seq: localISS, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: 65160, opts: linuxSYN(1460, 16, 21)})
	s.wantKinds()
	if s.m.Counters()[countAbsorbed] != 1 {
		t.Errorf("counters %v", s.m.Counters())
	}
}

// A copy of the SYN without an option that could be negotiated with: the peer has
// given encryption up, or somebody on the way has for it (RFC 8547 section 4.6).
// One with another option that could is answered as the first one was.
func TestWithdrawn(t *testing.T) {
	offer := option(x25519)
	for _, x := range []struct {
		name   string
		eno    []byte
		reason string
	}{
		{"no option", nil, ReasonSYNRetries},
		{"duplicate", append(bytes.Clone(offer), offer...), ReasonDuplicateENO},
		{"ill-formed", option(0x80), ReasonIllFormed},
		{"vacuous", option(2), ReasonVacuous},
		{"another", option(0, p256), ""},
	} {
		t.Run(x.name, func(t *testing.T) {
			for _, answered := range []bool{false, true} {
				s := newScript(t, Config{})
				s.listening(crypto.TEPX25519)
				if answered {
					s.answered()
				}
				s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: withENO(linuxSYN(1400, 25, 0), x.eno)})
				if x.reason == "" {
					s.one(map[bool]ActionKind{false: SendInner, true: SendOuter}[answered])
					continue
				}
				s.wantKinds(SendInner, Undivert)
				s.wantReport(StatePlain, x.reason)
				if in := s.one(SendInner); hasENO(in.Options()) {
					t.Error("ENO shown to the inner stack")
				}
			}
			s := newScript(t, Config{Policy: always(Policy{PassiveRole: true})})
			s.connect()
			for range 2 {
				s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: withENO(linuxSYN(1400, 21, 0), offer)})
				s.answered()
			}
			s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: withENO(linuxSYN(1400, 21, 0), x.eno)})
			if x.reason == "" {
				s.one(SendOuter)
				return
			}
			s.wantReport(StatePlain, x.reason)
		})
	}
}

// Copies of the SYN-ACK while Init2 is awaited: ACK with ENO and Init1 again;
// copies of the inner SYN are absorbed.
func TestActiveCopies(t *testing.T) {
	s := newScript(t, Config{})
	s.active(crypto.TEPX25519)
	s.outer(synack(s.peerENO))
	if segs := s.sent(SendOuter); len(segs) != 2 || !hasENO(segs[0].Options()) || !bytes.Equal(s.payload(), s.localInit) {
		t.Errorf("%d segments", len(segs))
	}
	s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 19, 0)})
	s.wantKinds()
	// Once the peer was heard, ENO options and copies of Init1 stop.
	d := s.data(0, len(s.localInit), nil)
	d.flags = packet.ACK
	s.outer(d)
	s.wantKinds()
	s.outer(synack(s.peerENO))
	if p := s.one(SendOuter); p.Len() != 0 || hasENO(p.Options()) || p.TSval != 19 {
		t.Errorf("answer %+v", p)
	}
	msg := s.init2(crypto.TEPX25519, nil)
	s.outer(s.data(0, len(s.localInit), msg))
	if e := s.installed(); e.TSLocal != 19 {
		t.Errorf("TSLocal %d", e.TSLocal)
	}
}

// The first SYN-ACK decided: whatever its copies offer, the exchange goes on with
// what it said (RFC 8547 section 4.6).
func TestAlteredSYNACK(t *testing.T) {
	for _, eno := range [][]byte{nil, option(1), option(1, 0x80), option(1, p256), option(x25519), append(option(1, x25519), option(1, x25519)...)} {
		s := newScript(t, Config{})
		s.active(crypto.TEPX25519)
		s.outer(synack(eno))
		if s.wantKinds(SendOuter, SendOuter); !bytes.Equal(s.payload(), s.localInit) {
			t.Errorf("%x: Init1 is not sent again", eno)
		}
		msg := s.init2(crypto.TEPX25519, nil)
		s.outer(s.data(0, len(s.localInit), msg))
		s.wantSession(s.installed(), msg)
	}
}

// What decides must be acceptable to the letter (T12); a blind sender neither
// resets nor degrades a flow, and costs at most a few answers.
func TestBlindSegments(t *testing.T) {
	for _, x := range []struct {
		name  string
		setup func(*script)
		evil  []tcp
	}{
		{"A offered", func(s *script) { s.connect() }, []tcp{
			{seq: 1, ack: localISS, flags: packet.SYN | packet.ACK},
			{seq: 1, ack: localISS + 2, flags: packet.SYN | packet.ACK, opts: withENO(nil, option(1, x25519))},
			{seq: 1, ack: localISS, flags: packet.RST | packet.ACK},
			{seq: localISS + 1, flags: packet.RST},
			{seq: 1, ack: localISS + 1, flags: packet.ACK},
			{seq: 1, ack: localISS + 1, flags: packet.ACK, data: []byte("x")},
			{seq: 1, ack: localISS + 1, flags: 0},
			{seq: 1, ack: localISS + 1, flags: packet.SYN | packet.ACK | packet.RST},
			{seq: 1, ack: localISS + 1, flags: packet.SYN | packet.ACK | packet.FIN},
		}},
		{"A exchange", func(s *script) { s.active(crypto.TEPX25519) }, []tcp{
			{seq: peerISS, flags: packet.SYN},
			{seq: peerISS + 7, ack: localISS + 1, flags: packet.SYN | packet.ACK},
			{seq: peerISS + 2, ack: localISS + 1, flags: packet.RST},
			{seq: peerISS, ack: localISS + 1, flags: packet.RST},
			{seq: peerISS + 100000, flags: packet.RST},
			{seq: peerISS + 1, ack: localISS + 1000, flags: packet.ACK, data: []byte("bad magic")},
			{seq: peerISS + 1, ack: localISS, flags: packet.ACK, data: []byte("bad magic")},
			{seq: peerISS + 90000, ack: localISS + 1, flags: packet.ACK, data: []byte("bad magic")},
			{seq: 0xffff0000, ack: localISS + 1, flags: packet.ACK, data: []byte("bad magic")},
			{seq: peerISS + 1, ack: localISS + 1, flags: packet.ACK, data: []byte("bad magic"), opts: timestamps(20, 0)},
			{seq: peerISS + 1, ack: localISS + 1, flags: packet.PSH, data: []byte("bad magic")},
			{seq: peerISS + 9, ack: localISS + 1, flags: packet.ACK | packet.FIN},
		}},
		{"B listen", func(s *script) { s.listening(crypto.TEPX25519) }, []tcp{
			{seq: peerISS + 2, flags: packet.RST},
			{seq: peerISS + 1, ack: localISS + 1, flags: packet.ACK},
		}},
		{"B answered", func(s *script) { s.listening(crypto.TEPX25519); s.answered() }, []tcp{
			{seq: peerISS + 1, ack: localISS, flags: packet.ACK},
			{seq: peerISS + 1, ack: localISS + 2, flags: packet.ACK},
			{seq: peerISS, ack: localISS + 1, flags: packet.ACK},
			{seq: peerISS + 70000, ack: localISS + 1, flags: packet.ACK},
			{seq: peerISS + 1, ack: localISS + 1, flags: packet.ACK, opts: timestamps(20, 0)},
			{seq: peerISS + 2, flags: packet.RST},
			{seq: peerISS + 70000, flags: packet.RST},
			{seq: 77, flags: packet.SYN},
			{seq: 77, flags: packet.SYN, opts: withENO(nil, option(x25519))},
			{seq: peerISS, ack: localISS + 1, flags: packet.SYN | packet.ACK},
			{seq: peerISS + 1, ack: localISS + 1, flags: packet.FIN},
		}},
		{"B exchange", func(s *script) { s.passive(crypto.TEPX25519) }, []tcp{
			{seq: 77, flags: packet.SYN},
			{seq: peerISS, flags: packet.SYN},
			{seq: peerISS + 2, flags: packet.RST},
			{seq: peerISS + 1, ack: localISS + 2, flags: packet.ACK, data: []byte("bad magic")},
			{seq: peerISS + 70000, ack: localISS + 1, flags: packet.ACK, data: []byte("bad magic")},
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			for i, e := range x.evil {
				s := newScript(t, Config{})
				x.setup(s)
				for range 5 {
					s.outer(e)
					for _, a := range s.acts {
						// In SYN-SENT the inner stack knows what to answer.
						asked := x.name == "A offered" && e.ack != localISS+1 && e.flags&packet.RST == 0
						if a.Kind == SendInner && !asked || a.Kind == Undivert || a.Kind == Report || a.Kind == Install {
							t.Fatalf("segment %d led to %+v", i, a)
						}
					}
					if out := s.sent(SendOuter); len(out) > 1 {
						t.Errorf("segment %d has %d answers", i, len(out))
					} else if len(out) == 1 && x.name == "B answered" && out[0].Flags&(packet.SYN|packet.RST) == 0 {
						t.Errorf("segment %d: an ACK before the first ACK of the peer", i)
					}
				}
				if s.m.Len() != 1 {
					t.Fatalf("segment %d ended the flow", i)
				}
			}
		})
	}
}

// Resets that are acceptable end the flow.
func TestRefused(t *testing.T) {
	for _, x := range []struct {
		name  string
		setup func(*script)
		inner bool
		rst   tcp
		kinds []ActionKind
		seq   uint32 // of the reset that is passed on
		ack   uint32
	}{
		{"A offered", func(s *script) { s.connect() }, false, tcp{ack: localISS + 1, flags: packet.RST | packet.ACK}, []ActionKind{SendInner, Undivert}, 0, localISS + 1},
		{"A exchange", func(s *script) { s.active(crypto.TEPX25519) }, false, tcp{seq: peerISS + 1, flags: packet.RST}, []ActionKind{SendInner}, 0, localISS + 1},
		{"A offered, inner", func(s *script) { s.connect() }, true, tcp{seq: localISS + 1, flags: packet.RST}, []ActionKind{SendOuter, Undivert}, localISS + 1, 0},
		{"A exchange, inner", func(s *script) { s.active(crypto.TEPX25519) }, true, tcp{seq: localISS + 1, flags: packet.RST}, []ActionKind{SendOuter}, localISS + 1 + 79, peerISS + 1},
		{"B listen", func(s *script) { s.listening(crypto.TEPX25519) }, false, tcp{seq: peerISS + 1, flags: packet.RST}, []ActionKind{SendInner, Undivert}, peerISS + 1, 0},
		{"B answered", func(s *script) { s.listening(crypto.TEPX25519); s.answered() }, false, tcp{seq: peerISS + 1, flags: packet.RST}, []ActionKind{SendInner, Undivert}, peerISS + 1, 0},
		{"B exchange", func(s *script) { s.passive(crypto.TEPX25519) }, false, tcp{seq: peerISS + 1, flags: packet.RST}, []ActionKind{SendInner}, peerISS + 1, 0},
		{"B closed port", func(s *script) { s.listening(crypto.TEPX25519) }, true, tcp{ack: peerISS + 1, flags: packet.RST | packet.ACK}, []ActionKind{SendOuter, Undivert}, 0, peerISS + 1},
		{"B answered, inner", func(s *script) { s.listening(crypto.TEPX25519); s.answered() }, true, tcp{seq: localISS + 1, flags: packet.RST}, []ActionKind{SendOuter, Undivert}, localISS + 1, 0},
		{"B exchange, inner", func(s *script) { s.passive(crypto.TEPX25519) }, true, tcp{seq: localISS + 1, flags: packet.RST}, []ActionKind{SendOuter}, localISS + 1, peerISS + 1},
	} {
		t.Run(x.name, func(t *testing.T) {
			s := newScript(t, Config{})
			x.setup(s)
			if x.inner {
				s.inner(x.rst)
			} else {
				s.outer(x.rst)
			}
			s.wantKinds(x.kinds...)
			s.wantReport(StateFailed, ReasonRefused)
			if p := s.one(x.kinds[0]); p.Flags&packet.RST == 0 || p.Seq != x.seq || p.Ack != x.ack {
				t.Errorf("reset %+v", p)
			}
			if s.m.Len() != 0 {
				t.Error("the flow is still there")
			}
		})
	}
}

// The socket of an older connection answers the SYN by a challenge ACK; the
// peer resets it, and its next SYN is negotiated.
func TestStaleSocket(t *testing.T) {
	s := newScript(t, Config{})
	s.listening(crypto.TEPX25519)
	s.inner(tcp{seq: 42, ack: 4242, flags: packet.ACK, wnd: 100})
	s.wantKinds(SendOuter)
	s.outer(tcp{seq: 4242, flags: packet.RST})
	s.wantKinds(SendInner)
	s.listening(crypto.TEPX25519)
	s.wantKinds(SendInner)
	s.answered()
	if len(s.localENO) == 0 {
		t.Error("not negotiated")
	}
	// Data of an older socket never passes if it may be that of a connection
	// that was encrypted.
	s = newScript(t, Config{Orphan: func(packet.Key) bool { return true }})
	s.listening(crypto.TEPX25519)
	s.inner(tcp{seq: 42, ack: 4242, flags: packet.ACK, wnd: 100, data: []byte("secret")})
	s.wantKinds()
}

// The peer's socket of an older connection answers the SYN by a challenge ACK. It
// is the inner stack that resets it, or that is in this connection: one without ENO
// which came about past the flow, while the SYN was on the way to it.
func TestStalePeer(t *testing.T) {
	stale := tcp{seq: 42, ack: localISS + 4000, flags: packet.ACK, wnd: 100}
	s := newScript(t, Config{TEPs: []crypto.TEP{crypto.TEPX25519}})
	s.connect()
	for range 2 {
		s.outer(stale)
		s.wantKinds(SendInner)
		s.inner(tcp{seq: stale.ack, flags: packet.RST})
		s.wantKinds(SendOuter)
		if out := s.one(SendOuter); out.Flags != packet.RST || out.Seq != stale.ack {
			t.Errorf("the peer gets %+v", out)
		}
	}
	s.outer(tcp{seq: peerISS, ack: localISS + 1, flags: packet.SYN | packet.ACK, wnd: 1000, opts: withENO(nil, option(1, x25519))})
	if s.m.Len() != 1 || len(s.sent(SendOuter)) == 0 {
		t.Error("not negotiated")
	}

	s = newScript(t, Config{})
	s.connect()
	s.outer(tcp{seq: 42, ack: localISS + 4000, flags: packet.ACK, wnd: 100, data: []byte("x")})
	s.wantKinds(SendInner)
	s.inner(tcp{seq: localISS + 4000, ack: 43, flags: packet.ACK, wnd: 100})
	s.wantReport(StatePlain, ReasonSimultaneous)

	// Where encryption is required it ends.
	s = newScript(t, Config{Policy: func(*packet.Key, packet.Direction) Policy { return Policy{Verdict: Require} }})
	s.connect()
	s.outer(tcp{seq: 42, ack: localISS + 4000, flags: packet.ACK, wnd: 100, data: []byte("x")})
	s.inner(tcp{seq: localISS + 4000, ack: 43, flags: packet.ACK, wnd: 100})
	s.wantReport(StateFailed, ReasonRequired)
}

// The reset of an older connection's socket does not refuse a new SYN.
func TestResetOfOlderSocket(t *testing.T) {
	s := newScript(t, Config{TEPs: []crypto.TEP{crypto.TEPX25519}})
	s.listening(crypto.TEPX25519)
	for _, r := range []tcp{
		{seq: localISS + 5000, flags: packet.RST},
		{seq: localISS + 5000, ack: peerISS - 700, flags: packet.RST | packet.ACK},
	} {
		s.inner(r)
		s.none()
	}
	s.answered()
}

func TestSimultaneousOpen(t *testing.T) {
	s := newScript(t, Config{})
	s.connect()
	s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 1000, opts: withENO(linuxSYN(1400, 1, 0), option(x25519))})
	s.wantKinds(SendInner, Undivert)
	s.wantReport(StatePlain, ReasonSimultaneous)
	if in := s.one(SendInner); hasENO(in.Options()) || in.Flags != packet.SYN {
		t.Errorf("passed on %+v", in)
	}
	// The inner stack's SYN-ACK passes without ENO.
	s.inner(tcp{seq: localISS, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: 1000})
	s.wantKinds(SendOuter)

	// Two daemons: plain on both sides.
	sim := newSim(t, link{}, &Config{}, &Config{})
	sim.a.stack.connect()
	sim.b.stack.connect()
	sim.run(100 * time.Second)
	if got := sim.outcome(); got != "plain" {
		sim.dump()
		t.Errorf("outcome %s", got)
	}
}

// A SYN without ENO reached the inner stack before ours was diverted: what it
// says next shows that the connection is open, and plain.
func TestCrossedByPlainSYN(t *testing.T) {
	for _, flags := range []uint8{packet.SYN | packet.ACK, packet.ACK} {
		s := newScript(t, Config{})
		s.connect()
		s.inner(tcp{seq: localISS, ack: peerISS + 1, flags: flags, wnd: 1000})
		s.wantKinds(SendOuter, Undivert)
		s.wantReport(StatePlain, ReasonSimultaneous)
	}
	s := newScript(t, Config{Policy: always(Policy{Verdict: Require})})
	s.connect()
	s.inner(tcp{seq: localISS, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: 1000})
	s.wantReport(StateFailed, ReasonRequired)
}

// The application gave up and its port is used again.
func TestPortReuse(t *testing.T) {
	s := newScript(t, Config{})
	s.active(crypto.TEPX25519)
	s.inner(tcp{seq: 777, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 1, 0)})
	s.wantKinds(SendOuter, Undivert, Divert, SendOuter)
	out := s.sent(SendOuter)
	if out[0].Flags&packet.RST == 0 || out[1].Flags != packet.SYN || out[1].Seq != 777 {
		t.Errorf("sent %+v", out)
	}
	s = newScript(t, Config{})
	s.listening(crypto.TEPX25519)
	s.outer(tcp{seq: 777, flags: packet.SYN, wnd: 1000, opts: withENO(nil, option(x25519))})
	s.wantKinds(Undivert, Divert, SendInner)
}

// Little or no room in the option space.
func TestOptionSpace(t *testing.T) {
	fill := func(n int) []byte {
		b := append([]byte{254, byte(n), 0, 0}, make([]byte, n-4)...)
		for len(b)%4 != 0 {
			b = append(b, packet.OptNOP)
		}
		return b
	}
	for n := 4; n <= 40; n++ {
		s := newScript(t, Config{})
		s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240, opts: fill(n)})
		o := readSYNOptions(s.one(SendOuter).Options())
		want := min(max(40-n-2, 0), 4)
		if got := max(o.enoN-2, 0); got != want {
			t.Errorf("%d bytes used: %d TEPs offered, want %d", n, got, want)
		}
		if want == 0 {
			s.wantReport(StatePlain, ReasonNoRoom)
		} else if e, err := ParseENO(o.option()); err != nil || e.Subs[0].TEP != crypto.AllTEPs[0] {
			t.Errorf("%d bytes used: option %x", n, o.option())
		}

		// The SYN-ACK: without room it leaves as it is, and the flow is plain.
		s = newScript(t, Config{})
		s.listening(crypto.TEPX25519)
		s.inner(tcp{seq: localISS, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: 65160, opts: fill(n)})
		p := s.one(SendOuter)
		if fits := n+4 <= 40; hasENO(p.Options()) != fits {
			t.Errorf("%d bytes used: ENO %v", n, !fits)
		} else if !fits {
			s.wantKinds(SendOuter, Undivert)
			s.wantReport(StatePlain, ReasonNoRoom)
		}
	}
}

// MSS options: missing, larger than the MTU allows, with VLAN and IPv6.
func TestMSS(t *testing.T) {
	for _, x := range []struct {
		l    link
		opts []byte
		mtu  int
		want int
	}{
		{link{}, []byte{2, 4, 5, 180}, 1500, 1440},
		{link{}, []byte{2, 4, 0x23, 0}, 1500, 1440},
		{link{}, []byte{2, 4, 0x23, 0}, 9000, 8940},
		{link{}, nil, 1500, 516},
		{link{v6: true}, nil, 1500, 1200},
		{link{v6: true, vlan: 3}, []byte{2, 4, 5, 180}, 1500, 1420},
		{link{}, []byte{2, 4, 0, 0}, 1500, 516},
		{link{}, []byte{2, 4, 0, 1}, 1500, minMSS},
	} {
		s := newScript(t, Config{MTU: x.mtu})
		s.link = x.l
		s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 1000, opts: withENO(x.opts, option(x25519))})
		if o := readSYNOptions(s.one(SendInner).Options()); o.mss != x.want {
			t.Errorf("%+v: MSS %d", x, o.mss)
		}
	}
}

// ECN is negotiated as ever; AccECN is taken off segments that carry our ENO
// (T16); Fast Open is not shown to the inner stack of a passive opener.
func TestECNAndFastOpen(t *testing.T) {
	for _, ecn := range [][2]bool{{true, true}, {true, false}, {false, true}, {false, false}} {
		s := newSim(t, link{}, &Config{}, &Config{})
		s.a.stack.ecn, s.b.stack.ecn = ecn[0], ecn[1]
		s.a.stack.ae, s.b.stack.ae = true, true
		s.wire = func(_ int, _ *simHost, f []byte) []delivery {
			if p := parse(t, f, packet.FromInner); p.Frame[p.L4+tcpOffset]&aeBit != 0 {
				t.Error("AE on the wire")
			}
			return []delivery{{f, 0}}
		}
		if got := s.open(); got != "encrypted" || s.a.est.ECNOK != (ecn[0] && ecn[1]) {
			t.Errorf("%v: %s, ECN %v", ecn, got, s.a.est.ECNOK)
		}
		if s.a.stack.sawAE || s.b.stack.sawAE {
			t.Error("AE shown to an inner stack")
		}
	}
	s := newScript(t, Config{})
	s.outer(tcp{seq: peerISS, flags: packet.SYN | packet.ECE | packet.CWR, ae: true, wnd: 1000, data: []byte("early"),
		opts: withENO([]byte{34, 6, 1, 2, 3, 4, 1, 1, 2, 4, 5, 180}, option(x25519))})
	in := s.one(SendInner)
	if o := readSYNOptions(in.Options()); o.tfo || in.Len() != 0 || in.Frame[in.L4+tcpOffset]&aeBit != 0 {
		t.Errorf("shown to the inner stack: %+v", in)
	}
	s.answered()
	if out := s.one(SendOuter); out.Ack != peerISS+1 {
		t.Error("SYN data acknowledged")
	}
}

// Without options at all.
func TestBareSYN(t *testing.T) {
	s := newSim(t, link{}, &Config{}, &Config{})
	s.a.stack.opts, s.b.stack.opts = []byte{}, []byte{}
	if got := s.open(); got != "encrypted" {
		s.dump()
		t.Fatal(got)
	}
	if e := s.a.est; e.TSOK || e.SACKOK || e.WScaleOK || e.PeerMSS != defaultMSS4 || s.a.stack.sawMSS != defaultMSS4-20 {
		t.Errorf("%+v", e)
	}
}

// Without room for a flow it is plain, or refused where it must not be, and the
// reason is the one that is given.
func TestNoRoom(t *testing.T) {
	why := ""
	verdict := Encrypt
	cfg := Config{Room: func() string { return why }, Policy: func(*packet.Key, packet.Direction) Policy { return Policy{Verdict: verdict} }}
	for _, c := range []struct {
		room    string
		verdict Verdict
		state   State
		reason  string
	}{
		{"", Encrypt, StateOffered, ""},
		{ReasonFlows, Encrypt, StatePlain, ReasonFlows},
		{ReasonMemory, Require, StateFailed, ReasonRequired},
	} {
		why, verdict = c.room, c.verdict
		s := newScript(t, cfg)
		s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 11, 0)})
		s.wantReport(c.state, c.reason)
		s = newScript(t, cfg)
		s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 64240, opts: withENO(linuxSYN(1460, 21, 0), option(x25519))})
		s.wantReport(c.state, c.reason)
	}
}

// A SYN with ENO on the ports of a plain connection, a late copy or made up, does
// not hold that up: what the socket sends shows that it lives, and passes, as does
// what the peer sends, which the kernel judges.
func TestSYNOnPlainConnection(t *testing.T) {
	s := newScript(t, Config{Orphan: func(packet.Key) bool { return false }})
	s.outer(tcp{seq: 12345, flags: packet.SYN, wnd: 64240, opts: withENO(linuxSYN(1460, 21, 0), option(x25519))})
	s.wantReport(StateOffered, "")
	s.outer(tcp{seq: 777, ack: 555, flags: packet.ACK, wnd: 100, data: []byte("before a sign of life")})
	s.none()
	out := tcp{seq: 555, ack: 777, flags: packet.ACK | packet.PSH, wnd: 100, data: []byte("data of the socket")}
	s.inner(out)
	if p := s.one(SendOuter); p.Seq != 555 || p.Ack != 777 || string(p.Payload()) != "data of the socket" {
		t.Errorf("outwards %+v", p)
	}
	for _, flags := range []uint8{0, packet.PSH, packet.FIN} {
		s.outer(tcp{seq: 777, ack: 573, flags: packet.ACK | flags, wnd: 100, data: []byte("data of the peer")})
		if p := s.one(SendInner); p.Seq != 777 || p.Ack != 573 || p.Flags != packet.ACK|flags || string(p.Payload()) != "data of the peer" {
			t.Errorf("inwards %+v", p)
		}
	}
	// A blind reset is as little believed as before, an exact one passes.
	s.outer(tcp{seq: 99999, flags: packet.RST})
	s.none()
	s.outer(tcp{seq: 777, flags: packet.RST})
	s.one(SendInner)
}

// A flow whose SYN went nowhere is dropped, and the next copy begins another.
func TestDrop(t *testing.T) {
	s := newScript(t, Config{})
	s.connect()
	k := s.m.seg.Key
	s.m.Drop(k)
	if s.m.Opens(k) || s.m.Len() != 0 {
		t.Error("the flow is still there")
	}
	s.connect()
	s.wantReport(StateOffered, "")
}

// The limit of half-open flows sheds offers, and is given back.
func TestHalfOpenLimit(t *testing.T) {
	s := newScript(t, Config{MaxHalfOpen: 10})
	syn := func(port uint16, in bool) {
		x := tcp{src: 1, dst: 2, sport: port, dport: serverPort, seq: localISS, flags: packet.SYN, wnd: 1000, opts: linuxSYN(1460, 1, 0)}
		if in {
			s.input(packet.FromInner, s.link.frame(x))
			return
		}
		x.src, x.dst, x.sport, x.dport = 2, 1, port, serverPort
		x.opts = withENO(x.opts, option(x25519))
		s.input(packet.FromOuter, s.link.frame(x))
	}
	for i := range uint16(3) {
		syn(1000+i, i == 0)
		s.wantReport(StateOffered, "")
	}
	// The rest is for connections of this host: a flood must not stop them.
	syn(1008, false)
	s.wantReport(StatePlain, ReasonLimit)
	if !s.m.Crowded() {
		t.Error("not crowded")
	}
	for i := range uint16(7) {
		syn(1009+i, true)
		s.wantReport(StateOffered, "")
	}
	for i := range uint16(200) {
		syn(2000+i, i%2 == 0)
		s.wantReport(StatePlain, ReasonLimit)
		kind := SendOuter
		if i%2 == 1 {
			kind = SendInner
		}
		if hasENO(s.one(kind).Options()) {
			t.Fatal("ENO beyond the limit")
		}
	}
	// A copy is treated as its first was, even when there is room again.
	s.tick(offerIdle - time.Millisecond)
	syn(2199, false)
	s.tick(time.Millisecond)
	if s.m.Len() != 0 {
		t.Fatalf("%d flows", s.m.Len())
	}
	if n := len(s.m.tombs.byKey); n > tombsPerFlow*10 {
		t.Errorf("%d tombstones", n)
	}
	syn(2199, false)
	if slices.Contains(s.kinds(), Divert) {
		t.Error("a copy was offered what its first was not")
	}
	syn(3000, true)
	s.wantReport(StateOffered, "")
	s.tick(time.Minute)
	s.tick(synCopies)
	if _, ok := s.m.Deadline(); ok || len(s.m.tombs.byKey) != 0 {
		t.Error("something is left")
	}
}

// P-521 and X448 cost too much to be had without limit.
func TestCostlyLimit(t *testing.T) {
	for _, c := range []struct {
		tep   byte
		limit int
	}{{p521, p521PerSecond}, {x448, x448PerSecond}} {
		s := newScript(t, Config{})
		n := c.limit + 20
		count := func(eno []byte) (offered int) {
			for i := range uint16(n) {
				s.input(packet.FromOuter, s.link.frame(tcp{src: 2, dst: 1, sport: 1000 + i, dport: serverPort, seq: uint32(i) + uint32(s.now), flags: packet.SYN, opts: withENO(nil, eno)}))
				if slices.Contains(s.kinds(), Divert) {
					offered++
				}
			}
			s.tick(time.Minute)
			return offered
		}
		if n := count(option(c.tep)); n != c.limit {
			t.Errorf("%d flows at once, want %d", n, c.limit)
		}
		s.now += 5 * time.Second
		if n := count(option(c.tep)); n != c.limit {
			t.Errorf("%d flows later, want %d", n, c.limit)
		}
		if got := count(option(x25519, c.tep)); got != n {
			t.Errorf("%d flows with a choice, want %d", got, n)
		}
	}
}

// Machines that share a limiter share its bound.
func TestSharedLimit(t *testing.T) {
	l := NewLimiter()
	took := 0
	for range 2 * p521PerSecond {
		if l.take(crypto.TEPP521, 0) {
			took++
		}
	}
	if took != p521PerSecond || !l.take(crypto.TEPX25519, 0) || !l.take(crypto.TEPP521, time.Second) {
		t.Errorf("%d at once", took)
	}
}

// The memory of peers is bounded.
func TestPeerMemory(t *testing.T) {
	p := peerMemory{known: make(map[peer]standing)}
	var k packet.Key
	for i := range 3 * maxPeers {
		k.RPort, k.Remote[0] = uint16(i), byte(i>>16)
		p.add(&k, time.Second)
		p.add(&k, 2*time.Second)
	}
	if len(p.known) != maxPeers || len(p.order) != maxPeers {
		t.Errorf("%d, %d entries", len(p.known), len(p.order))
	}
	if !p.has(&k, time.Second) || p.has(&k, 2*time.Second) {
		t.Error("wrong time")
	}
}

// A peer without ENO is remembered only on request.
func TestRememberPlain(t *testing.T) {
	for _, d := range []time.Duration{0, time.Minute} {
		s := newScript(t, Config{RememberPlainFor: d})
		s.connect()
		s.outer(synack(nil))
		s.inner(tcp{seq: 99, flags: packet.SYN, wnd: 64240})
		if d == 0 {
			s.wantReport(StateOffered, "")
		} else {
			s.wantReport(StatePlain, ReasonRemembered)
		}
	}
}

// Frames that are not TCP segments of a flow are dropped and counted.
func TestDrops(t *testing.T) {
	s := newScript(t, Config{})
	good := s.link.frame(tcp{src: 2, dst: 1, sport: 1, dport: 2, flags: packet.ACK})
	udp := bytes.Clone(good)
	udp[packet.EthLen+9] = 17
	frag := bytes.Clone(good)
	frag[packet.EthLen+7] = 1
	for _, f := range [][]byte{nil, good[:10], good[:40], udp, frag, good} {
		s.input(packet.FromOuter, f)
		s.input(packet.FromInner, f)
		s.wantKinds()
	}
	c := s.m.Counters()
	if c[dropMalformed] != 10 || c[dropUnknown] != 2 {
		t.Errorf("counters %v", c)
	}
}

// The diversion of an aborted flow ends when a new connection takes its place.
func TestNewConnectionAfterAbort(t *testing.T) {
	s := newScript(t, Config{})
	s.active(crypto.TEPX25519)
	s.outer(s.data(0, 0, []byte("plaintext")))
	s.wantReport(StateFailed, ReasonBadMagic)
	s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240})
	s.wantKinds(SendInner)
	s.inner(tcp{seq: 777, flags: packet.SYN, wnd: 64240})
	s.wantKinds(Undivert, Divert, SendOuter)
	if at, ok := s.m.Deadline(); !ok || at != s.now+offerIdle {
		t.Errorf("deadline %v", at-s.now)
	}
}

// No randomness, no keys.
func TestNoRandomness(t *testing.T) {
	s := newScript(t, Config{})
	s.m = New(Config{}, bytes.NewReader(make([]byte, 40)))
	s.connect()
	s.outer(synack(AppendAnswer(nil, 0, Suboption{TEP: crypto.TEPX25519})))
	s.wantReport(StateFailed, ReasonNoRandom)
}
