package slowpath

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// fuzzer plays both an inner stack and a peer, well-behaved or not, to one
// Machine, and checks what must hold whatever happens.
type fuzzer struct {
	t      *testing.T
	m      *Machine
	now    time.Duration
	script []byte
	links  []link
	sealed map[packet.Key]bool // encryption was enabled
	seen   map[packet.Key]*fuzzFlow
	jobs   []*Job
	peer   *Cache                          // of the peer, nil when nothing is resumed
	named  map[packet.Key]Suboption        // newest resumption suboption that left
	used   map[[crypto.ResumeLen]byte]bool // halves of the secrets that keys were made of
}

// newFuzzer makes a Machine whose configuration the bits of how choose.
func newFuzzer(t *testing.T, how byte, teps ...crypto.TEP) *fuzzer {
	z := &fuzzer{
		t: t, links: []link{{}, {v6: true, vlan: 5}},
		sealed: make(map[packet.Key]bool), seen: make(map[packet.Key]*fuzzFlow),
		named: make(map[packet.Key]Suboption), used: make(map[[crypto.ResumeLen]byte]bool),
	}
	cfg := Config{TEPs: teps, MaxHalfOpen: 3}
	p := Policy{PassiveRole: how&0x10 != 0}
	if how&2 != 0 {
		p.Verdict = Require
	}
	if how&0x20 != 0 {
		p.AppAware = AppAwareMandatory
	}
	cfg.Policy = func(*packet.Key, packet.Direction) Policy { return p }
	if how&8 != 0 {
		cfg.Offload = func(crypto.TEP) bool { return true }
	}
	if how&4 != 0 {
		cfg.Cache, z.peer = NewCache(0, 0), NewCache(0, 0)
		cfg.ResumeNonce = int(how >> 6 & 1 * 8)
		for i, l := range z.links {
			for _, role := range []crypto.Role{crypto.RoleA, crypto.RoleB} {
				secret := func() *crypto.Secret {
					s := crypto.NewSession(role, crypto.AES128GCM, x25519, nil, nil, nil, []byte{byte(i), byte(role)}, []byte{1})
					return s.NextSecret()
				}
				k, r := l.key(1, clientPort, 2, serverPort), l.key(2, serverPort, 1, clientPort)
				cfg.Cache.add(&k, true, crypto.TEPX25519, crypto.AES128GCM, role, secret(), 0)
				z.peer.add(&r, true, crypto.TEPX25519, crypto.AES128GCM, role.Peer(), secret(), 0)
			}
		}
	}
	z.m = New(cfg, seeded(1))
	return z
}

// proposal is an ENO option that offers resumption, of a connection that the
// peer opens.
func (z *fuzzer) proposal(l link) []byte {
	r := l.key(2, serverPort, 1, clientPort)
	if z.peer == nil {
		return option(x25519)
	}
	u := z.peer.propose(&r, func(crypto.TEP, crypto.AEAD) bool { return true }, z.now)
	if u == nil {
		return option(x25519)
	}
	return AppendOffer(nil, 0, []crypto.TEP{crypto.TEPX448}, u.suboption(make([]byte, z.byte()%9)))
}

// consent is an ENO option that agrees to the newest proposal of the Machine, if
// there was one.
func (z *fuzzer) consent(k packet.Key) []byte {
	named, ok := z.named[k]
	if !ok || z.peer == nil {
		return option(1, x25519)
	}
	u := z.peer.reserve(named.Data[:crypto.ResumeLen], named.TEP, func(crypto.TEP, crypto.AEAD) bool { return true }, z.now)
	if u == nil {
		return option(1, x25519)
	}
	defer z.peer.restore(u)
	return AppendAnswer(nil, enoA, u.suboption(make([]byte, z.byte()%9)))
}

// compute gives the oldest job back, run or not.
func (z *fuzzer) compute(run bool) {
	j := z.jobs[0]
	z.jobs = z.jobs[1:]
	if run {
		if j.priv == nil {
			key, err := crypto.GenerateKey(j.tep, seeded(4))
			if err != nil {
				z.t.Fatal(err)
			}
			j.priv = key
		}
		j.Run()
	}
	z.check(z.m.Agreed(j, z.now))
}

// fuzzFlow is what a peer and an inner stack know of a connection.
type fuzzFlow struct {
	outSeq, outAck uint32 // of the newest segment that left
	inSeq, inAck   uint32 // of the newest segment that entered
}

func (z *fuzzer) byte() byte {
	if len(z.script) == 0 {
		return 0
	}
	b := z.script[0]
	z.script = z.script[1:]
	return b
}

// plaintext is what peers and inner stacks send that have no keys.
var plaintext = []byte("PLAINTEXT")

var fuzzFlags = []uint8{
	packet.SYN, packet.SYN | packet.ACK, packet.ACK, packet.ACK | packet.PSH, packet.RST, packet.RST | packet.ACK,
	packet.FIN | packet.ACK, 0, packet.SYN | packet.ECE | packet.CWR, packet.SYN | packet.ACK | packet.ECE,
}

// step makes one segment out of the script.
func (z *fuzzer) step() {
	op := z.byte()
	if len(z.jobs) > 0 && z.byte()%4 == 0 {
		z.compute(z.byte()%8 != 0)
	}
	if op >= 0xf0 {
		z.now += time.Duration(op-0xef) * 150 * time.Millisecond
		z.check(z.m.Tick(z.now))
		return
	}
	if op >= 0xc0 {
		z.advance(op)
		return
	}
	dir := packet.Direction(op & 1)
	l := z.links[op>>1&1]
	port := clientPort + uint16(op>>2&3)
	x := tcp{src: 2, dst: 1, sport: serverPort, dport: port, wnd: uint16(z.byte()) << 8}
	if dir == packet.FromInner {
		x.src, x.dst, x.sport, x.dport = 1, 2, port, serverPort
	}
	x.flags = fuzzFlags[int(z.byte())%len(fuzzFlags)]
	f := z.seen[l.key(1, port, 2, serverPort)]
	if f == nil {
		f = &fuzzFlow{outSeq: 100, inSeq: 200}
	}
	// The other side's numbers, or near them.
	near := uint32(0)
	if b := z.byte(); b >= 0xc0 {
		near = uint32(int8(b<<2) / 8)
	}
	x.seq, x.ack = f.outAck+near, f.outSeq+1
	if dir == packet.FromInner {
		x.seq, x.ack = f.inAck+near, f.inSeq+1
	}
	if x.flags&packet.SYN != 0 {
		x.seq = 5000 + near
		if dir == packet.FromInner {
			x.seq = 1000 + near
		}
	}
	switch z.byte() % 10 {
	case 0:
	case 8:
		x.opts = withENO(linuxSYN(1460, uint32(z.now/time.Millisecond), 1), z.proposal(l))
	case 9:
		x.opts = withENO(linuxSYN(1460, uint32(z.now/time.Millisecond), 1), z.consent(l.key(1, port, 2, serverPort)))
	case 1:
		x.opts = withENO(linuxSYN(1460, uint32(z.now/time.Millisecond), 1), option(1, x25519))
	case 2:
		x.opts = withENO(linuxSYN(1460, uint32(z.now/time.Millisecond), 1), option(x25519))
	case 3:
		x.opts = withENO(nil, option())
	case 4:
		x.opts = linuxSYN(1460, 1, 1)
	case 5:
		n := int(z.byte()) % 36 &^ 3
		for range n {
			x.opts = append(x.opts, z.byte())
		}
	case 6:
		x.opts = withENO(timestamps(1<<20, 1), option())
	case 7:
		x.opts = withENO(nil, option(1, x25519))
	}
	switch z.byte() % 8 {
	case 0, 1:
	case 2, 3, 4:
		x.data = z.initMessage()
		if cut := int(z.byte()); cut < len(x.data) && cut > 0 {
			x.data = x.data[:cut]
		}
	case 5:
		x.data = bytes.Repeat(plaintext, 1+int(z.byte())/8)
	case 6:
		x.data = z.initMessage()
		at := int(z.byte()) % len(x.data)
		x.seq += uint32(at)
		x.data = x.data[at:]
	case 7:
		x.data = trailing(z.initMessage(), int(z.byte()))
	}
	frame := l.frame(x)
	if z.byte()%16 == 1 {
		frame[int(z.byte())%len(frame)] ^= z.byte()
	}
	if z.byte()%16 == 1 {
		frame = frame[:int(z.byte())%len(frame)]
	}
	z.now += time.Duration(z.byte()) * time.Millisecond
	z.check(z.m.Input(dir, frame, z.now))
}

// advance brings a connection some way by the rules: the bits of op choose the
// side that opens, the link and the port, and how far it gets.
func (z *fuzzer) advance(op byte) {
	l := z.links[op>>1&1]
	local := tcp{src: 1, dst: 2, sport: clientPort + uint16(op>>2&3), dport: serverPort, wnd: 1000}
	remote := tcp{src: 2, dst: 1, sport: serverPort, dport: local.sport, wnd: 1000}
	give := func(dir packet.Direction, x tcp, seq, ack uint32, flags uint8, opts, data []byte) {
		x.seq, x.ack, x.flags, x.opts, x.data = seq, ack, flags, opts, data
		z.check(z.m.Input(dir, l.frame(x), z.now))
	}
	steps := z.byte() % 4
	iss, irs := 1000+uint32(z.byte()%2), 5000+uint32(z.byte()%2)
	if op&1 == 0 {
		give(packet.FromInner, local, iss, 0, packet.SYN, linuxSYN(1460, 1, 0), nil)
		if steps > 0 {
			answer := option(1, x25519)
			if z.byte()%2 == 0 {
				answer = z.consent(l.key(1, local.sport, 2, serverPort))
			}
			give(packet.FromOuter, remote, irs, iss+1, packet.SYN|packet.ACK, withENO(linuxSYN(1460, 1, 1), answer), nil)
		}
		if steps > 1 {
			give(packet.FromOuter, remote, irs+1, iss+1, packet.ACK, timestamps(1, 1), z.initMessage()[:20])
		}
	} else {
		offer := option(x25519)
		if z.byte()%2 == 0 {
			offer = z.proposal(l)
		}
		give(packet.FromOuter, remote, irs, 0, packet.SYN, withENO(linuxSYN(1460, 1, 0), offer), nil)
		if steps > 0 {
			give(packet.FromInner, local, iss, irs+1, packet.SYN|packet.ACK, linuxSYN(1460, 1, 1), nil)
		}
		if steps > 1 {
			give(packet.FromOuter, remote, irs+1, iss+1, packet.ACK, withENO(timestamps(1, 1), option()), nil)
		}
		if steps > 2 {
			give(packet.FromOuter, remote, irs+1, iss+1, packet.ACK, timestamps(1, 1), z.initMessage()[:20])
		}
	}
}

// initMessage is an Init message of either kind.
func (z *fuzzer) initMessage() []byte {
	priv, err := crypto.GenerateKey(crypto.TEPX25519, seeded(3))
	if err != nil {
		z.t.Fatal(err)
	}
	if z.byte()%2 == 0 {
		return (&crypto.Init1{Ciphers: []crypto.AEAD{crypto.AES128GCM}, Pub: priv.Public(false)}).Append(nil)
	}
	return (&crypto.Init2{Cipher: crypto.AES128GCM, Pub: priv.Public(false)}).Append(nil)
}

// check carries out actions.
func (z *fuzzer) check(acts []Action) {
	t := z.t
	for _, a := range slices.Clone(acts) {
		switch a.Kind {
		case SendOuter, SendInner:
			dir := packet.FromInner
			if a.Kind == SendInner {
				dir = packet.FromOuter
			}
			p := parse(t, a.Frame, dir)
			f := z.seen[p.Key]
			if f == nil {
				f = new(fuzzFlow)
				z.seen[p.Key] = f
			}
			if a.Kind == SendOuter {
				f.outSeq, f.outAck = p.Seq, p.Ack
				z.names(p)
				if p.Flags&packet.SYN == 0 && p.Len() > 0 && z.sealed[p.Key] && bytes.Contains(p.Payload(), plaintext) {
					t.Fatal("plaintext of an encrypted flow went out")
				}
			} else {
				f.inSeq, f.inAck = p.Seq, p.Ack
				// A SYN begins another connection.
				if z.sealed[p.Key] && p.Len() > 0 && !isSYN(p) {
					t.Fatal("payload of an encrypted flow went in")
				}
				if hasENO(p.Options()) && p.Flags&packet.SYN != 0 {
					t.Fatal("the inner stack sees ENO")
				}
			}
		case Report:
			switch a.Info.State {
			case StateOffered:
				z.sealed[a.Info.Key] = false
			case StateNegotiating:
				z.sealed[a.Info.Key] = true
			case StatePlain:
				if z.sealed[a.Info.Key] && z.m.tombs.byKey[a.Info.Key] != nil {
					if !z.fresh(a.Info) {
						t.Fatal("an encrypted flow became plain")
					}
				}
				z.sealed[a.Info.Key] = false
			}
		case Install:
			if a.Est == nil || a.Est.Session == nil || !z.sealed[a.Key] && !a.Est.Resumed {
				t.Fatal("installed without negotiation")
			}
			if a.Est.Resumed {
				half := [crypto.ResumeLen]byte(z.named[a.Key].Data)
				if z.used[half] {
					t.Fatal("a secret was used twice")
				}
				z.used[half] = true
			}
			z.sealed[a.Key] = true
		case Agree:
			z.jobs = append(z.jobs, a.Job)
		}
	}
	m := z.m
	held := 0
	for _, f := range m.flows {
		held += len(f.rx.buf)
		if len(f.rx.buf) > f.initLen+rxAhead+openWindow<<1 {
			t.Fatalf("%d bytes of one flow", len(f.rx.buf))
		}
		if f.due > f.expires || f.slot >= len(m.timers) || m.timers[f.slot] != f {
			t.Fatal("timer heap out of order")
		}
	}
	if held != m.rxHeld || len(m.timers) != len(m.flows) || len(m.flows) > m.cfg.MaxHalfOpen || len(m.tombs.byKey) > tombsPerFlow*m.cfg.MaxHalfOpen {
		t.Fatalf("held %d, counted %d; %d timers, %d flows, %d tombs", held, m.rxHeld, len(m.timers), len(m.flows), len(m.tombs.byKey))
	}
	n := 0
	for _, root := range []*tomb{&m.tombs.answered, &m.tombs.unanswered} {
		for e := root.next; e != root; e = e.next {
			n++
		}
	}
	if n != len(m.tombs.byKey) {
		t.Fatalf("%d tombs in the list, %d in the map", n, len(m.tombs.byKey))
	}
}

// names notes the resumption suboption of a SYN or SYN-ACK that leaves: none may
// name a secret that was used.
func (z *fuzzer) names(p *packet.Segment) {
	if p.Flags&packet.SYN == 0 {
		return
	}
	o := readSYNOptions(p.Options())
	e, err := ParseENO(o.option())
	if o.enos == 0 || err != nil {
		return
	}
	for _, s := range e.Subs {
		if !isResumption(s) {
			continue
		}
		if z.used[[crypto.ResumeLen]byte(s.Data)] {
			z.t.Fatal("a used secret was named again")
		}
		s.Data = bytes.Clone(s.Data)
		z.named[p.Key] = s
	}
}

// fresh reports whether a report is of a connection that began just now.
func (z *fuzzer) fresh(i Info) bool { return i.Since == z.m.now }

// FuzzInput: arbitrary segments in arbitrary states never panic, never lead to
// plaintext where encryption was enabled, and bounded memory stays bounded.
func FuzzInput(f *testing.F) {
	f.Add([]byte{1, 255, 0, 0, 2, 0, 0, 0, 0, 0, 255, 1, 0, 1, 0, 0, 0, 0})
	for seed := range uint64(40) {
		b := make([]byte, 600)
		r := seeded(seed)
		if _, err := r.Read(b); err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, script []byte) {
		if len(script) > 4000 {
			return
		}
		how := byte(0)
		if len(script) > 0 {
			how = script[0]
		}
		z := newFuzzer(t, how, crypto.TEPX25519, crypto.TEPX448)
		z.script = script
		for len(z.script) > 0 {
			z.step()
		}
		for len(z.jobs) > 0 {
			z.compute(true)
		}
		for range 200 {
			at, ok := z.m.Deadline()
			if !ok {
				break
			}
			z.now = max(z.now, at)
			z.check(z.m.Tick(z.now))
		}
		if _, ok := z.m.Deadline(); ok || z.m.Len() != 0 || z.m.rxHeld != 0 {
			t.Fatal("something is left for ever")
		}
	})
}

// TestRandomInput runs FuzzInput's property on long random scripts whose flags
// follow the order of a handshake more often than not.
func TestRandomInput(t *testing.T) {
	reached, counters := map[State]int{}, map[string]uint64{}
	for seed := range uint64(400) {
		r := seeded(500 + seed)
		z := newFuzzer(t, byte(seed)&^0x32, crypto.TEPX25519)
		for range 60 {
			z.script = make([]byte, 24)
			if _, err := r.Read(z.script); err != nil {
				t.Fatal(err)
			}
			z.step()
			for _, i := range z.m.Flows() {
				reached[i.State]++
			}
		}
		for name, n := range z.m.Counters() {
			counters[name] += n
		}
		for len(z.jobs) > 0 {
			z.compute(true)
		}
		// The Machine is not stuck.
		z.handshake()
	}
	if reached[StateNegotiating] == 0 || reached[StateOffered] == 0 || counters[countEncrypted] == 0 || counters[countResumed] == 0 || counters[countProposed] == 0 {
		t.Errorf("reached %v, %v", reached, counters)
	}
}

// handshake opens a flow of its own after everything else.
func (z *fuzzer) handshake() {
	for range 2 { // the end of flows, then that of what they left behind
		z.now += 3 * time.Minute
		z.check(z.m.Tick(z.now))
	}
	s := &script{t: z.t, m: z.m, now: z.now}
	s.connect()
	s.peerENO = AppendAnswer(nil, 0, Suboption{TEP: crypto.TEPX25519})
	s.outer(synack(s.peerENO))
	if z.m.cfg.Offload != nil {
		s.compute()
	}
	s.localInit = s.payload()
	msg := s.init2(crypto.TEPX25519, nil)
	s.outer(s.data(0, len(s.localInit), msg))
	if z.m.cfg.Offload != nil {
		s.compute()
	}
	s.wantSession(s.installed(), msg)
}
