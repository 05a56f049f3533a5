package slowpath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// The tests of this file are those of docs/conformance.md that no other test
// of the package brings along.

// enoOptions returns the ENO options of a segment as they stand there.
func enoOptions(p *packet.Segment) (opts [][]byte) {
	_ = packet.WalkOptions(p.Options(), func(o []byte) bool {
		if o[0] == packet.OptENO {
			opts = append(opts, bytes.Clone(o))
		}
		return true
	})
	return opts
}

// The non-SYN form is sent empty, and only its presence counts when it is
// received, whatever it holds and however often it is there (RFC 8547 section
// 4.1).
func TestNonSYNForm(t *testing.T) {
	s := newScript(t, Config{})
	s.connect()
	s.outer(synack(AppendAnswer(nil, 0, Suboption{TEP: crypto.TEPX25519})))
	segs := s.sent(SendOuter)
	if len(segs) != 2 {
		t.Fatalf("%d segments answer the SYN-ACK", len(segs))
	}
	for i, p := range segs {
		if o := enoOptions(p); len(o) != 1 || !bytes.Equal(o[0], []byte{packet.OptENO, 2}) {
			t.Errorf("segment %d has the options %x", i, o)
		}
	}
	for name, opts := range map[string][]byte{
		"empty":      {packet.OptENO, 2},
		"contents":   {packet.OptENO, 5, 0x80, 0x01, 0xff},
		"ill-formed": {packet.OptENO, 3, 0x9f},
		"twice":      {packet.OptENO, 2, packet.OptENO, 4, 0x01, 0x23},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScript(t, Config{})
			s.listening(crypto.TEPX25519)
			s.answered()
			ack := firstACK(false, 0, nil)
			ack.opts = withENO(ack.opts, opts)
			s.outer(ack)
			s.wantReport(StateNegotiating, "")
		})
	}
}

// optionWatch holds the ENO options of a connection to the rules for what is
// sent, whatever becomes of it.
type optionWatch struct {
	t    *testing.T
	name string
	syn  map[*simHost][]byte // the SYN-form option of a host
	// When the first segment without SYN reached a host, at the earliest.
	heard map[*simHost]time.Duration
}

func newOptionWatch(t *testing.T, name string) *optionWatch {
	return &optionWatch{t: t, name: name, syn: make(map[*simHost][]byte), heard: make(map[*simHost]time.Duration)}
}

func (w *optionWatch) see(h *simHost, f []byte, ds []delivery) {
	p := parse(w.t, f, packet.FromInner)
	opts := enoOptions(p)
	_ = packet.WalkOptions(p.Options(), func(o []byte) bool {
		if o[0] == packet.OptExp1 {
			w.t.Errorf("%s: host %d sends the experimental option %x", w.name, h.n, o)
		}
		return true
	})
	if p.Flags&packet.SYN != 0 {
		w.synForm(h, p, opts)
		return
	}
	heard, ok := w.heard[h]
	if (!ok || heard > h.s.now) && len(opts) == 0 {
		w.t.Errorf("%s: host %d sends a segment without ENO before it got one without SYN", w.name, h.n)
	}
	for _, d := range ds {
		at := h.s.now + h.s.delay + d.delay
		if was, ok := w.heard[h.other]; !ok || at < was {
			w.heard[h.other] = at
		}
	}
}

// synForm checks the option of a SYN or SYN-ACK (RFC 8547 sections 4.1 to 4.6,
// RFC 8548 section 3.5).
func (w *optionWatch) synForm(h *simHost, p *packet.Segment, opts [][]byte) {
	if len(opts) != 1 || p.Len() != 0 {
		w.t.Errorf("%s: host %d sends a SYN with %d ENO options and %d bytes", w.name, h.n, len(opts), p.Len())
		return
	}
	opt := opts[0]
	if was := w.syn[h]; was != nil && !bytes.Equal(was, opt) {
		w.t.Errorf("%s: host %d alters its option from %x to %x", w.name, h.n, was, opt)
	}
	w.syn[h] = opt
	e, err := ParseENO(opt)
	if err != nil || e.Vacuous() {
		w.t.Errorf("%s: host %d sends %x: %v", w.name, h.n, opt, err)
		return
	}
	size, resumptions := enoHead, 0
	seen := make(map[crypto.TEP]bool)
	for i, s := range e.Subs {
		size += 1 + len(s.Data)
		if seen[s.TEP] {
			w.t.Errorf("%s: host %d repeats %v in %x", w.name, h.n, s.TEP, opt)
		}
		seen[s.TEP] = true
		if s.V {
			resumptions++
			if !isResumption(s) || i != len(e.Subs)-1 {
				w.t.Errorf("%s: host %d sends suboption %d of %x", w.name, h.n, i, opt)
			}
		}
	}
	// What is left is the global suboption: none or one, and with no bit but
	// a and b.
	globals := len(opt) - size
	if globals > 1 || globals == 1 && opt[enoHead]&^(enoA|enoB) != 0 || resumptions > 1 {
		w.t.Errorf("%s: host %d sends %d global and %d resumption suboptions in %x", w.name, h.n, globals, resumptions, opt)
	}
	if p.Flags&packet.ACK != 0 && !h.simultaneous() && (!e.Explicit || !e.PassiveRole() || len(e.Subs) != 1) {
		w.t.Errorf("%s: the passive opener sends %x", w.name, opt)
	}
}

// simultaneous reports whether the host opened the connection by itself.
func (h *simHost) simultaneous() bool { return h.m.flows[h.key] == nil || h.m.flows[h.key].active }

// Every option that is sent obeys the rules, for all policies, fresh and
// resumed, with each frame lost in turn.
func TestOptionsSent(t *testing.T) {
	for name, x := range map[string]struct {
		a, b    Policy
		resumed bool
		crossed bool
	}{
		"fresh":        {},
		"resumed":      {resumed: true},
		"app-aware":    {a: Policy{AppAware: AppAwareOn}, b: Policy{AppAware: AppAwareMandatory}},
		"both bits":    {b: Policy{AppAware: AppAwareOn, PassiveRole: true}, crossed: true},
		"simultaneous": {b: Policy{PassiveRole: true}, crossed: true},
	} {
		for lost := -1; lost < 9; lost++ {
			h := newHosts(t)
			if x.resumed {
				h.encrypted(false)
			}
			h.a.Policy, h.b.Policy = always(x.a), always(x.b)
			s := newSim(t, link{}, &h.a, &h.b)
			w := newOptionWatch(t, fmt.Sprintf("%s, %d lost", name, lost))
			s.wire = func(n int, from *simHost, f []byte) (ds []delivery) {
				if n != lost {
					ds = []delivery{{f, 0}}
				}
				w.see(from, f, ds)
				return ds
			}
			outcome := ""
			if x.crossed {
				outcome = simOpen(s)
			} else {
				outcome = s.open()
			}
			if outcome != "encrypted" || s.a.est.Resumed != x.resumed {
				s.dump()
				t.Fatalf("%s, frame %d lost: %s", name, lost, outcome)
			}
		}
	}
}

// Data of a SYN with ENO is neither acknowledged nor remembered: only what
// comes in segments without SYN is the stream (RFC 8547 section 4.7).
func TestSYNData(t *testing.T) {
	s := newScript(t, Config{})
	msg := s.init1(crypto.TEPX25519, false, nil)
	s.peerENO = AppendOffer(nil, 0, []crypto.TEP{crypto.TEPX25519}, Suboption{})
	for _, data := range [][]byte{msg, []byte("GET / HTTP/1.1\r\n"), nil} {
		s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: withENO(linuxSYN(1400, 21, 0), s.peerENO), data: data})
		in := s.one(SendInner)
		if in.Len() != 0 || in.Seq != peerISS {
			t.Fatalf("the inner stack gets a SYN with %d bytes", in.Len())
		}
	}
	if p := s.answered(); p.Ack != peerISS+1 {
		t.Errorf("the SYN-ACK acknowledges %d bytes", p.Ack-peerISS-1)
	}
	// A copy that brings data again gets the same SYN-ACK.
	s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: withENO(linuxSYN(1400, 21, 0), s.peerENO), data: []byte("again")})
	if p := s.one(SendOuter); p.Flags != packet.SYN|packet.ACK || p.Ack != peerISS+1 {
		t.Errorf("a copy is answered by %+v", p)
	}
	s.outer(firstACK(true, 0, nil))
	s.outer(s.data(0, 0, msg))
	s.wantSession(s.installed(), msg)
}

// A passive opener whose SYN had no ENO option sends none (RFC 8547 section
// 4.6).
func TestNoOptionUnasked(t *testing.T) {
	s := newScript(t, Config{})
	s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: linuxSYN(1400, 21, 0)})
	s.inner(tcp{seq: localISS, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: 65160, opts: linuxSYN(1460, 11, 21)})
	if p := s.one(SendOuter); len(enoOptions(p)) != 0 {
		t.Errorf("SYN-ACK with %x", enoOptions(p))
	}
}

// Whatever of a SYN-form option is altered on the way, and however well it
// still negotiates, the two ends do not share a connection (RFC 8547 section
// 4.8).
func TestTamperedOptions(t *testing.T) {
	for _, x := range []struct {
		name  string
		isSYN bool
		alter func(contents []byte)
	}{
		{"best TEP taken from the offer", true, func(c []byte) { c[0] = 0x30 }},
		{"order of the offer", true, func(c []byte) { c[0], c[1] = c[1], c[0] }},
		{"unknown TEP offered", true, func(c []byte) { c[len(c)-1] = 0x7f }},
		{"a bit of the answer", false, func(c []byte) { c[0] |= enoA }},
		{"z bit of the answer", false, func(c []byte) { c[0] |= 0x10 }},
		{"another TEP answered", false, func(c []byte) { c[1] = p256 }},
	} {
		t.Run(x.name, func(t *testing.T) {
			s := newSim(t, link{}, &Config{}, &Config{})
			s.wire = func(_ int, _ *simHost, f []byte) []delivery {
				p := parse(t, f, packet.FromInner)
				if p.Flags&packet.SYN != 0 && isSYN(p) == x.isSYN {
					o := enoOptions(p)[0]
					at := bytes.Index(f[p.L4:], o) + p.L4
					x.alter(f[at+enoHead : at+len(o)])
				}
				return []delivery{{f, 0}}
			}
			s.b.stack.state = "listen"
			s.a.stack.connect()
			s.run(130 * time.Second)
			a, b := s.a.est, s.b.est
			if a == nil || b == nil {
				return // no connection at all
			}
			if a.Session.ID() == b.Session.ID() {
				t.Error("the session IDs are equal")
			}
			frame := make([]byte, crypto.Overhead)
			a.Session.SendKey(0).Seal(frame, []byte{0}, 0, uint64(len(a.TxInit)))
			if _, ok := b.Session.RecvKey(0).Open(frame, uint64(b.RxOffset)); ok {
				t.Error("a frame of A opens at B")
			}
		})
	}
}

// Keys and nonces of the exchange are made anew for each connection (RFC 8548
// section 3.3).
func TestFreshKeys(t *testing.T) {
	type half struct{ nonce, pub string }
	seen := make(map[half]bool)
	pubs, nonces := make(map[string]bool), make(map[string]bool)
	note := func(h half) {
		seen[h], pubs[h.pub], nonces[h.nonce] = true, true, true
	}
	s := newScript(t, Config{})
	for i := range uint32(8) {
		s.active(crypto.TEPX25519)
		m, err := crypto.ParseInit1(crypto.TEPX25519, s.localInit)
		if err != nil {
			t.Fatal(err)
		}
		note(half{string(m.Nonce[:]), string(m.Pub)})
		s.outer(tcp{seq: peerISS + 1, flags: packet.RST})
		s.tick(2 * DefaultRememberFor)

		p := newScript(t, Config{})
		p.m.rand = seeded(100 + uint64(i))
		p.passive(crypto.TEPX25519)
		p.outer(p.data(0, 0, p.init1(crypto.TEPX25519, false, nil)))
		m2, err := crypto.ParseInit2(crypto.TEPX25519, p.installed().TxInit)
		if err != nil {
			t.Fatal(err)
		}
		note(half{string(m2.Nonce[:]), string(m2.Pub)})
	}
	if len(seen) != 16 || len(pubs) != 16 || len(nonces) != 16 {
		t.Errorf("16 exchanges have %d keys and %d nonces", len(pubs), len(nonces))
	}
}

// Init messages say their true length and end with the public key (RFC 8548
// section 4.1).
func TestInitHasNoIgnoredBytes(t *testing.T) {
	for _, tep := range crypto.AllTEPs {
		s := newScript(t, Config{})
		s.active(tep)
		p := newScript(t, Config{})
		p.passive(tep)
		p.outer(p.data(0, 0, p.init1(tep, false, nil)))
		for name, x := range map[string]struct {
			msg   []byte
			fixed int
		}{
			"Init1": {s.localInit, 9 + 2*len(crypto.AllAEADs)},
			"Init2": {p.installed().TxInit, 10},
		} {
			want := x.fixed + 32 + tep.PubLen()
			if n := int(binary.BigEndian.Uint32(x.msg[4:])); n != want || len(x.msg) != want {
				t.Errorf("%v: %s has %d bytes and says %d, want %d", tep, name, len(x.msg), n, want)
			}
		}
	}
}

// The private key is erased once the keys are agreed, or the exchange is over
// without (RFC 8548 section 3.3, RFC 8547 section 5).
func TestPrivateKeyErased(t *testing.T) {
	for name, end := range map[string]func(s *script){
		"agreed":    func(s *script) { s.outer(s.data(0, len(s.localInit), s.init2(crypto.TEPX25519, nil))) },
		"reset":     func(s *script) { s.outer(tcp{seq: peerISS + 1, flags: packet.RST}) },
		"bad magic": func(s *script) { s.outer(s.data(0, len(s.localInit), []byte("HTTP/1.1 200 OK"))) },
		"timeout":   func(s *script) { s.tick(2 * DefaultDeadline) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newScript(t, Config{})
			s.active(crypto.TEPX25519)
			priv := s.m.flows[s.link.key(1, clientPort, 2, serverPort)].priv
			other, err := crypto.GenerateKey(crypto.TEPX25519, seeded(4))
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := priv.Shared(other.Public(false)); err != nil {
				t.Fatalf("no key during the exchange: %v", err)
			}
			end(s)
			if s.m.Len() != 0 {
				t.Fatal("the exchange goes on")
			}
			if _, _, err := priv.Shared(other.Public(false)); !errors.Is(err, crypto.ErrPrivateKey) {
				t.Errorf("after the exchange: %v", err)
			}
		})
	}
}

// Once a copy of the SYN went without ENO no later one has it again, at the
// pauses of Linux (RFC 8547 section 4.6, T17).
func TestSYNOfferedOnce(t *testing.T) {
	s := newScript(t, Config{})
	begin := s.now
	for i, at := range []time.Duration{0, 1, 3, 7, 15, 31, 63, 127} {
		for {
			due, ok := s.m.Deadline()
			if !ok || due >= begin+at*time.Second {
				break
			}
			s.tick(due - s.now)
		}
		s.now = begin + at*time.Second
		s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 12, 0)})
		if got := hasENO(s.one(SendOuter).Options()); got != (i < 2) {
			t.Errorf("SYN %d, after %d s: ENO %v", i, at, got)
		}
	}
}

// The option and its experimental predecessor are never in one segment (RFC
// 8547 section 11).
func TestNoExperimentalOptionBeside(t *testing.T) {
	legacy := []byte{packet.OptExp1, 5, 0x45, 0x4e, x25519}
	check := func(p *packet.Segment) {
		t.Helper()
		if bytes.Contains(p.Options(), legacy[:4]) && hasENO(p.Options()) {
			t.Errorf("both are in %x", p.Options())
		}
	}
	s := newScript(t, Config{})
	s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240, opts: withENO([]byte{2, 4, 5, 180}, legacy)})
	check(s.one(SendOuter))
	s = newScript(t, Config{})
	s.listening(crypto.TEPX25519)
	s.inner(tcp{seq: localISS, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: 65160, opts: withENO([]byte{2, 4, 5, 180}, legacy)})
	check(s.one(SendOuter))
}

// Host B writes its TEPs down by increasing priority, since the last valid one
// is negotiated (RFC 8547 section 4.5).
func TestOrderOfHostB(t *testing.T) {
	prefs := []crypto.TEP{crypto.TEPX25519, crypto.TEPX448, crypto.TEPP256}
	for n := 1; n <= len(prefs); n++ {
		s := newSim(t, link{}, &Config{TEPs: prefs}, &Config{TEPs: prefs[len(prefs)-n:], Policy: always(Policy{PassiveRole: true})})
		if got := simOpen(s); got != "encrypted" {
			t.Fatal(got)
		}
		if want := prefs[len(prefs)-n]; s.a.est.TEP != want {
			t.Errorf("agreed on %v, host B prefers %v", s.a.est.TEP, want)
		}
	}
}
