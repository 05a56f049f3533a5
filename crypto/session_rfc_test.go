package crypto

import (
	"bytes"
	"encoding/binary"
	"math/bits"
	"testing"
)

// The tests of this file are those of docs/conformance.md that no other test
// of the package brings along.

// The session ID, and every key with it, changes with each input of the key
// exchange, and is at least 33 bytes long (RFC 8547 section 5.1).
func TestSessionIDDependsOnAll(t *testing.T) {
	inputs := [][]byte{
		{69, 3, 0x23, 69, 4, 1, 0x23}, // transcript
		bytes.Repeat([]byte{1}, 79),   // Init1
		bytes.Repeat([]byte{2}, 74),   // Init2
		bytes.Repeat([]byte{3}, InitNonceLen),
		bytes.Repeat([]byte{4}, 32), // ES
	}
	session := func(tepByte byte) *Session {
		return NewSession(RoleA, AES128GCM, tepByte, inputs[0], inputs[1], inputs[2], inputs[3], inputs[4])
	}
	ids := make(map[[SessionIDLen]byte]bool)
	secrets := make(map[[keyLen]byte]bool)
	masters := make(map[[keyLen]byte]bool)
	note := func(s *Session) {
		ids[s.ID()], secrets[s.next.ss], masters[s.send.mk] = true, true, true
	}
	note(session(0x23))
	n := 1
	for _, in := range inputs {
		for at := range in {
			in[at] ^= 0x80
			note(session(0x23))
			in[at] ^= 0x80
			n++
		}
	}
	if len(ids) != n || len(secrets) != n || len(masters) != n {
		t.Errorf("%d inputs give %d session IDs, %d next secrets and %d master keys", n, len(ids), len(secrets), len(masters))
	}
	if id := session(0x24).ID(); id[0] != 0x24 || len(id) < 33 {
		t.Errorf("session ID %x", id)
	}

	// Resumed sessions: each secret and each nonce of either host counts.
	resumed := make(map[[SessionIDLen]byte]bool)
	ss := session(0x23).NextSecret()
	for range 4 {
		for _, sn := range [][]byte{nil, {0}, {0, 0}, {1}, {1, 0}, make([]byte, 16)} {
			resumed[NewResumedSession(RoleA, AES128GCM, 0xa3, ss, sn).ID()] = true
		}
		ss = ss.Next()
	}
	if len(resumed) != 24 {
		t.Errorf("24 resumptions have %d session IDs", len(resumed))
	}
}

// Nothing of a session ID but its first byte tells it from random bytes: each
// bit is set in about half of many (RFC 8547 sections 5.1 and 8.6). This only
// finds gross faults; the rest is HKDF's property.
func TestSessionIDBits(t *testing.T) {
	const n = 2000
	var set [8 * SessionIDLen]int
	ones := 0
	for i := range uint32(n) {
		id := NewSession(RoleA, AES128GCM, 0x23, nil, nil, nil, binary.BigEndian.AppendUint32(nil, i), []byte{1}).ID()
		for at, b := range id[1:] {
			ones += bits.OnesCount8(b)
			for k := range 8 {
				set[8*at+k] += int(b >> k & 1)
			}
		}
	}
	for i, c := range set[:8*keyLen] {
		// Eight standard deviations of a fair coin.
		if d := c - n/2; d < -180 || d > 180 {
			t.Errorf("bit %d is set in %d of %d", i, c, n)
		}
	}
	if d := ones - n*4*keyLen; d < -4000 || d > 4000 {
		t.Errorf("%d of %d bits are set", ones, n*8*keyLen)
	}
}

// Public keys of the NIST curves go out compressed behind their length, in
// either reading of it; the others as they are (RFC 8548 section 5).
func TestPublicKeyForm(t *testing.T) {
	lens := map[TEP][2]int{TEPP256: {33, 0}, TEPP521: {67, 0}, TEPX25519: {0, 32}, TEPX448: {0, 56}}
	for _, tep := range AllTEPs {
		signs := make(map[byte]bool)
		for seed := range byte(24) {
			key, err := GenerateKey(tep, testRandom(seed))
			if err != nil {
				t.Fatal(err)
			}
			point, raw := lens[tep][0], lens[tep][1]
			if raw > 0 {
				if b := key.Public(false); len(b) != raw {
					t.Errorf("%v: %d bytes", tep, len(b))
				}
				continue
			}
			for _, short := range []bool{false, true} {
				b := key.Public(short)
				said := point + 2
				if short {
					said = point
				}
				if len(b) != point+2 || int(binary.BigEndian.Uint16(b)) != said || b[2]&^1 != 2 {
					t.Fatalf("%v, short %v: %x", tep, short, b)
				}
				signs[b[2]] = true
			}
		}
		if lens[tep][0] > 0 && len(signs) != 2 {
			t.Errorf("%v: only keys that begin with %v", tep, signs)
		}
	}
}

// What must be there is: the mandatory TEP and AEAD, and the recommended ones
// (RFC 8548 sections 5 and 6).
func TestMandatoryAlgorithms(t *testing.T) {
	for id, name := range map[TEP]string{0x21: "p256", 0x22: "p521", 0x23: "x25519", 0x24: "x448"} {
		if !id.Valid() || id.String() != name {
			t.Errorf("TEP %#x is %v, want %s", byte(id), id, name)
		}
	}
	for id, key := range map[AEAD]int{0x0001: 16, 0x0002: 32, 0x0010: 32} {
		if !id.Valid() || id.KeyLen() != key || id.NonceLen() != 12 {
			t.Errorf("AEAD %#x: valid %v, key of %d and nonce of %d bytes", uint16(id), id.Valid(), id.KeyLen(), id.NonceLen())
		}
	}
	if len(AllTEPs) != 4 || len(AllAEADs) != 3 {
		t.Errorf("%d TEPs, %d AEADs", len(AllTEPs), len(AllAEADs))
	}
	for _, null := range []AEAD{0, 0xffff} {
		if null.Valid() {
			t.Errorf("AEAD %#x is valid", uint16(null))
		}
		mustPanic(t, "a session without encryption", func() {
			NewSession(RoleA, null, 0x23, nil, nil, nil, nil, nil)
		})
	}
}
