package crypto

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
)

// testRandom is a reproducible source of randomness.
func testRandom(seed byte) io.Reader { return rand.NewChaCha8([32]byte{seed}) }

func TestNames(t *testing.T) {
	for _, tep := range AllTEPs {
		got, err := ParseTEP(tep.String())
		if got != tep || err != nil || !tep.Valid() || tep.PubLen() == 0 {
			t.Errorf("%v: parsed as %v, %v", tep, got, err)
		}
	}
	for _, a := range AllAEADs {
		got, err := ParseAEAD(a.String())
		if got != a || err != nil || !a.Valid() || a.NonceLen() != 12 {
			t.Errorf("%v: parsed as %v, %v", a, got, err)
		}
	}
	for s, want := range map[string]AEAD{"aes128": AES128GCM, "AES256": AES256GCM, "chacha": ChaCha20Poly1305} {
		if got, err := ParseAEAD(s); got != want || err != nil {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	if _, err := ParseTEP("p384"); !errors.Is(err, ErrUnknownTEP) {
		t.Errorf("p384: %v", err)
	}
	if _, err := ParseAEAD(""); !errors.Is(err, ErrUnknownAEAD) {
		t.Errorf("empty: %v", err)
	}
	if TEP(0x20).Valid() || TEP(0x25).Valid() || TEP(0xa3).Valid() || AEAD(3).Valid() || AEAD(3).NonceLen() != 0 {
		t.Error("unknown identifier is valid")
	}
	if RoleA.String() != "A" || RoleB.String() != "B" || RoleA.Peer() != RoleB || RoleB.Peer() != RoleA {
		t.Error("roles")
	}
}

func TestGenerateKey(t *testing.T) {
	for _, tep := range AllTEPs {
		t.Run(tep.String(), func(t *testing.T) {
			a, err := GenerateKey(tep, testRandom(1))
			if err != nil {
				t.Fatal(err)
			}
			again, err := GenerateKey(tep, testRandom(1))
			if err != nil {
				t.Fatal(err)
			}
			equal(t, "same randomness", again.Public(false), a.Public(false))
			b, err := GenerateKey(tep, nil)
			if err != nil {
				t.Fatal(err)
			}
			if a.TEP() != tep || len(a.Public(false)) != tep.PubLen() || len(a.Public(true)) != tep.PubLen() {
				t.Errorf("TEP %v, public key of %d bytes", a.TEP(), len(a.Public(false)))
			}
			esA, _, errA := a.Shared(b.Public(false))
			esB, _, errB := b.Shared(a.Public(false))
			if errA != nil || errB != nil {
				t.Fatal(errA, errB)
			}
			equal(t, "shared secret", esA, esB)

			a.Erase()
			a.Erase()
			if _, _, err := a.Shared(b.Public(false)); !errors.Is(err, ErrPrivateKey) {
				t.Errorf("after Erase: %v", err)
			}
			if _, err := GenerateKey(tep, bytes.NewReader(make([]byte, 5))); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("short random source: %v", err)
			}
			if _, err := NewPrivateKey(tep, make([]byte, 31)); !errors.Is(err, ErrPrivateKey) {
				t.Errorf("31 bytes: %v", err)
			}
		})
	}
	if _, err := GenerateKey(0x25, nil); !errors.Is(err, ErrUnknownTEP) {
		t.Errorf("TEP 0x25: %v", err)
	}
	if _, err := NewPrivateKey(0x25, make([]byte, 32)); !errors.Is(err, ErrUnknownTEP) {
		t.Errorf("TEP 0x25: %v", err)
	}
}

type fillReader byte

func (f fillReader) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(f)
	}
	return len(b), nil
}

// A random source that only gives scalars outside [1, n-1] must end in an
// error.
func TestGenerateKeyOutOfRange(t *testing.T) {
	for _, tep := range []TEP{TEPP256, TEPP521} {
		for _, fill := range []fillReader{0, 0xff} {
			if _, err := GenerateKey(tep, fill); !errors.Is(err, ErrPrivateKey) {
				t.Errorf("%v filled with %#x: %v", tep, byte(fill), err)
			}
		}
	}
}

func TestSharedRejects(t *testing.T) {
	wire := func(tep TEP) []byte {
		key, err := GenerateKey(tep, testRandom(2))
		if err != nil {
			t.Fatal(err)
		}
		return key.Public(false)
	}
	edit := func(tep TEP, f func(b []byte) []byte) []byte { return f(wire(tep)) }
	for _, tc := range []struct {
		name string
		tep  TEP
		wire []byte
		want error
	}{
		{"empty", TEPX25519, nil, ErrBadKey},
		{"empty", TEPP256, nil, ErrBadKey},
		{"short", TEPX25519, make([]byte, 31), ErrBadKey},
		{"long", TEPX448, make([]byte, 57), ErrBadKey},
		{"zero", TEPX25519, make([]byte, 32), ErrZeroShared},
		{"zero", TEPX448, make([]byte, 56), ErrZeroShared},
		{"one", TEPX25519, append([]byte{1}, make([]byte, 31)...), ErrZeroShared},
		{"one", TEPX448, append([]byte{1}, make([]byte, 55)...), ErrZeroShared},
		{"pubkey_len 34", TEPP256, edit(TEPP256, func(b []byte) []byte { b[1] = 34; return b }), ErrBadKey},
		{"pubkey_len 0", TEPP521, edit(TEPP521, func(b []byte) []byte { b[1] = 0; return b }), ErrBadKey},
		{"hybrid", TEPP256, edit(TEPP256, func(b []byte) []byte { b[2] = 6; return b }), ErrBadKey},
		{"uncompressed", TEPP521, edit(TEPP521, func(b []byte) []byte { b[2] = 4; return b }), ErrBadKey},
		{"infinity", TEPP256, edit(TEPP256, func(b []byte) []byte { b[2] = 0; return b }), ErrBadKey},
		{"x above p", TEPP256, edit(TEPP256, func(b []byte) []byte { copy(b[3:], bytes.Repeat([]byte{0xff}, 32)); return b }), ErrBadKey},
		{"x above p", TEPP521, edit(TEPP521, func(b []byte) []byte { b[3] = 0xff; return b }), ErrBadKey},
		{"not on the curve", TEPP256, append([]byte{0, 35, 2}, bytes.Repeat([]byte{0x07}, 32)...), ErrBadKey},
	} {
		t.Run(tc.tep.String()+"/"+tc.name, func(t *testing.T) {
			key, err := GenerateKey(tc.tep, testRandom(3))
			if err != nil {
				t.Fatal(err)
			}
			es, _, err := key.Shared(tc.wire)
			if !errors.Is(err, tc.want) || es != nil {
				t.Errorf("secret %x, error %v, want %v", es, err, tc.want)
			}
		})
	}
}

func TestInitLen(t *testing.T) {
	header := func(magic, n uint32) []byte {
		return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, magic), n)
	}
	for _, tc := range []struct {
		name  string
		b     []byte
		magic uint32
		n     int
		err   error
	}{
		{"nothing", nil, Init1Magic, 0, nil},
		{"one byte", []byte{0x15}, Init1Magic, 0, nil},
		{"one wrong byte", []byte{0x16}, Init1Magic, 0, ErrBadMagic},
		{"HTTP", []byte("GET"), Init1Magic, 0, ErrBadMagic},
		{"the other magic", header(Init2Magic, 100), Init1Magic, 0, ErrBadMagic},
		{"no length", header(Init1Magic, 100)[:7], Init1Magic, 0, nil},
		{"length", header(Init1Magic, 100), Init1Magic, 100, nil},
		{"length and more", append(header(Init2Magic, 100), 1, 2, 3), Init2Magic, 100, nil},
		{"least 1", header(Init1Magic, minInit1), Init1Magic, minInit1, nil},
		{"too short 1", header(Init1Magic, minInit1-1), Init1Magic, 0, ErrInitLen},
		{"least 2", header(Init2Magic, minInit2), Init2Magic, minInit2, nil},
		{"too short 2", header(Init2Magic, minInit2-1), Init2Magic, 0, ErrInitLen},
		{"largest", header(Init1Magic, MaxInitLen), Init1Magic, MaxInitLen, nil},
		{"too long", header(Init1Magic, MaxInitLen+1), Init1Magic, 0, ErrInitLen},
		{"far too long", header(Init1Magic, 1<<32-1), Init1Magic, 0, ErrInitLen},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n, err := InitLen(tc.b, tc.magic)
			if n != tc.n || !errors.Is(err, tc.err) {
				t.Errorf("%d, %v; want %d, %v", n, err, tc.n, tc.err)
			}
		})
	}
}

// setLen writes the true length of a message into its message_len.
func setLen(msg []byte) []byte {
	binary.BigEndian.PutUint32(msg[4:], uint32(len(msg)))
	return msg
}

func TestParseInit(t *testing.T) {
	for _, tep := range AllTEPs {
		t.Run(tep.String(), func(t *testing.T) {
			key, err := GenerateKey(tep, testRandom(4))
			if err != nil {
				t.Fatal(err)
			}
			m1 := Init1{Ciphers: []AEAD{0x77, AES128GCM}, Nonce: [32]byte{1, 2, 3}, Pub: key.Public(false)}
			m2 := Init2{Cipher: AES128GCM, Nonce: [32]byte{4, 5, 6}, Pub: key.Public(true)}
			prefix := []byte("prefix")
			raw1 := bytes.TrimPrefix(m1.Append(prefix), prefix)
			raw2 := bytes.TrimPrefix(m2.Append(prefix), prefix)

			same1 := func(m *Init1) bool {
				return slices.Equal(m.Ciphers, m1.Ciphers) && m.Nonce == m1.Nonce && bytes.Equal(m.Pub, m1.Pub)
			}
			same2 := func(m *Init2) bool {
				return m.Cipher == m2.Cipher && m.Nonce == m2.Nonce && bytes.Equal(m.Pub, m2.Pub)
			}
			for _, ignored := range [][]byte{nil, {0}, make([]byte, 5000)} {
				got1, err := ParseInit1(tep, setLen(append(bytes.Clone(raw1), ignored...)))
				if err != nil || !same1(got1) {
					t.Errorf("Init1 with %d ignored bytes: %v, %v", len(ignored), got1, err)
				}
				got2, err := ParseInit2(tep, setLen(append(bytes.Clone(raw2), ignored...)))
				if err != nil || !same2(got2) {
					t.Errorf("Init2 with %d ignored bytes: %v, %v", len(ignored), got2, err)
				}
			}

			for cut := range len(raw1) {
				if _, err := ParseInit1(tep, raw1[:cut]); !errors.Is(err, ErrInitLen) {
					t.Errorf("Init1 cut to %d: %v", cut, err)
				}
				if cut >= 8 {
					if _, err := ParseInit1(tep, setLen(bytes.Clone(raw1[:cut]))); !errors.Is(err, ErrInitLen) {
						t.Errorf("Init1 of %d: %v", cut, err)
					}
				}
			}
			for cut := range len(raw2) {
				if _, err := ParseInit2(tep, raw2[:cut]); !errors.Is(err, ErrInitLen) {
					t.Errorf("Init2 cut to %d: %v", cut, err)
				}
				if cut >= 8 {
					if _, err := ParseInit2(tep, setLen(bytes.Clone(raw2[:cut]))); !errors.Is(err, ErrInitLen) {
						t.Errorf("Init2 of %d: %v", cut, err)
					}
				}
			}
			if _, err := ParseInit1(tep, raw2); !errors.Is(err, ErrBadMagic) {
				t.Errorf("Init2 for Init1: %v", err)
			}
			if _, err := ParseInit2(tep, append(bytes.Clone(raw2), 0)); !errors.Is(err, ErrInitLen) {
				t.Errorf("more than message_len: %v", err)
			}
			many := bytes.Clone(raw1)
			many[8] = 255
			if _, err := ParseInit1(tep, many); !errors.Is(err, ErrInitLen) {
				t.Errorf("255 ciphers promised: %v", err)
			}
			if _, _, _, nist := nistCurve(tep); nist {
				bad := bytes.Clone(raw2)
				bad[len(bad)-tep.PubLen()+1]++
				if _, err := ParseInit2(tep, bad); !errors.Is(err, ErrBadKey) {
					t.Errorf("wrong pubkey_len: %v", err)
				}
			}
		})
	}
	if _, err := ParseInit1(0x20, nil); !errors.Is(err, ErrUnknownTEP) {
		t.Errorf("TEP 0x20: %v", err)
	}
}

func TestChooseCipher(t *testing.T) {
	for _, tc := range []struct {
		prefs, offered []AEAD
		want           AEAD
		ok             bool
	}{
		{AllAEADs, []AEAD{ChaCha20Poly1305, AES128GCM}, AES128GCM, true},
		{[]AEAD{ChaCha20Poly1305, AES128GCM}, AllAEADs, ChaCha20Poly1305, true},
		{[]AEAD{AES256GCM}, []AEAD{0x77, AES256GCM}, AES256GCM, true},
		{[]AEAD{AES256GCM}, []AEAD{AES128GCM}, 0, false},
		{AllAEADs, nil, 0, false},
		{nil, AllAEADs, 0, false},
	} {
		if got, ok := ChooseCipher(tc.prefs, tc.offered); got != tc.want || ok != tc.ok {
			t.Errorf("%v of %v: %v, %v", tc.prefs, tc.offered, got, ok)
		}
	}
	if err := CheckCipher(AES256GCM, []AEAD{AES128GCM}); !errors.Is(err, ErrCipherNotOffered) {
		t.Errorf("cipher not offered: %v", err)
	}
	if err := CheckCipher(AES128GCM, AllAEADs); err != nil {
		t.Error(err)
	}
}

// testSessions makes the two ends of a session.
func testSessions(aead AEAD) (a, b *Session) {
	ends := [2]*Session{}
	for i := range ends {
		ends[i] = NewSession(Role(i), aead, byte(TEPX25519), []byte("transcript"), []byte("init1"),
			[]byte("init2"), make([]byte, InitNonceLen), make([]byte, 32))
	}
	return ends[0], ends[1]
}

func mustPanic(t *testing.T, what string, f func()) {
	t.Helper()
	defer func() {
		if recover() == nil {
			t.Errorf("%s does not panic", what)
		}
	}()
	f()
}

func TestGenerations(t *testing.T) {
	a, b := testSessions(AES128GCM)
	frame := make([]byte, Overhead)
	pass := func(gen uint32) {
		t.Helper()
		a.SendKey(gen).Seal(frame, []byte{0}, 0, 7)
		if _, ok := b.RecvKey(gen).Open(frame, 7); !ok {
			t.Errorf("generation %d does not open", gen)
		}
	}
	pass(0)
	k0 := a.SendKey(0)
	if a.SendKey(0) != k0 {
		t.Error("SendKey(0) made another key")
	}
	if a.SendKey(2) != nil || a.SendKey(1<<32-1) != nil {
		t.Error("SendKey skips a generation")
	}
	pass(1)
	if a.SendKey(0) != k0 {
		t.Error("generation 0 is gone while 1 is the newest")
	}
	pass(0)

	a.AdvanceSend(1)
	if a.SendKey(0) != nil {
		t.Error("generation 0 after AdvanceSend(1)")
	}
	mustPanic(t, "Seal with a key of an erased generation", func() { k0.Seal(frame, []byte{0}, 0, 0) })
	if *k0 != (Key{}) {
		t.Error("AdvanceSend left key bytes")
	}
	pass(1)

	r1 := b.RecvKey(1)
	pass(2)
	pass(3)
	if b.RecvKey(1) != nil || b.RecvKey(2) == nil {
		t.Error("not exactly two generations are kept")
	}
	if !r1.live() {
		t.Error("a generation that was only forgotten is erased")
	}
	b.AdvanceRecv(2)
	b.AdvanceRecv(9)
	if b.RecvKey(2) == nil {
		t.Error("AdvanceRecv erased its own generation")
	}
	pass(3)
	for gen := uint32(4); gen < 40; gen++ {
		pass(gen)
		a.AdvanceSend(gen)
		b.AdvanceRecv(gen)
	}
	if a.SendKey(38) != nil || b.RecvKey(38) != nil {
		t.Error("generation 38 after Advance")
	}

	// The directions are independent.
	b.SendKey(0).Seal(frame, []byte{0}, 0, 7)
	if _, ok := a.RecvKey(0).Open(frame, 7); !ok {
		t.Error("generation 0 of the other direction does not open")
	}
}

func TestSessionErase(t *testing.T) {
	a, b := testSessions(AES256GCM)
	id := a.ID()
	if a.AEAD() != AES256GCM || a.Role() != RoleA || b.Role() != RoleB || id != b.ID() {
		t.Error("accessors")
	}
	ka, kb := a.SendKey(0), b.RecvKey(0)
	given := a.NextSecret()
	if given != a.NextSecret() {
		t.Error("NextSecret made a second copy")
	}
	kept := b.next
	a.Erase()
	a.Erase()
	b.Erase()
	for _, s := range []*Session{a, b} {
		if s.SendKey(0) != nil || s.SendKey(1) != nil || s.RecvKey(0) != nil || s.NextSecret() != nil {
			t.Error("keys after Erase")
		}
		if s.send.mk != [keyLen]byte{} || s.recv.mk != [keyLen]byte{} {
			t.Error("Erase left a master key")
		}
	}
	if *ka != (Key{}) || *kb != (Key{}) {
		t.Error("Erase left key bytes")
	}
	if _, ok := kb.Open(make([]byte, Overhead), 0); ok {
		t.Error("an erased key opens")
	}
	if kept.ss != [keyLen]byte{} || !kept.erased {
		t.Error("Erase left the next secret")
	}
	if a.ID() != id {
		t.Error("Erase changed the session ID")
	}

	next := given.Next()
	given.Erase()
	given.Erase()
	if given.ss != [keyLen]byte{} {
		t.Error("Secret.Erase left bytes")
	}
	mustPanic(t, "Next of an erased secret", func() { given.Next() })
	mustPanic(t, "ResumeHalf of an erased secret", func() { given.ResumeHalf(RoleA) })
	mustPanic(t, "a session from an erased secret", func() { NewResumedSession(RoleA, AES128GCM, 0xa3, given, nil) })
	next.ResumeHalf(RoleA)
	mustPanic(t, "a session with an unknown AEAD", func() { NewResumedSession(RoleA, 3, 0xa3, next, nil) })

	c, _ := testSessions(AES128GCM)
	c.SendKey(0)
	c.EraseSend()
	if c.SendKey(0) != nil || c.RecvKey(0) == nil {
		t.Error("EraseSend")
	}
	c.EraseRecv()
	if c.RecvKey(0) != nil || c.NextSecret() == nil {
		t.Error("EraseRecv")
	}
}

func TestFrameTampering(t *testing.T) {
	for _, aead := range AllAEADs {
		t.Run(aead.String(), func(t *testing.T) {
			a, b := testSessions(aead)
			frame := make([]byte, Overhead+4)
			a.SendKey(0).Seal(frame, []byte("\x00data"), 0, 1<<40)
			open := func(f []byte, offset uint64) bool {
				plain, ok := b.RecvKey(0).Open(f, offset)
				if !ok && plain != nil {
					t.Error("plaintext of a frame that is not authentic")
				}
				return ok
			}
			if !open(bytes.Clone(frame), 1<<40) {
				t.Fatal("does not open")
			}
			for bit := range 8 * len(frame) {
				bad := bytes.Clone(frame)
				bad[bit/8] ^= 1 << (bit % 8)
				if open(bad, 1<<40) {
					t.Errorf("opens with bit %d changed", bit)
				}
			}
			for shift := range 64 {
				if open(bytes.Clone(frame), 1<<40^1<<shift) {
					t.Errorf("opens with bit %d of the offset changed", shift)
				}
			}
			if _, ok := a.RecvKey(0).Open(bytes.Clone(frame), 1<<40); ok {
				t.Error("opens with the key of the other direction")
			}
			if _, ok := b.RecvKey(1).Open(bytes.Clone(frame), 1<<40); ok {
				t.Error("opens with the key of the next generation")
			}
			for cut := range len(frame) {
				if open(bytes.Clone(frame[:cut]), 1<<40) {
					t.Errorf("opens when cut to %d", cut)
				}
			}
			if open(append(bytes.Clone(frame), 0), 1<<40) {
				t.Error("opens with a byte too many")
			}
		})
	}
}

// A frame that holds nothing but an authentic tag has no flags byte.
func TestFrameWithoutFlags(t *testing.T) {
	a, b := testSessions(AES128GCM)
	var raw [16 + nonceLen]byte
	cprf(raw[:], &a.send.mk, a.send.label, nil)
	frame := []byte{0, 0, TagLen}
	frame = newAEAD(AES128GCM, raw[:16]).Seal(frame, raw[16:], nil, []byte{0, 0, TagLen})
	if _, ok := b.RecvKey(0).Open(frame, 0); ok {
		t.Error("opens")
	}
	if n, err := FrameLen(frame); n != 0 || !errors.Is(err, ErrFrameLen) {
		t.Errorf("FrameLen %d, %v", n, err)
	}
}

func TestFrameLen(t *testing.T) {
	for _, tc := range []struct {
		b   []byte
		n   int
		err error
	}{
		{nil, 0, nil},
		{[]byte{1, 0xff}, 0, nil},
		{[]byte{0, 0, 0}, 0, ErrFrameLen},
		{[]byte{0, 0, 16}, 0, ErrFrameLen},
		{[]byte{0, 0, 17}, 20, nil},
		{[]byte{0xff, 0xff, 0xff, 9}, MaxFrame, nil},
	} {
		if n, err := FrameLen(tc.b); n != tc.n || !errors.Is(err, tc.err) {
			t.Errorf("%x: %d, %v", tc.b, n, err)
		}
	}
}

func TestParsePlain(t *testing.T) {
	for _, tc := range []struct {
		plain  []byte
		flags  byte
		urgent uint16
		data   string
		err    error
	}{
		{nil, 0, 0, "", ErrFrameLen},
		{[]byte{0}, 0, 0, "", nil},
		{[]byte{FlagFIN, 'x'}, FlagFIN, 0, "x", nil},
		{[]byte{0xfc, 'x'}, 0xfc, 0, "x", nil},
		{[]byte{FlagURG}, FlagURG, 0, "", ErrNoUrgent},
		{[]byte{FlagURG, 1}, FlagURG, 0, "", ErrNoUrgent},
		{[]byte{FlagURG, 1, 2}, FlagURG, 0x102, "", nil},
		{[]byte{FlagURG | FlagFIN, 1, 2, 'x'}, FlagURG | FlagFIN, 0x102, "x", nil},
	} {
		flags, urgent, data, err := ParsePlain(tc.plain)
		if flags != tc.flags || urgent != tc.urgent || string(data) != tc.data || !errors.Is(err, tc.err) {
			t.Errorf("%x: %#x %d %q %v", tc.plain, flags, urgent, data, err)
		}
	}
}

func TestSealLimits(t *testing.T) {
	for _, aead := range AllAEADs {
		a, b := testSessions(aead)
		k := a.SendKey(0)
		src := bytes.Repeat([]byte{5}, MaxPlain+1)
		dst := make([]byte, MaxFrame+1)
		if n := k.Seal(dst, src[:MaxPlain], 0, 0); n != MaxFrame {
			t.Errorf("largest frame has %d bytes", n)
		}
		if plain, ok := b.RecvKey(0).Open(dst[:MaxFrame], 0); !ok || !bytes.Equal(plain, src[:MaxPlain]) {
			t.Error("largest frame does not open")
		}
		mustPanic(t, "Seal of too much", func() { k.Seal(dst, src, 0, 0) })
		mustPanic(t, "Seal of nothing", func() { k.Seal(dst, nil, 0, 0) })
		mustPanic(t, "Seal into too little", func() { k.Seal(dst[:20:20], src[:2], 0, 0) })
		mustPanic(t, "Seal with overlap", func() { k.Seal(dst, dst[FrameHeader+1:][:40], 0, 0) })
	}
}

// SealVec cuts one buffer into adjacent frames without copying: the flags byte
// of a piece takes the place of the last data byte of the piece before.
func TestSealVecAdjacent(t *testing.T) {
	for _, aead := range AllAEADs {
		t.Run(aead.String(), func(t *testing.T) {
			a, b := testSessions(aead)
			text := []byte("the quick brown fox jumps over the lazy dog")
			buf := append([]byte{0xaa}, text...)
			const piece = 10
			var seals []SealOp
			offset := uint64(0)
			for at := 0; at < len(text); at += piece {
				src := buf[at:min(at+1+piece, len(buf))]
				dst := make([]byte, FrameHeader+len(src)+TagLen)
				op := SealOp{Key: a.SendKey(0), Dst: dst, Src: src, Offset: offset}
				if at+piece >= len(text) {
					op.Flags = FlagFIN
				}
				seals = append(seals, op)
				offset += uint64(len(dst))
			}
			SealVec(seals)

			var opens []OpenOp
			for _, op := range seals {
				opens = append(opens, OpenOp{Key: b.RecvKey(0), Frame: op.Dst, Offset: op.Offset})
			}
			opens = append(opens, OpenOp{Key: b.RecvKey(0), Frame: make([]byte, 25), Plain: text, OK: true})
			OpenVec(opens)
			var got []byte
			for i, op := range opens[:len(seals)] {
				if !op.OK {
					t.Fatalf("frame %d does not open", i)
				}
				if fin := op.Plain[0]&FlagFIN != 0; fin != (i == len(seals)-1) {
					t.Errorf("frame %d: flags %#x", i, op.Plain[0])
				}
				got = append(got, op.Plain[1:]...)
			}
			equal(t, "data", got, text)
			if last := opens[len(seals)]; last.OK || last.Plain != nil {
				t.Error("OpenVec left the result of a frame that is not authentic")
			}
		})
	}
}

func TestNoAllocation(t *testing.T) {
	for _, aead := range AllAEADs {
		t.Run(aead.String(), func(t *testing.T) {
			a, b := testSessions(aead)
			sk, rk := a.SendKey(0), b.RecvKey(0)
			src := make([]byte, 1441)
			sealed := make([]byte, FrameHeader+len(src)+TagLen)
			sk.Seal(sealed, src, 0, 9)
			frame := make([]byte, len(sealed))
			seals := []SealOp{{Key: sk, Dst: frame, Src: src, Offset: 9}, {Key: sk, Dst: frame, Src: src, Offset: 9}}
			opens := []OpenOp{{Key: rk, Frame: frame, Offset: 9}}
			for _, tc := range []struct {
				name string
				f    func()
			}{
				{"Seal", func() { sk.Seal(frame, src, 0, 9) }},
				{"Seal in place", func() { sk.Seal(frame, frame[FrameHeader:][:len(src)], 0, 9) }},
				{"Open", func() { copy(frame, sealed); rk.Open(frame, 9) }},
				{"Open of a bad frame", func() { copy(frame, sealed); rk.Open(frame, 8) }},
				{"SealVec", func() { SealVec(seals) }},
				{"OpenVec", func() { copy(frame, sealed); OpenVec(opens) }},
			} {
				if n := testing.AllocsPerRun(100, tc.f); n != 0 {
					t.Errorf("%s: %v allocations", tc.name, n)
				}
			}
		})
	}
}

func TestAppendTooManyCiphers(t *testing.T) {
	m := Init1{Ciphers: make([]AEAD, 256)}
	mustPanic(t, "Init1 with 256 ciphers", func() { m.Append(nil) })
}

func TestRekeyFrames(t *testing.T) {
	if AES128GCM.RekeyFrames() != 1<<24 || AES256GCM.RekeyFrames() != 1<<24 || ChaCha20Poly1305.RekeyFrames() < 1<<24 {
		t.Error("defaults")
	}
}
