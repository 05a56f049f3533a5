package slowpath

import (
	"bytes"
	"go/parser"
	"go/token"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// A resumption suboption of the answer that names another secret is ignored:
// without another valid TEP the connection is plain and no ENO option follows,
// with one that TEP is agreed on afresh (RFC 8548 section 3.5).
func TestMismatchedHalf(t *testing.T) {
	wrong := append([]byte{0x80 | x25519}, data(9)...)
	for _, x := range []struct {
		name   string
		answer []byte
		plain  bool
	}{
		{"alone", append([]byte{1}, wrong...), true},
		{"after another TEP", append([]byte{1, x448}, wrong...), false},
	} {
		t.Run(x.name, func(t *testing.T) {
			h := newHosts(t)
			h.encrypted(false)
			s := newScript(t, h.a)
			s.connect()
			if e, err := ParseENO(s.localENO); err != nil || !isResumption(e.Subs[len(e.Subs)-1]) {
				t.Fatalf("no resumption proposed: %x, %v", s.localENO, err)
			}
			s.outer(synack(option(x.answer...)))
			if !x.plain {
				s.wantReport(StateNegotiating, "")
				if msg := s.payload(); !bytes.HasPrefix(msg, []byte{0x15, 0x10, 0x1a, 0x0e}) {
					t.Errorf("no Init1: %x", msg)
				}
				return
			}
			s.wantKinds(SendInner, Undivert)
			s.wantReport(StatePlain, ReasonNoCommonTEP)
			s.inner(tcp{seq: localISS + 1, ack: peerISS + 1, flags: packet.ACK, wnd: 500})
			if hasENO(s.one(SendOuter).Options()) {
				t.Error("ENO after it was disabled")
			}
		})
	}
}

// Fewer than nine bytes of data make a suboption with v = 1 an offer of fresh
// key exchange (RFC 8548 section 3.5).
func TestShortSuboption(t *testing.T) {
	for n := range minResumeData {
		h := newHosts(t)
		h.encrypted(false)
		s := newScript(t, h.b)
		s.outer(tcp{seq: peerISS, flags: packet.SYN, wnd: 1000, opts: withENO(nil, option(append([]byte{0x80 | x25519}, data(n)...)...))})
		s.answered()
		if want := option(1, x25519); !bytes.Equal(s.localENO, want) {
			t.Errorf("%d bytes are answered by %x, want %x", n, s.localENO, want)
		}
	}
}

// Secrets are proposed in order, each once, also when nothing came of the one
// before (RFC 8548 section 3.5).
func TestLowestSecretFirst(t *testing.T) {
	h := newHosts(t)
	h.encrypted(false)
	all := func(crypto.TEP, crypto.AEAD) bool { return true }
	l := link{}
	k := l.key(1, clientPort, 2, serverPort)
	for i := uint32(1); i < 12; i += 2 {
		if u := h.a.Cache.propose(&k, all, 0); u == nil || u.i != i {
			t.Fatalf("proposes %+v, want secret %d", u, i)
		}
		newScript(t, h.a).connect() // proposes one, too, and hears nothing
	}
}

// The nonce of every proposal and of every answer is drawn anew, eight bytes
// where nothing else is configured by the host (RFC 8548 section 3.5).
func TestResumeNonces(t *testing.T) {
	h := newHosts(t)
	h.encrypted(false)
	nonces := make(map[string]bool)
	h.wire = func(_ int, _ *simHost, f []byte) []delivery {
		p := parse(t, f, packet.FromInner)
		if p.Flags&packet.SYN == 0 {
			return []delivery{{f, 0}}
		}
		e, err := ParseENO(enoOptions(p)[0])
		if err != nil {
			t.Fatal(err)
		}
		nonces[string(e.Subs[len(e.Subs)-1].Data[crypto.ResumeLen:])] = true
		return []delivery{{f, 0}}
	}
	for range 20 {
		h.encrypted(true)
	}
	if len(nonces) != 40 {
		t.Errorf("40 suboptions have %d nonces", len(nonces))
	}
	// What is drawn is what the source gives, at the time of the SYN: a clone
	// of the machine draws something else.
	var first, second []byte
	for i, b := range []*[]byte{&first, &second} {
		c := NewCache(0, 0)
		k := link{}.key(1, clientPort, 2, serverPort)
		c.add(&k, true, crypto.TEPX25519, crypto.AES128GCM, crypto.RoleA, crypto.NewSession(crypto.RoleA, crypto.AES128GCM, x25519, nil, nil, nil, []byte{1}, []byte{1}).NextSecret(), 0)
		s := newScript(t, Config{Cache: c, ResumeNonce: 8})
		s.m.rand = seeded(uint64(500 + i))
		s.connect()
		*b = s.localENO
	}
	if n := len(first); n != len(second) || !bytes.Equal(first[:n-8], second[:n-8]) || bytes.Equal(first[n-8:], second[n-8:]) {
		t.Errorf("clones propose %x and %x", first, second)
	}
}

// Either policy works alone, and cached state of a connection can be flushed
// while it lives (RFC 8548 section 3.5).
func TestFlushWhileOpen(t *testing.T) {
	h := newHosts(t)
	h.encrypted(false)
	s := h.encrypted(true)
	peer := s.a.est.Key.RemoteAddr().Addr()
	if n := h.a.Cache.Flush(peer); n != 1 {
		t.Errorf("flushed %d exchanges", n)
	}
	if left := h.a.Cache.List(0); len(left) != 0 {
		t.Errorf("left: %+v", left)
	}
	if n := h.a.Cache.Flush(netip.Addr{}); n != 0 {
		t.Errorf("%d exchanges of other peers", n)
	}
	h.encrypted(false)
}

// A secret is erased when keys are made of it (RFC 8548 section 3.5).
func TestUsedSecretErased(t *testing.T) {
	h := newHosts(t)
	h.encrypted(false)
	all := func(crypto.TEP, crypto.AEAD) bool { return true }
	k := link{}.key(1, clientPort, 2, serverPort)
	u := h.a.Cache.propose(&k, all, 0)
	if s := u.session(0x80|x25519, make([]byte, 8), make([]byte, 8)); s.SendKey(0) == nil {
		t.Fatal("no keys")
	}
	defer func() {
		if recover() == nil {
			t.Error("the secret is still there")
		}
	}()
	u.secret.Next()
}

// What holds session secrets and private keys cannot write files: it does not
// import what that needs (RFC 8548 sections 3.3, 3.5 and 8).
func TestSecretsStayInMemory(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"agree", "init", "session"} {
		files = append(files, "../crypto/"+name+".go")
	}
	seen := 0
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range f.Imports {
			path := strings.Trim(i.Path.Value, `"`)
			for _, bad := range []string{"os", "syscall", "net", "log", "golang.org/x/sys", "embed"} {
				if path == bad || strings.HasPrefix(path, bad+"/") && path != "net/netip" {
					t.Errorf("%s imports %s", name, path)
				}
			}
		}
		seen++
	}
	if seen < 10 {
		t.Errorf("only %d files", seen)
	}
}

// A secret that the peer named counts as used to negotiate, also when nothing
// came of it: it is not proposed (RFC 8548 section 3.5).
func TestNamedSecretNotProposed(t *testing.T) {
	h := newHosts(t)
	h.encrypted(false)
	all := func(crypto.TEP, crypto.AEAD) bool { return true }
	l := link{}
	ka, kb := l.key(1, clientPort, 2, serverPort), l.key(2, serverPort, 1, clientPort)
	half := h.a.Cache.propose(&ka, all, 0).ours()
	u := h.b.Cache.reserve(half[:], crypto.TEPX25519, all, 0)
	if u == nil || u.i != 1 {
		t.Fatalf("reserved %+v", u)
	}
	h.b.Cache.restore(u)
	if p := h.b.Cache.propose(&kb, all, 0); p == nil || p.i != 2 {
		t.Errorf("proposes %+v, want secret 2", p)
	}
}
