package slowpath

import (
	"fmt"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

func always(p Policy) func(*packet.Key, packet.Direction) Policy {
	return func(*packet.Key, packet.Direction) Policy { return p }
}

// simOpen lets both hosts connect to each other at once.
func simOpen(s *sim) string {
	s.t.Helper()
	s.a.stack.connect()
	s.b.stack.connect()
	s.run(130 * time.Second)
	return s.outcome()
}

// Both SYNs cross, and host b sets the b bit by configuration (RFC 8547 section
// 4.3): the connection is encrypted whichever frames are lost or late.
func TestSimultaneousOpenRoles(t *testing.T) {
	passive := always(Policy{PassiveRole: true})
	wires := map[string]func(int) []time.Duration{
		"clean": func(int) []time.Duration { return []time.Duration{0} },
		"twice": func(int) []time.Duration { return []time.Duration{0, time.Millisecond} },
	}
	for lost := range 8 {
		wires[fmt.Sprintf("lost %d", lost)] = func(n int) []time.Duration {
			if n == lost {
				return nil
			}
			return []time.Duration{0}
		}
		wires[fmt.Sprintf("late %d", lost)] = func(n int) []time.Duration {
			if n == lost {
				return []time.Duration{20 * time.Millisecond}
			}
			return []time.Duration{0}
		}
	}
	for name, wire := range wires {
		t.Run(name, func(t *testing.T) {
			s := newSim(t, link{}, &Config{}, &Config{Policy: passive})
			s.wire = func(n int, _ *simHost, f []byte) (ds []delivery) {
				for _, d := range wire(n) {
					ds = append(ds, delivery{f, d})
				}
				return ds
			}
			if got := simOpen(s); got != "encrypted" {
				s.dump()
				t.Fatalf("outcome %s", got)
			}
			if !s.a.est.Active || !s.b.est.Active && name == "clean" {
				t.Errorf("opened actively: %v, %v", s.a.est.Active, s.b.est.Active)
			}
		})
	}
}

// With equal b bits there are no roles, and the connection stays plain.
func TestSimultaneousOpenSameRole(t *testing.T) {
	for _, b := range []bool{false, true} {
		cfg := Config{Policy: always(Policy{PassiveRole: b})}
		s := newSim(t, link{}, &cfg, &cfg)
		if got := simOpen(s); got != "plain" || s.a.last().Reason != ReasonSimultaneous || s.b.last().Reason != ReasonSimultaneous {
			s.dump()
			t.Errorf("b = %v: outcome %s", b, got)
		}
	}
}

// An opener with b = 1 has no role against one that listens.
func TestPassiveRoleOpens(t *testing.T) {
	s := newSim(t, link{}, &Config{Policy: always(Policy{PassiveRole: true})}, &Config{})
	if got := s.open(); got != "plain" || s.b.last().Reason != ReasonRoleConflict {
		s.dump()
		t.Errorf("outcome %s", got)
	}
}

// Mandatory application-aware mode needs a = 1 of the other side; without it
// the bit decides nothing (RFC 8547 section 4.2).
func TestAppAware(t *testing.T) {
	for _, x := range []struct {
		a, b    AppAware
		outcome string
	}{
		{AppAwareOff, AppAwareOff, "encrypted"},
		{AppAwareOn, AppAwareOff, "encrypted"},
		{AppAwareOff, AppAwareOn, "encrypted"},
		{AppAwareMandatory, AppAwareOn, "encrypted"},
		{AppAwareOn, AppAwareMandatory, "encrypted"},
		{AppAwareMandatory, AppAwareMandatory, "encrypted"},
		{AppAwareMandatory, AppAwareOff, "plain"},
		{AppAwareOff, AppAwareMandatory, "plain"},
	} {
		t.Run(fmt.Sprintf("%d to %d", x.a, x.b), func(t *testing.T) {
			s := newSim(t, link{}, &Config{Policy: always(Policy{AppAware: x.a})}, &Config{Policy: always(Policy{AppAware: x.b})})
			s.wire = func(_ int, h *simHost, f []byte) []delivery {
				if p := parse(t, f, packet.FromInner); p.Flags&packet.SYN != 0 {
					o := readSYNOptions(p.Options())
					e, err := ParseENO(o.option())
					want := x.a
					if h == s.b {
						want = x.b
					}
					if o.enos > 0 && (err != nil || e.AppAware() != (want != AppAwareOff)) {
						t.Errorf("option %x of mode %d: %v", o.option(), want, err)
					}
				}
				return []delivery{{f, 0}}
			}
			if got := s.open(); got != x.outcome {
				s.dump()
				t.Fatalf("outcome %s", got)
			}
			if x.outcome == "plain" && s.a.last().Reason != ReasonNotAppAware && s.b.last().Reason != ReasonNotAppAware {
				t.Errorf("reasons %q, %q", s.a.last().Reason, s.b.last().Reason)
			}
		})
	}
}

// Keys are made while the peer is waited for, one for each connection, and not
// in a flood.
func TestAhead(t *testing.T) {
	cfg := Config{TEPs: []crypto.TEP{crypto.TEPX25519}}
	s := newScript(t, cfg)
	if s.m.Ahead(s.now) {
		t.Error("worked without a flow")
	}
	s.connect()
	if !s.m.Ahead(s.now) || s.m.Ahead(s.now) {
		t.Error("not one key for one flow")
	}
	var pub []byte
	for _, f := range s.m.flows {
		pub = f.priv.Public(false)
	}
	s.outer(synack(AppendAnswer(nil, 0, Suboption{TEP: crypto.TEPX25519})))
	if init1 := s.payload(); string(init1[len(init1)-len(pub):]) != string(pub) {
		t.Error("Init1 has another key than the one made ahead")
	}

	s = newScript(t, cfg)
	s.listening(crypto.TEPX25519)
	if s.m.Ahead(s.now) {
		t.Error("a key for a SYN that the inner stack has not answered")
	}
	s.answered()
	if !s.m.Ahead(s.now) {
		t.Error("no key for the passive opener")
	}

	s = newScript(t, cfg)
	for n := range 4 * aheadFlows {
		x := tcp{src: 2, dst: 1, sport: uint16(1000 + n), dport: clientPort, seq: peerISS, flags: packet.SYN, wnd: 1000,
			opts: withENO(linuxSYN(1400, 21, 0), AppendOffer(nil, 0, cfg.TEPs, Suboption{}))}
		s.input(packet.FromOuter, s.link.frame(x))
		y := tcp{src: 1, dst: 2, sport: clientPort, dport: x.sport, seq: localISS, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: 1000, opts: linuxSYN(1460, 11, 21)}
		s.input(packet.FromInner, s.link.frame(y))
	}
	made := 0
	for s.m.Ahead(s.now) {
		made++
	}
	if made > aheadFlows {
		t.Errorf("a flood bought %d keys", made)
	}
}

// AbortAll resets both sides of every half-open flow.
func TestAbortAll(t *testing.T) {
	s := newScript(t, Config{})
	s.active(crypto.TEPX25519)
	s.acts = s.m.AbortAll("test", s.now)
	s.wantKinds(SendOuter, SendInner)
	s.wantReport(StateFailed, "test")
	for _, k := range []ActionKind{SendOuter, SendInner} {
		if p := s.one(k); p.Flags&packet.RST == 0 {
			t.Errorf("flags %#x", p.Flags)
		}
	}
	if s.m.Len() != 0 {
		t.Error("a flow is left")
	}
}
