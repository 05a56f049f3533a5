package crypto

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
)

// Values of the Init messages (RFC 8548 sections 4.1, 4.3 and 5).
const (
	Init1Magic = 0x15101a0e // INIT1_MAGIC
	Init2Magic = 0x097105e0 // INIT2_MAGIC

	// InitNonceLen is N_A_LEN and N_B_LEN in bytes.
	InitNonceLen = 32

	// MaxInitLen is the largest message_len that is accepted, in bytes. The
	// RFC sets no limit; a longer message is refused before it is buffered.
	MaxInitLen = 1 << 20

	initHeader = 8 // magic and message_len

	// The shortest messages of any TEP: no ciphers and an X25519 key.
	minInit1 = initHeader + 1 + InitNonceLen + 32
	minInit2 = initHeader + 2 + InitNonceLen + 32
)

// Init1 is the first message of the key exchange, from host A to host B (RFC
// 8548 section 4.1).
type Init1 struct {
	Ciphers []AEAD   // sym_cipher_list, at most 255; the peer's may hold unknown ones
	Nonce   [32]byte // N_A
	Pub     []byte   // Pub_A in its wire encoding
}

// Init2 is the second message of the key exchange, from host B to host A (RFC
// 8548 section 4.1).
type Init2 struct {
	Cipher AEAD     // sym_cipher
	Nonce  [32]byte // N_B
	Pub    []byte   // Pub_B in its wire encoding
}

// Append appends the encoding of m to dst and returns the result. It panics if
// there are more than 255 ciphers, which the encoding cannot hold.
func (m *Init1) Append(dst []byte) []byte {
	if len(m.Ciphers) > 255 {
		panic("crypto: more than 255 ciphers in Init1")
	}
	n := initHeader + 1 + 2*len(m.Ciphers) + InitNonceLen + len(m.Pub)
	dst = slices.Grow(dst, n)
	dst = binary.BigEndian.AppendUint32(dst, Init1Magic)
	dst = binary.BigEndian.AppendUint32(dst, uint32(n))
	dst = append(dst, byte(len(m.Ciphers)))
	for _, c := range m.Ciphers {
		dst = binary.BigEndian.AppendUint16(dst, uint16(c))
	}
	dst = append(dst, m.Nonce[:]...)
	return append(dst, m.Pub...)
}

// Append appends the encoding of m to dst and returns the result.
func (m *Init2) Append(dst []byte) []byte {
	n := initHeader + 2 + InitNonceLen + len(m.Pub)
	dst = slices.Grow(dst, n)
	dst = binary.BigEndian.AppendUint32(dst, Init2Magic)
	dst = binary.BigEndian.AppendUint32(dst, uint32(n))
	dst = binary.BigEndian.AppendUint16(dst, uint16(m.Cipher))
	dst = append(dst, m.Nonce[:]...)
	return append(dst, m.Pub...)
}

// InitLen looks at the first bytes of a stream, where the message with the
// given magic (Init1Magic or Init2Magic) must begin, and returns message_len,
// the length in bytes of the whole message; 0 if b is too short to tell. It
// fails with ErrBadMagic as soon as one byte differs, and with ErrInitLen if
// message_len is above MaxInitLen or too short for any TEP.
func InitLen(b []byte, magic uint32) (int, error) {
	var want [4]byte
	binary.BigEndian.PutUint32(want[:], magic)
	if n := min(len(b), len(want)); !bytes.Equal(b[:n], want[:n]) {
		return 0, ErrBadMagic
	}
	if len(b) < initHeader {
		return 0, nil
	}
	n := binary.BigEndian.Uint32(b[4:])
	least := uint32(minInit1)
	if magic == Init2Magic {
		least = minInit2
	}
	if n < least || n > MaxInitLen {
		return 0, fmt.Errorf("message_len %d: %w", n, ErrInitLen)
	}
	return int(n), nil
}

// initBody checks the frame of a whole message and returns what follows
// message_len.
func initBody(tep TEP, msg []byte, magic uint32) ([]byte, error) {
	if !tep.Valid() {
		return nil, fmt.Errorf("%v: %w", tep, ErrUnknownTEP)
	}
	n, err := InitLen(msg, magic)
	if err != nil {
		return nil, err
	}
	if n == 0 || n != len(msg) {
		return nil, fmt.Errorf("%d bytes of a message of %d: %w", len(msg), n, ErrInitLen)
	}
	return msg[initHeader:], nil
}

// initKey reads the nonce and the public key that end both messages. What
// follows the key is the ignored field.
func initKey(tep TEP, b []byte) (nonce [32]byte, pub []byte, err error) {
	if len(b) < InitNonceLen+tep.PubLen() {
		return nonce, nil, fmt.Errorf("no room for nonce and public key: %w", ErrInitLen)
	}
	pub = bytes.Clone(b[InitNonceLen : InitNonceLen+tep.PubLen()])
	if _, err := checkPub(tep, pub); err != nil {
		return nonce, nil, err
	}
	return [32]byte(b), pub, nil
}

// ParseInit1 decodes a whole Init1 message; len(msg) must be what InitLen
// returned. Bytes after Pub_A are ignored. The result shares no memory with
// msg. It fails with ErrBadMagic, ErrInitLen, ErrUnknownTEP, or ErrBadKey if
// the form of Pub_A is wrong; PrivateKey.Shared completes the validation.
func ParseInit1(tep TEP, msg []byte) (*Init1, error) {
	b, err := initBody(tep, msg, Init1Magic)
	if err != nil {
		return nil, err
	}
	k := int(b[0])
	b = b[1:]
	if len(b) < 2*k {
		return nil, fmt.Errorf("no room for %d ciphers: %w", k, ErrInitLen)
	}
	m := &Init1{Ciphers: make([]AEAD, k)}
	for i := range m.Ciphers {
		m.Ciphers[i] = AEAD(binary.BigEndian.Uint16(b[2*i:]))
	}
	if m.Nonce, m.Pub, err = initKey(tep, b[2*k:]); err != nil {
		return nil, err
	}
	return m, nil
}

// ParseInit2 decodes a whole Init2 message, as ParseInit1 does. It does not
// judge the cipher: see CheckCipher.
func ParseInit2(tep TEP, msg []byte) (*Init2, error) {
	b, err := initBody(tep, msg, Init2Magic)
	if err != nil {
		return nil, err
	}
	m := &Init2{Cipher: AEAD(binary.BigEndian.Uint16(b))}
	if m.Nonce, m.Pub, err = initKey(tep, b[2:]); err != nil {
		return nil, err
	}
	return m, nil
}

// ChooseCipher returns the first AEAD of host B's order of preference that host
// A offered (RFC 8548 section 3.3). ok is false if there is none: the
// connection is aborted with ErrNoCipher.
func ChooseCipher(prefs, offered []AEAD) (chosen AEAD, ok bool) {
	for _, c := range prefs {
		if slices.Contains(offered, c) {
			return c, true
		}
	}
	return 0, false
}

// CheckCipher fails with ErrCipherNotOffered if host B's choice is none of
// those that host A offered (RFC 8548 section 3.3).
func CheckCipher(chosen AEAD, offered []AEAD) error {
	if !slices.Contains(offered, chosen) {
		return fmt.Errorf("%v: %w", chosen, ErrCipherNotOffered)
	}
	return nil
}
