package slowpath

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

func offloaded(crypto.TEP) bool { return true }

// job returns the job that the last call handed out.
func (s *script) job() *Job {
	s.t.Helper()
	for _, a := range s.acts {
		if a.Kind == Agree {
			return a.Job
		}
	}
	s.t.Fatalf("no job: %+v", s.acts)
	return nil
}

func (s *script) agreed(j *Job) { s.acts = slices.Clone(s.m.Agreed(j, s.now)) }

// compute runs the job of the last call.
func (s *script) compute() {
	s.t.Helper()
	j := s.job()
	j.Run()
	s.agreed(j)
}

// Key agreement elsewhere leads to the same as inside of Input, however long it
// takes and whatever frame meets with a mishap.
func TestOffload(t *testing.T) {
	for _, tep := range crypto.AllTEPs {
		for _, computing := range []time.Duration{0, 3 * time.Millisecond, 700 * time.Millisecond} {
			for _, m := range mishaps {
				for i := range handshakeFrames {
					if i > 0 && tep != crypto.TEPX25519 {
						break
					}
					t.Run(fmt.Sprintf("%v/%v/%d %s", tep, computing, i, m.name), func(t *testing.T) {
						c := &Config{TEPs: []crypto.TEP{tep}, Offload: offloaded}
						s := newSim(t, link{}, c, c)
						s.computing = computing
						s.wire = func(n int, _ *simHost, f []byte) []delivery {
							if n == i {
								return m.fn(f)
							}
							return []delivery{{f, 0}}
						}
						if got := s.open(); got != "encrypted" {
							s.dump()
							t.Errorf("outcome %s", got)
						}
					})
				}
			}
		}
	}
}

// One side, or some TEPs, may compute inside of Input.
func TestOffloadMixed(t *testing.T) {
	costly := func(tep crypto.TEP) bool { return tep == crypto.TEPX448 }
	for _, x := range []struct{ a, b Config }{
		{Config{Offload: offloaded}, Config{}},
		{Config{}, Config{Offload: offloaded}},
		{Config{Offload: costly}, Config{Offload: costly}},
		{Config{Offload: costly}, Config{Offload: costly, TEPs: []crypto.TEP{crypto.TEPX448}}},
	} {
		s := newSim(t, link{}, &x.a, &x.b)
		if got := s.open(); got != "encrypted" {
			s.dump()
			t.Errorf("outcome %s", got)
		}
	}
}

// While a job runs, the peer's stream is taken and acknowledged, and reaches the
// fast path when the flow is installed.
func TestOffloadGoesOn(t *testing.T) {
	s := newScript(t, Config{TEPs: []crypto.TEP{crypto.TEPX25519}, Offload: offloaded})
	s.connect()
	s.peerENO = AppendAnswer(nil, 0, Suboption{TEP: crypto.TEPX25519})
	s.outer(synack(s.peerENO))
	s.wantKinds(SendOuter, Agree)
	if ack := s.one(SendOuter); !hasENO(ack.Options()) || ack.Len() != 0 {
		t.Error("the first ACK waits for the key")
	}
	s.compute()
	s.localInit = s.payload()

	msg := s.init2(crypto.TEPX25519, nil)
	s.outer(s.data(0, len(s.localInit), msg))
	s.wantKinds(Agree, SendOuter)
	j := s.job()
	frames := []byte("frames of the peer")
	s.outer(s.data(len(msg), len(s.localInit), frames))
	if ack := s.one(SendOuter); ack.Ack != peerISS+1+uint32(len(msg)+len(frames)) {
		t.Errorf("acknowledged up to %d", ack.Ack-peerISS-1)
	}
	s.outer(s.data(0, len(s.localInit), msg))
	fin := s.data(len(msg)+len(frames), len(s.localInit), []byte("x"))
	fin.flags |= packet.FIN
	s.outer(fin)
	s.wantKinds(SendOuter)
	j.Run()
	s.agreed(j)
	s.wantKinds(SendOuter, Install, SendInner, Reinject)
	e := s.installed()
	s.wantSession(e, msg)
	if want := append(frames, 'x'); !bytes.Equal(e.RxPending, want) {
		t.Errorf("pending %q, want %q", e.RxPending, want)
	}
	for _, a := range s.acts {
		if a.Kind == Reinject && parse(t, a.Frame, packet.FromOuter).Flags&packet.FIN == 0 {
			t.Error("the FIN is lost")
		}
	}
}

// A FIN before the Init message is whole ends the flow, also while a job runs.
func TestOffloadTruncated(t *testing.T) {
	s := newScript(t, Config{TEPs: []crypto.TEP{crypto.TEPX25519}, Offload: offloaded})
	s.connect()
	s.outer(synack(AppendAnswer(nil, 0, Suboption{TEP: crypto.TEPX25519})))
	j := s.job()
	fin := s.data(0, 0, nil)
	fin.flags = packet.FIN | packet.ACK
	s.outer(fin)
	s.wantReport(StateFailed, ReasonTruncated)
	j.Run()
	s.agreed(j)
	s.wantKinds()
}

// The deadline and resets do not wait for a job, and its result is dropped with
// its secrets.
func TestOffloadDies(t *testing.T) {
	for _, x := range []struct {
		name string
		end  func(s *script)
	}{
		{"deadline", func(s *script) { s.tick(time.Minute) }},
		{"reset of the peer", func(s *script) {
			s.outer(tcp{seq: peerISS + 1 + uint32(s.m.flows[s.link.key(1, clientPort, 2, serverPort)].rxNext()), flags: packet.RST})
		}},
		{"reset of the inner stack", func(s *script) {
			s.inner(tcp{seq: localISS + 1, ack: peerISS + 1, flags: packet.RST | packet.ACK})
		}},
		{"another connection", func(s *script) {
			s.tick(time.Minute)
			s.tick(time.Minute)
			s.passive(crypto.TEPX25519)
			s.outer(s.data(0, 0, s.init1(crypto.TEPX25519, false, nil)))
			s.job()
			s.acts = nil
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			s := newScript(t, Config{TEPs: []crypto.TEP{crypto.TEPX25519}, Offload: offloaded})
			s.passive(crypto.TEPX25519)
			s.outer(s.data(0, 0, s.init1(crypto.TEPX25519, false, nil)))
			j := s.job()
			x.end(s)
			j.Run()
			s.agreed(j)
			s.wantKinds()
			if _, _, err := j.priv.Shared(j.peer); err == nil || !bytes.Equal(j.es, make([]byte, 32)) {
				t.Error("secrets of the job are left")
			}
			if j2 := s.m.flows[s.link.key(1, clientPort, 2, serverPort)]; j2 != nil && j2.job == nil {
				t.Error("the result went to another connection")
			}
		})
	}
}

// Failures of the agreement are those of the exchange, and a job that was not
// run is one.
func TestOffloadFails(t *testing.T) {
	for _, x := range []struct {
		name   string
		spoil  func(*crypto.Init1)
		run    bool
		reason string
	}{
		{"zero shared secret", func(m *crypto.Init1) { m.Pub = make([]byte, 32) }, true, ReasonBadKey},
		{"not run", nil, false, ReasonOverload},
	} {
		t.Run(x.name, func(t *testing.T) {
			s := newScript(t, Config{TEPs: []crypto.TEP{crypto.TEPX25519}, Offload: offloaded})
			s.passive(crypto.TEPX25519)
			s.outer(s.data(0, 0, s.init1(crypto.TEPX25519, false, x.spoil)))
			j := s.job()
			if x.run {
				j.Run()
			}
			s.agreed(j)
			s.wantReport(StateFailed, x.reason)
			if s.m.Len() != 0 {
				t.Error("still half-open")
			}
		})
	}
}

// A key made ahead goes into the job, and none is made while a job makes one.
func TestOffloadAhead(t *testing.T) {
	s := newScript(t, Config{TEPs: []crypto.TEP{crypto.TEPX25519}, Offload: offloaded})
	s.passive(crypto.TEPX25519)
	if !s.m.Ahead(s.now) {
		t.Fatal("no key ahead")
	}
	s.outer(s.data(0, 0, s.init1(crypto.TEPX25519, false, nil)))
	if j := s.job(); j.priv == nil {
		t.Error("the key made ahead is not used")
	}
	s = newScript(t, Config{TEPs: []crypto.TEP{crypto.TEPX25519}, Offload: offloaded})
	s.connect()
	s.outer(synack(AppendAnswer(nil, 0, Suboption{TEP: crypto.TEPX25519})))
	if s.m.Ahead(s.now) {
		t.Error("two keys for one flow")
	}
	s.compute()
	if len(s.payload()) == 0 {
		t.Error("no Init1")
	}
}

// A key that was made ahead for another TEP is erased, and a flow whose SYN went
// without ENO in the end gets none.
func TestAheadInVain(t *testing.T) {
	for _, offload := range []func(crypto.TEP) bool{nil, offloaded} {
		s := newScript(t, Config{TEPs: []crypto.TEP{crypto.TEPX25519, crypto.TEPP256}, Offload: offload})
		s.connect()
		s.m.Ahead(s.now)
		f := s.m.flows[s.link.key(1, clientPort, 2, serverPort)]
		key := f.priv
		s.outer(synack(AppendAnswer(nil, 0, Suboption{TEP: crypto.TEPP256})))
		if offload != nil {
			s.compute()
		}
		if f.priv == key || f.priv.TEP() != crypto.TEPP256 {
			t.Errorf("the key is for %v", f.priv.TEP())
		}
		if _, _, err := key.Shared(make([]byte, 32)); !errors.Is(err, crypto.ErrPrivateKey) {
			t.Errorf("the key made ahead is not erased: %v", err)
		}
	}
	s := newScript(t, Config{TEPs: []crypto.TEP{crypto.TEPX25519}})
	for range maxSYNs {
		s.connect()
		s.tick(time.Second)
	}
	if s.m.Ahead(s.now) {
		t.Error("a key for a plain connection")
	}
}
