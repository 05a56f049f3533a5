package crypto

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"testing"
)

// hexBytes is a byte string that stands in JSON as hexadecimal digits.
type hexBytes []byte

func (h *hexBytes) UnmarshalText(text []byte) (err error) {
	*h, err = hex.DecodeString(string(text))
	return err
}

type frameVector struct {
	Name       string   `json:"name"`
	Generation uint32   `json:"generation"`
	Offset     uint64   `json:"offset"`
	Nonce      hexBytes `json:"nonce"`
	AAD        hexBytes `json:"aad"`
	Flags      byte     `json:"flags"`
	Urgent     *uint16  `json:"urgent"`
	Data       hexBytes `json:"data"`
	Wire       hexBytes `json:"wire"`
}

// plain is the plaintext value of the frame.
func (f *frameVector) plain() []byte {
	b := []byte{f.Flags}
	if f.Urgent != nil {
		b = binary.BigEndian.AppendUint16(b, *f.Urgent)
	}
	return append(b, f.Data...)
}

// keyVectors is what fresh and resumed sessions have in common.
type keyVectors struct {
	SessionID hexBytes      `json:"session_id"`
	MK        []hexBytes    `json:"mk"`
	KAB       []hexBytes    `json:"k_ab"`
	KBA       []hexBytes    `json:"k_ba"`
	FramesAB  []frameVector `json:"frames_ab"`
	FramesBA  []frameVector `json:"frames_ba"`
}

type resumedVector struct {
	keyVectors
	I         int      `json:"i"`
	Opener    string   `json:"active_opener_original_role"`
	NonceA    hexBytes `json:"nonce_a"`
	NonceB    hexBytes `json:"nonce_b"`
	SN        hexBytes `json:"sn"`
	ENOSyn    hexBytes `json:"eno_syn"`
	ENOSynAck hexBytes `json:"eno_synack"`
}

type vector struct {
	keyVectors
	TEP        TEP             `json:"tep"`
	AEAD       AEAD            `json:"aead"`
	LenMode    string          `json:"pubkey_len_mode"`
	PrivateA   hexBytes        `json:"private_a"`
	PrivateB   hexBytes        `json:"private_b"`
	PubA       hexBytes        `json:"pub_a"`
	PubB       hexBytes        `json:"pub_b"`
	NA         hexBytes        `json:"n_a"`
	NB         hexBytes        `json:"n_b"`
	ENOA       hexBytes        `json:"eno_a"`
	ENOB       hexBytes        `json:"eno_b"`
	Transcript hexBytes        `json:"transcript"`
	Init1      hexBytes        `json:"init1"`
	Init2      hexBytes        `json:"init2"`
	ES         hexBytes        `json:"es"`
	PRK        hexBytes        `json:"prk"`
	SS         []hexBytes      `json:"ss"`
	Resume1A   hexBytes        `json:"resume_1_a"`
	Resume1B   hexBytes        `json:"resume_1_b"`
	Resumed    []resumedVector `json:"resumed"`
}

func loadVectors(t testing.TB) []vector {
	t.Helper()
	raw, err := os.ReadFile("testdata/tcpcrypt.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Format  string   `json:"format"`
		Vectors []vector `json:"vectors"`
	}
	if err := json.Unmarshal(raw, &file); err != nil {
		t.Fatal(err)
	}
	if file.Format != "tcpcrypt-vectors-1" || len(file.Vectors) != 18 {
		t.Fatalf("format %q with %d entries", file.Format, len(file.Vectors))
	}
	return file.Vectors
}

func equal(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Errorf("%s\n got %x\nwant %x", what, got, want)
	}
}

func TestVectors(t *testing.T) {
	for _, v := range loadVectors(t) {
		t.Run(fmt.Sprintf("%v/%v/%s", v.TEP, v.AEAD, v.LenMode), func(t *testing.T) {
			short := v.LenMode == "pubkey"
			esA := v.testAgreement(t, v.PrivateA, v.PubA, v.PubB, short)
			esB := v.testAgreement(t, v.PrivateB, v.PubB, v.PubA, short)
			equal(t, "es of A", esA, v.ES)
			equal(t, "es of B", esB, v.ES)
			v.testInit(t)

			equal(t, "transcript", append(bytes.Clone(v.ENOA), v.ENOB...), v.Transcript)
			a := NewSession(RoleA, v.AEAD, byte(v.TEP), v.Transcript, v.Init1, v.Init2, v.NA, esA)
			b := NewSession(RoleB, v.AEAD, byte(v.TEP), v.Transcript, v.Init1, v.Init2, v.NA, esB)
			v.testSession(t, a, b)
			v.testSecrets(t, a, b)
			if len(v.Resumed) != 4 {
				t.Errorf("%d resumed sessions", len(v.Resumed))
			}
			for i := range v.Resumed {
				r := &v.Resumed[i]
				t.Run(fmt.Sprintf("resumed%d", i), func(t *testing.T) { r.test(t, &v) })
			}
		})
	}
}

func (v *vector) testAgreement(t *testing.T, private, public, peer []byte, short bool) []byte {
	t.Helper()
	key, err := NewPrivateKey(v.TEP, private)
	if err != nil {
		t.Fatal(err)
	}
	defer key.Erase()
	equal(t, "public key", key.Public(short), public)
	es, gotShort, err := key.Shared(peer)
	if err != nil {
		t.Fatal(err)
	}
	if gotShort != short {
		t.Errorf("pubkey_len without itself: %v, want %v", gotShort, short)
	}
	return es
}

func (v *vector) testInit(t *testing.T) {
	m1, err := ParseInit1(v.TEP, v.Init1)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "N_A", m1.Nonce[:], v.NA)
	equal(t, "Pub_A", m1.Pub, v.PubA)
	equal(t, "Init1", m1.Append(nil), v.Init1)
	if err := CheckCipher(v.AEAD, m1.Ciphers); err != nil {
		t.Error(err)
	}
	m2, err := ParseInit2(v.TEP, v.Init2)
	if err != nil {
		t.Fatal(err)
	}
	if m2.Cipher != v.AEAD {
		t.Errorf("sym_cipher %v, want %v", m2.Cipher, v.AEAD)
	}
	equal(t, "N_B", m2.Nonce[:], v.NB)
	equal(t, "Pub_B", m2.Pub, v.PubB)
	equal(t, "Init2", m2.Append(nil), v.Init2)
}

// testSecrets follows the session secrets from PRK on, and compares them with
// what the two sessions hand over.
func (v *vector) testSecrets(t *testing.T, a, b *Session) {
	ikm := bytes.Join([][]byte{v.Transcript, v.Init1, v.Init2, v.ES}, nil)
	ss := &Secret{ss: extract(v.NA, ikm)}
	equal(t, "prk", ss.ss[:], v.PRK)
	for i, want := range v.SS {
		equal(t, fmt.Sprintf("ss[%d]", i), ss.ss[:], want)
		if i == 1 {
			halfA, halfB := ss.ResumeHalf(RoleA), ss.ResumeHalf(RoleB)
			equal(t, "resume[1] of A", halfA[:], v.Resume1A)
			equal(t, "resume[1] of B", halfB[:], v.Resume1B)
		}
		ss = ss.Next()
	}
	for _, s := range []*Session{a, b} {
		equal(t, "next secret", s.NextSecret().ss[:], v.SS[1])
	}
}

// testSession checks the session ID, the keys of every generation, and every
// frame, sealed by its sender and opened by its receiver.
func (v *keyVectors) testSession(t *testing.T, a, b *Session) {
	t.Helper()
	idA, idB := a.ID(), b.ID()
	equal(t, "session ID of A", idA[:], v.SessionID)
	equal(t, "session ID of B", idB[:], v.SessionID)
	v.testDirection(t, "ab", v.KAB, v.FramesAB, a.SendKey, b.RecvKey, &a.send, &b.recv)
	v.testDirection(t, "ba", v.KBA, v.FramesBA, b.SendKey, a.RecvKey, &b.send, &a.recv)
}

func (v *keyVectors) testDirection(t *testing.T, name string, kn []hexBytes, frames []frameVector,
	send, recv func(uint32) *Key, chains ...*keyChain) {
	t.Helper()
	if len(frames) != 8 {
		t.Errorf("%d frames", len(frames))
	}
	var seals []SealOp
	var opens []OpenOp
	for i := range frames {
		f := &frames[i]
		what := fmt.Sprintf("%s %s", name, f.Name)
		sk, rk := send(f.Generation), recv(f.Generation)
		for _, c := range chains {
			equal(t, what+" mk", c.mk[:], v.MK[f.Generation])
			var got [maxKeyLen + nonceLen]byte
			n := len(kn[f.Generation])
			cprf(got[:n], &c.mk, c.label, nil)
			equal(t, what+" traffic key", got[:n], kn[f.Generation])
		}

		frame := make([]byte, len(f.Wire))
		if n := sk.Seal(frame, f.plain(), f.AAD[0], f.Offset); n != len(f.Wire) {
			t.Errorf("%s: Seal returned %d, want %d", what, n, len(f.Wire))
		}
		equal(t, what, frame, f.Wire)
		nonce := sk.nonce(f.Offset)
		equal(t, what+" nonce", binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, nonce.Hi), nonce.Lo), f.Nonce)
		equal(t, what+" aad", frame[:FrameHeader], f.AAD)

		inPlace := append(make([]byte, FrameHeader), f.plain()...)
		inPlace = append(inPlace, make([]byte, TagLen)...)
		sk.Seal(inPlace, inPlace[FrameHeader:len(inPlace)-TagLen], f.AAD[0], f.Offset)
		equal(t, what+" in place", inPlace, f.Wire)

		if n, err := FrameLen(f.Wire); n != len(f.Wire) || err != nil {
			t.Errorf("%s: FrameLen %d, %v", what, n, err)
		}
		plain, ok := rk.Open(bytes.Clone(f.Wire), f.Offset)
		if !ok {
			t.Fatalf("%s: does not open", what)
		}
		equal(t, what+" plaintext", plain, f.plain())
		flags, urgent, data, err := ParsePlain(plain)
		if err != nil || flags != f.Flags || f.Urgent != nil && urgent != *f.Urgent {
			t.Errorf("%s: flags %#x urgent %d: %v", what, flags, urgent, err)
		}
		equal(t, what+" data", data, f.Data)

		src := f.plain()
		src[0] = 0xff
		seals = append(seals, SealOp{Key: sk, Dst: make([]byte, len(f.Wire)), Src: src,
			Flags: f.Flags, Control: f.AAD[0], Offset: f.Offset})
		opens = append(opens, OpenOp{Key: rk, Frame: bytes.Clone(f.Wire), Offset: f.Offset})
	}
	SealVec(seals)
	OpenVec(opens)
	for i := range frames {
		equal(t, name+" SealVec "+frames[i].Name, seals[i].Dst, frames[i].Wire)
		if !opens[i].OK {
			t.Errorf("%s OpenVec %s failed", name, frames[i].Name)
		}
		equal(t, name+" OpenVec "+frames[i].Name, opens[i].Plain, frames[i].plain())
	}
}

func (r *resumedVector) test(t *testing.T, v *vector) {
	equal(t, "sn", append(bytes.Clone(r.NonceA), r.NonceB...), r.SN)
	ss := &Secret{ss: [keyLen]byte(v.SS[r.I])}
	opener := RoleA
	if r.Opener == "B" {
		opener = RoleB
	}
	for _, side := range []struct {
		eno  []byte
		role Role
	}{{r.ENOSyn, opener}, {r.ENOSynAck, opener.Peer()}} {
		half := ss.ResumeHalf(side.role)
		if !bytes.Contains(side.eno, half[:]) {
			t.Errorf("ENO option %x does not have %x of original %v", side.eno, half, side.role)
		}
	}
	tepByte := byte(v.TEP) | 0x80
	a := NewResumedSession(RoleA, v.AEAD, tepByte, ss, r.SN)
	b := NewResumedSession(RoleB, v.AEAD, tepByte, ss, r.SN)
	r.testSession(t, a, b)
	for _, s := range []*Session{a, b} {
		equal(t, "next secret", s.NextSecret().ss[:], v.SS[r.I+1])
	}
}
