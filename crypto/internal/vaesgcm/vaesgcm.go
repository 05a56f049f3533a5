// Package vaesgcm is AES-GCM (NIST SP 800-38D) with nonces of 12 bytes and tags
// of 16, computed with the vector forms of the AES and carry-less multiplication
// instructions of x86-64. It is made for packets: a short message costs few
// instructions, and a key fills five or six cache lines.
//
// No time, address or branch depends on keys, plaintext, or on whether a tag is
// right before it has been compared as a whole. Nothing is read or written
// outside of the slices given.
package vaesgcm

import "encoding/binary"

//go:generate go run -C gen . -out ../vaesgcm_amd64.s -stubs ../stubs_amd64.go -pkg vaesgcm

// Form says which instructions are used.
type Form uint8

// The two forms. A Key made for one is useless to the other.
const (
	Wide   Form = iota // 64-byte vectors: AVX-512 F, BW, DQ, VL and BMI2
	Narrow             // 32-byte vectors: AVX2
	Forms
)

// TagLen is the length of a tag in bytes.
const TagLen = 16

// keyBytes is the size of the powers of H and the round keys of AES-256.
const keyBytes = 7*16 + 15*16

// Key is an expanded key. It is best placed 28 bytes into a cache line. The zero
// value is no key: see Init.
type Key struct {
	kind kind
	_    [3]byte
	b    [keyBytes]byte
}

// kind is a form and a key length.
type kind uint8

const (
	none kind = iota
	wide128
	wide256
	narrow128
	narrow256
)

// Init expands key, which has 16 or 32 bytes, for a form that is Supported.
func (k *Key) Init(f Form, key []byte) {
	if !Supported(f) || len(key) != 16 && len(key) != 32 {
		panic("vaesgcm: this CPU or key length is not supported")
	}
	k.kind = wide128 + kind(2*f) + kind(len(key)/32)
	wide := uint64(1)
	if f == Narrow {
		wide = 0
	}
	if len(key) == 16 {
		expand128(&k.b[0], &key[0], wide)
	} else {
		expand256(&k.b[0], &key[0], wide)
	}
}

// Erase overwrites the key.
func (k *Key) Erase() { *k = Key{} }

// Live reports whether Init was called, and Erase was not called since.
func (k *Key) Live() bool { return k.kind != none }

// Fetch has the CPU fetch the key into its cache.
func (k *Key) Fetch() { fetch(&k.b[0]) }

// Nonce is a nonce as two big-endian numbers.
type Nonce struct {
	Hi uint64 // bytes 0 to 7
	Lo uint32 // bytes 8 to 11
}

// NonceOf converts a nonce.
func NonceOf(b *[12]byte) Nonce {
	return Nonce{binary.BigEndian.Uint64(b[:]), binary.BigEndian.Uint32(b[8:])}
}

// counter returns the lower half of the counter block that belongs to the tag.
func (n Nonce) counter() uint64 { return uint64(n.Lo)<<32 | 1 }

// AAD is additional data as far as a call of Seal or Open needs it.
type AAD struct {
	hi, lo uint64 // the last block, with what precedes it hashed in
	bits   uint64
}

// ShortAAD is additional data of n bytes, 1 to 8, which are the first of the
// big-endian number v; the others must be zero.
func ShortAAD(v uint64, n int) AAD { return AAD{hi: v, bits: 8 * uint64(n)} }

// AAD prepares additional data of any length.
func (k *Key) AAD(b []byte) AAD {
	a := AAD{bits: 8 * uint64(len(b))}
	if len(b) > 16 {
		n := (len(b) - 1) / 16
		var y [2]uint64
		ghash(&k.b[0], &y, &b[0], uint64(n))
		a.lo, a.hi = y[0], y[1]
		b = b[16*n:]
	}
	var last [16]byte
	copy(last[:], b)
	a.hi ^= binary.BigEndian.Uint64(last[:])
	a.lo ^= binary.BigEndian.Uint64(last[8:])
	return a
}

const noKey = "vaesgcm: no key"

// Seal encrypts src to dst, which has room for TagLen more bytes, and puts the
// tag behind. src and dst begin at the same byte or do not overlap.
func (k *Key) Seal(nonce Nonce, aad AAD, dst, src []byte) {
	n := uint64(len(src))
	if uint64(len(dst)) < n+TagLen {
		panic("vaesgcm: no room for the tag")
	}
	d := &dst[0]
	s := d
	if n > 0 {
		s = &src[0]
	}
	switch k.kind {
	case wide128:
		seal128Wide(&k.b[0], nonce.counter(), nonce.Hi, aad.lo, aad.hi, aad.bits, d, s, n)
	case wide256:
		seal256Wide(&k.b[0], nonce.counter(), nonce.Hi, aad.lo, aad.hi, aad.bits, d, s, n)
	case narrow128:
		seal128Narrow(&k.b[0], nonce.counter(), nonce.Hi, aad.lo, aad.hi, aad.bits, d, s, n)
	case narrow256:
		seal256Narrow(&k.b[0], nonce.counter(), nonce.Hi, aad.lo, aad.hi, aad.bits, d, s, n)
	default:
		panic(noKey)
	}
}

// Open authenticates and decrypts b in place, at least TagLen bytes that end
// with the tag. If it returns false, what was ciphertext has become zeros.
func (k *Key) Open(nonce Nonce, aad AAD, b []byte) bool {
	if len(b) < TagLen {
		return false
	}
	n := uint64(len(b) - TagLen)
	p := &b[0]
	var bad uint64
	switch k.kind {
	case wide128:
		bad = open128Wide(&k.b[0], nonce.counter(), nonce.Hi, aad.lo, aad.hi, aad.bits, p, p, n)
	case wide256:
		bad = open256Wide(&k.b[0], nonce.counter(), nonce.Hi, aad.lo, aad.hi, aad.bits, p, p, n)
	case narrow128:
		bad = open128Narrow(&k.b[0], nonce.counter(), nonce.Hi, aad.lo, aad.hi, aad.bits, p, p, n)
	case narrow256:
		bad = open256Narrow(&k.b[0], nonce.counter(), nonce.Hi, aad.lo, aad.hi, aad.bits, p, p, n)
	default:
		panic(noKey)
	}
	if bad != 0 {
		clear(b[:n])
		return false
	}
	return true
}
