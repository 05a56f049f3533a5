package crypto

import (
	"fmt"
	"strings"
)

// TEP is a TCP encryption protocol identifier of tcpcrypt without the v bit
// (RFC 8548 section 7, table 4). It names the key-agreement scheme.
type TEP uint8

// The TEPs of RFC 8548.
const (
	TEPP256   TEP = 0x21
	TEPP521   TEP = 0x22
	TEPX25519 TEP = 0x23
	TEPX448   TEP = 0x24
)

// AllTEPs lists the implemented TEPs in the order of RFC 8548's requirement
// levels (section 5, table 2), which is also the default order of preference.
// It must not be changed.
var AllTEPs = []TEP{TEPX25519, TEPX448, TEPP256, TEPP521}

// String returns the name used in configuration and output: "x25519", "x448",
// "p256" or "p521".
func (t TEP) String() string {
	switch t {
	case TEPP256:
		return "p256"
	case TEPP521:
		return "p521"
	case TEPX25519:
		return "x25519"
	case TEPX448:
		return "x448"
	}
	return fmt.Sprintf("tep(%#02x)", uint8(t))
}

// Valid reports whether t is one of AllTEPs.
func (t TEP) Valid() bool { return t >= TEPP256 && t <= TEPX448 }

// ParseTEP is the inverse of TEP.String. Case is ignored. It fails with
// ErrUnknownTEP.
func ParseTEP(s string) (TEP, error) {
	for _, t := range AllTEPs {
		if strings.EqualFold(s, t.String()) {
			return t, nil
		}
	}
	return 0, fmt.Errorf("%q: %w", s, ErrUnknownTEP)
}

// PubLen returns the length in bytes of Pub_A and Pub_B as they stand in Init1
// and Init2, the length prefix of the NIST curves included; 0 if t is not
// valid.
func (t TEP) PubLen() int {
	switch t {
	case TEPP256:
		return nistPrefix + 1 + 32
	case TEPP521:
		return nistPrefix + 1 + 66
	case TEPX25519:
		return 32
	case TEPX448:
		return 56
	}
	return 0
}

// AEAD is the identifier of an AEAD algorithm (sym_cipher, RFC 8548 section 7,
// table 5).
type AEAD uint16

// The AEAD algorithms of RFC 8548.
const (
	AES128GCM        AEAD = 0x01
	AES256GCM        AEAD = 0x02
	ChaCha20Poly1305 AEAD = 0x10
)

// AllAEADs lists the implemented AEAD algorithms in the order of table 3 of RFC
// 8548, section 6, which is also the default order of preference. It must not
// be changed.
var AllAEADs = []AEAD{AES128GCM, AES256GCM, ChaCha20Poly1305}

// String returns the name used in configuration and output: "aes128gcm",
// "aes256gcm" or "chacha20poly1305".
func (a AEAD) String() string {
	switch a {
	case AES128GCM:
		return "aes128gcm"
	case AES256GCM:
		return "aes256gcm"
	case ChaCha20Poly1305:
		return "chacha20poly1305"
	}
	return fmt.Sprintf("aead(%#04x)", uint16(a))
}

// Valid reports whether a is one of AllAEADs.
func (a AEAD) Valid() bool { return a.KeyLen() != 0 }

// KeyLen returns ae_key_len in bytes (RFC 8548 section 6, table 3), 0 if a is
// not valid.
func (a AEAD) KeyLen() int {
	switch a {
	case AES128GCM:
		return 16
	case AES256GCM, ChaCha20Poly1305:
		return 32
	}
	return 0
}

// NonceLen returns ae_nonce_len in bytes (RFC 8548 section 6, table 3), 0 if a
// is not valid.
func (a AEAD) NonceLen() int {
	if !a.Valid() {
		return 0
	}
	return nonceLen
}

// ParseAEAD is the inverse of AEAD.String; it also takes the short forms
// "aes128", "aes256" and "chacha". Case is ignored. It fails with
// ErrUnknownAEAD.
func ParseAEAD(s string) (AEAD, error) {
	switch strings.ToLower(s) {
	case "aes128gcm", "aes128":
		return AES128GCM, nil
	case "aes256gcm", "aes256":
		return AES256GCM, nil
	case "chacha20poly1305", "chacha":
		return ChaCha20Poly1305, nil
	}
	return 0, fmt.Errorf("%q: %w", s, ErrUnknownAEAD)
}

// Frames that one traffic key may seal before the sender rekeys.
const (
	// RekeyFramesGCM is the default for AES-GCM. 2^24 frames of the largest
	// size are 2^36 blocks, which bounds the advantage of distinguishing the
	// ciphertext from random to (2^36)^2 / 2^129 = 2^-57; frames of one
	// Ethernet segment give 2^-67. TLS 1.3 takes 2^-60 (RFC 8446 section 5.5).
	RekeyFramesGCM = 1 << 24

	// RekeyFramesChaCha is the default for ChaCha20-Poly1305, which needs no
	// rekeying within the 2^64 bytes that the frame offset can count. The
	// figure limits what the loss of one key discloses.
	RekeyFramesChaCha = 1 << 32
)

// RekeyFrames returns how many frames one traffic key seals, by default, before
// the sender initiates rekeying (RFC 8548 section 3.8).
func (a AEAD) RekeyFrames() uint64 {
	if a == ChaCha20Poly1305 {
		return RekeyFramesChaCha
	}
	return RekeyFramesGCM
}

// Role is a host's role in a connection (RFC 8547 section 4.3) or, for the
// traffic keys of a resumed session, in the original one (RFC 8548 section
// 3.5).
type Role uint8

// The two roles. The active opener is normally A.
const (
	RoleA Role = iota
	RoleB
)

// String returns "A" or "B".
func (r Role) String() string {
	if r == RoleA {
		return "A"
	}
	return "B"
}

// Peer returns the other role.
func (r Role) Peer() Role {
	if r == RoleA {
		return RoleB
	}
	return RoleA
}
