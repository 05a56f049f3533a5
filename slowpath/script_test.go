package slowpath

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// Numbers of the scripted connections: local is host 1, the peer host 2.
const (
	localISS = 1000
	peerISS  = 5000
)

// script drives one Machine by hand; the test plays the inner stack and the
// peer.
type script struct {
	t    testing.TB
	m    *Machine
	cfg  Config
	link link
	now  time.Duration
	acts []Action // of the last call

	// Key exchange of the peer.
	priv      *crypto.PrivateKey
	localENO  []byte // option that the Machine sent
	localInit []byte
	peerENO   []byte
}

func newScript(t testing.TB, cfg Config) *script {
	return &script{t: t, m: New(cfg, seeded(7)), cfg: cfg, now: time.Second}
}

// sent returns the segments that the last call sent in one direction.
func (s *script) sent(kind ActionKind) (segs []*packet.Segment) {
	dir := packet.FromInner
	if kind == SendInner {
		dir = packet.FromOuter
	}
	for _, a := range s.acts {
		if a.Kind == kind {
			segs = append(segs, parse(s.t, a.Frame, dir))
		}
	}
	return segs
}

// one returns the only segment sent in one direction.
func (s *script) one(kind ActionKind) *packet.Segment {
	s.t.Helper()
	segs := s.sent(kind)
	if len(segs) != 1 {
		s.t.Fatalf("%d segments of kind %d instead of one: %+v", len(segs), kind, s.acts)
	}
	return segs[0]
}

// none fails the test when the last call sent something.
func (s *script) none() {
	s.t.Helper()
	if n := len(s.sent(SendOuter)) + len(s.sent(SendInner)); n != 0 {
		s.t.Fatalf("%d segments sent, want none", n)
	}
}

// kinds is the order of the last call's actions, without reports.
func (s *script) kinds() (ks []ActionKind) {
	for _, a := range s.acts {
		if a.Kind != Report {
			ks = append(ks, a.Kind)
		}
	}
	return ks
}

func (s *script) wantKinds(want ...ActionKind) {
	s.t.Helper()
	if got := s.kinds(); !slices.Equal(got, want) {
		s.t.Fatalf("actions %v, want %v", got, want)
	}
}

// wantReport checks the last report.
func (s *script) wantReport(state State, reason string) {
	s.t.Helper()
	for _, a := range slices.Backward(s.acts) {
		if a.Kind == Report {
			if a.Info.State != state || a.Info.Reason != reason {
				s.t.Fatalf("report %s %q, want %s %q", a.Info.State, a.Info.Reason, state, reason)
			}
			return
		}
	}
	s.t.Fatalf("no report, want %s %q", state, reason)
}

func (s *script) inner(x tcp) {
	x.src, x.dst, x.sport, x.dport = 1, 2, clientPort, serverPort
	s.input(packet.FromInner, s.link.frame(x))
}

func (s *script) outer(x tcp) {
	x.src, x.dst, x.sport, x.dport = 2, 1, serverPort, clientPort
	s.input(packet.FromOuter, s.link.frame(x))
}

func (s *script) input(dir packet.Direction, f []byte) {
	given := bytes.Clone(f)
	s.acts = slices.Clone(s.m.Input(dir, f, s.now))
	if !bytes.Equal(f, given) {
		s.t.Fatal("Input changed the frame")
	}
}

// tick lets time pass.
func (s *script) tick(d time.Duration) {
	s.now += d
	s.acts = slices.Clone(s.m.Tick(s.now))
}

func withENO(opts, eno []byte) []byte {
	b := slices.Concat(opts, eno)
	for len(b)%4 != 0 {
		b = append(b, packet.OptNOP)
	}
	return b
}

// connect begins an active open and returns the SYN that left.
func (s *script) connect() *packet.Segment {
	s.t.Helper()
	s.inner(tcp{seq: localISS, flags: packet.SYN, wnd: 64240, opts: linuxSYN(1460, 11, 0)})
	syn := s.one(SendOuter)
	o := readSYNOptions(syn.Options())
	s.localENO = bytes.Clone(o.option())
	return syn
}

// synack is a peer's SYN-ACK with the given ENO option.
func synack(eno []byte) tcp {
	return tcp{seq: peerISS, ack: localISS + 1, flags: packet.SYN | packet.ACK, wnd: 65160, opts: withENO(linuxSYN(1400, 21, 11), eno)}
}

// active brings an active opener to the point where it awaits Init2.
func (s *script) active(tep crypto.TEP) {
	s.t.Helper()
	s.connect()
	s.peerENO = AppendAnswer(nil, 0, Suboption{TEP: tep})
	s.outer(synack(s.peerENO))
	s.localInit = s.payload()
	n, err := crypto.InitLen(s.localInit, crypto.Init1Magic)
	if err != nil || n != len(s.localInit) {
		s.t.Fatalf("Init1 of %d bytes, message_len %d, %v", len(s.localInit), n, err)
	}
}

// payload joins the payloads of what was sent outward.
func (s *script) payload() (b []byte) {
	for _, p := range s.sent(SendOuter) {
		b = append(b, p.Payload()...)
	}
	return b
}

// init2 answers Init1; change may spoil the message before it is encoded.
func (s *script) init2(tep crypto.TEP, change func(*crypto.Init2)) []byte {
	s.t.Helper()
	priv, err := crypto.GenerateKey(tep, seeded(99))
	if err != nil {
		s.t.Fatal(err)
	}
	s.priv = priv
	m := crypto.Init2{Cipher: crypto.AES128GCM, Nonce: [32]byte{1, 2, 3}, Pub: priv.Public(false)}
	if change != nil {
		change(&m)
	}
	return m.Append(nil)
}

// data is a segment of the peer's stream from the given offset on.
func (s *script) data(off int, ack int, b []byte) tcp {
	return tcp{seq: peerISS + 1 + uint32(off), ack: localISS + 1 + uint32(ack), flags: packet.ACK | packet.PSH, wnd: 1000, opts: timestamps(30, 11), data: b}
}

func timestamps(val, ecr uint32) []byte {
	b := []byte{1, 1, 8, 10}
	b = binary.BigEndian.AppendUint32(b, val)
	return binary.BigEndian.AppendUint32(b, ecr)
}

// listening begins a passive open with a SYN that offers teps.
func (s *script) listening(teps ...crypto.TEP) {
	s.t.Helper()
	s.peerENO = AppendOffer(nil, 0, teps, Suboption{})
	s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 65160, opts: withENO(linuxSYN(1400, 21, 0), s.peerENO)})
}

// answered lets the inner stack answer, and returns the SYN-ACK that left.
func (s *script) answered() *packet.Segment {
	s.t.Helper()
	s.inner(tcp{seq: localISS, ack: peerISS + 1, flags: packet.SYN | packet.ACK, wnd: 65160, opts: linuxSYN(1460, 11, 21)})
	p := s.one(SendOuter)
	o := readSYNOptions(p.Options())
	s.localENO = bytes.Clone(o.option())
	return p
}

// firstACK is the peer's first segment after its SYN.
func firstACK(eno bool, off int, data []byte) tcp {
	o := timestamps(22, 11)
	if eno {
		o = withENO(o, []byte{packet.OptENO, 2})
	}
	return tcp{seq: peerISS + 1 + uint32(off), ack: localISS + 1, flags: packet.ACK, wnd: 500, opts: o, data: data}
}

// passive brings a passive opener to the point where it awaits Init1.
func (s *script) passive(tep crypto.TEP) {
	s.t.Helper()
	s.listening(tep)
	s.answered()
	s.outer(firstACK(true, 0, nil))
	s.wantReport(StateNegotiating, "")
}

// init1 makes an Init1 message of the peer.
func (s *script) init1(tep crypto.TEP, short bool, change func(*crypto.Init1)) []byte {
	s.t.Helper()
	priv, err := crypto.GenerateKey(tep, seeded(98))
	if err != nil {
		s.t.Fatal(err)
	}
	s.priv = priv
	m := crypto.Init1{Ciphers: crypto.AllAEADs, Nonce: [32]byte{9, 8, 7}, Pub: priv.Public(short)}
	if change != nil {
		change(&m)
	}
	return m.Append(nil)
}

// trailing adds n ignored bytes to an Init message.
func trailing(msg []byte, n int) []byte {
	b := append(bytes.Clone(msg), bytes.Repeat([]byte{0xee}, n)...)
	binary.BigEndian.PutUint32(b[4:], uint32(len(b)))
	return b
}

// installed returns the flow that the last call gave to the fast path.
func (s *script) installed() *Established {
	s.t.Helper()
	for _, a := range s.acts {
		if a.Kind == Install {
			return a.Est
		}
	}
	s.t.Fatalf("not installed: %+v", s.acts)
	return nil
}

// wantSession checks the session against the peer's computation.
func (s *script) wantSession(e *Established, peerMsg []byte) {
	s.t.Helper()
	var want *crypto.Session
	if e.Role == crypto.RoleA {
		init1, err := crypto.ParseInit1(e.TEP, s.localInit)
		if err != nil {
			s.t.Fatal(err)
		}
		es, _, err := s.priv.Shared(init1.Pub)
		if err != nil {
			s.t.Fatal(err)
		}
		want = crypto.NewSession(crypto.RoleB, e.Session.AEAD(), byte(e.TEP), Transcript(s.localENO, s.peerENO), s.localInit, peerMsg, init1.Nonce[:], es)
	} else {
		init2, err := crypto.ParseInit2(e.TEP, e.TxInit)
		if err != nil {
			s.t.Fatal(err)
		}
		es, _, err := s.priv.Shared(init2.Pub)
		if err != nil {
			s.t.Fatal(err)
		}
		nonce := [32]byte{9, 8, 7}
		want = crypto.NewSession(crypto.RoleA, e.Session.AEAD(), byte(e.TEP), Transcript(s.peerENO, s.localENO), peerMsg, e.TxInit, nonce[:], es)
	}
	if want.ID() != e.Session.ID() {
		s.t.Fatal("session ID differs from the peer's")
	}
}

// required is the policy of --require.
func required(*packet.Key, packet.Direction) Policy { return Policy{Verdict: Require} }

// plainIf leaves the flows alone that is selects.
func plainIf(is func(*packet.Key) bool) func(*packet.Key, packet.Direction) Policy {
	return func(k *packet.Key, _ packet.Direction) (p Policy) {
		if is(k) {
			p.Verdict = Plain
		}
		return p
	}
}
