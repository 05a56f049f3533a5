package crypto

import (
	"bytes"
	"crypto/ecdh"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"math/big"

	"github.com/cloudflare/circl/dh/x25519"
	"github.com/cloudflare/circl/dh/x448"
)

// nistPrefix is the size of the pubkey_len field before a NIST point.
const nistPrefix = 2

// PrivateKey is the ephemeral private key of one host for one TEP (RFC 8548
// section 5). It belongs to one goroutine.
type PrivateKey struct {
	tep TEP
	pub []byte // without pubkey_len

	// One of them holds the key, none after Erase.
	ec     *ecdh.PrivateKey
	x25519 *x25519.Key // faster here than that of crypto/ecdh
	x448   *x448.Key
}

// nistCurve returns the two views of a NIST curve and the byte length of its
// field; ok is false for the other TEPs.
func nistCurve(t TEP) (ec ecdh.Curve, el elliptic.Curve, size int, ok bool) {
	switch t {
	case TEPP256:
		return ecdh.P256(), elliptic.P256(), 32, true
	case TEPP521:
		return ecdh.P521(), elliptic.P521(), 66, true
	}
	return nil, nil, 0, false
}

// GenerateKey makes a fresh key from the bytes of random, or of the operating
// system's generator if random is nil. The same bytes give the same key. It
// fails with ErrUnknownTEP, or with the error of random.
func GenerateKey(tep TEP, random io.Reader) (*PrivateKey, error) {
	if random == nil {
		random = rand.Reader
	}
	var buf [66]byte
	defer clear(buf[:])
	size := 0
	switch tep {
	case TEPP256, TEPX25519:
		size = 32
	case TEPX448:
		size = x448.Size
	case TEPP521:
		size = 66
	default:
		return nil, fmt.Errorf("%v: %w", tep, ErrUnknownTEP)
	}
	raw := buf[:size]
	// A NIST scalar must lie in [1, n-1]. Both group orders are so close to a
	// power of two that a second round is needed less than once in 2^32; the
	// bound only keeps a broken source from hanging the caller.
	for range 64 {
		if _, err := io.ReadFull(random, raw); err != nil {
			return nil, fmt.Errorf("random source: %w", err)
		}
		if tep == TEPP521 {
			raw[0] &= 1
		}
		if p, err := newPrivateKey(tep, raw); err == nil {
			return p, nil
		}
	}
	return nil, fmt.Errorf("random source gave no usable %v scalar: %w", tep, ErrPrivateKey)
}

// NewPrivateKey makes a key from its raw form, which is copied: 32 (X25519) or
// 56 (X448) bytes, or a big-endian scalar of 32 (P-256) or 66 (P-521) bytes that
// is reduced modulo the order of the group. It is meant for known-answer tests:
// the reduction does not run in constant time. It fails with ErrUnknownTEP, or
// ErrPrivateKey if the length is wrong or the scalar is zero.
func NewPrivateKey(tep TEP, raw []byte) (*PrivateKey, error) {
	if _, el, size, ok := nistCurve(tep); ok && len(raw) == size {
		scalar := new(big.Int).SetBytes(raw)
		raw = scalar.Mod(scalar, el.Params().N).FillBytes(make([]byte, size))
	}
	return newPrivateKey(tep, raw)
}

// newPrivateKey is NewPrivateKey for scalars that are in range already.
func newPrivateKey(tep TEP, raw []byte) (*PrivateKey, error) {
	p := &PrivateKey{tep: tep}
	switch {
	case tep == TEPX25519 && len(raw) == x25519.Size:
		p.x25519 = (*x25519.Key)(bytes.Clone(raw))
		var pub x25519.Key
		x25519.KeyGen(&pub, p.x25519)
		p.pub = pub[:]
		return p, nil
	case tep == TEPX448 && len(raw) == x448.Size:
		p.x448 = (*x448.Key)(bytes.Clone(raw))
		var pub x448.Key
		x448.KeyGen(&pub, p.x448)
		p.pub = pub[:]
		return p, nil
	case tep == TEPX25519 || tep == TEPX448:
		return nil, fmt.Errorf("%v: %w", tep, ErrPrivateKey)
	}
	curve, _, size, ok := nistCurve(tep)
	if !ok {
		return nil, fmt.Errorf("%v: %w", tep, ErrUnknownTEP)
	}
	key, err := curve.NewPrivateKey(raw)
	if err != nil {
		return nil, fmt.Errorf("%v: %w", tep, ErrPrivateKey)
	}
	p.ec = key
	p.pub = compress(key.PublicKey().Bytes(), size)
	return p, nil
}

// compress turns the uncompressed encoding of a point into the compressed one:
// the sign of y and x (IEEE 1363 section E.2.3).
func compress(point []byte, size int) []byte {
	c := make([]byte, 0, 1+size)
	c = append(c, 2|point[2*size]&1)
	return append(c, point[1:1+size]...)
}

// TEP returns the TEP of the key.
func (p *PrivateKey) TEP() TEP { return p.tep }

// Public returns Pub_A or Pub_B in its wire encoding (RFC 8548 section 5),
// TEP.PubLen bytes that belong to the caller. RFC 8548 draws pubkey_len, the
// prefix of the NIST curves, as the length of the whole field (35 or 69);
// shortLen selects the other reading, which leaves out the two bytes of
// pubkey_len itself (33 or 67). Host A passes false, host B what Shared
// returned for A's key.
func (p *PrivateKey) Public(shortLen bool) []byte {
	wire := make([]byte, 0, nistPrefix+len(p.pub))
	if _, _, _, ok := nistCurve(p.tep); ok {
		n := len(p.pub)
		if !shortLen {
			n += nistPrefix
		}
		wire = binary.BigEndian.AppendUint16(wire, uint16(n))
	}
	return append(wire, p.pub...)
}

// Shared computes the ephemeral secret ES from the peer's public key in its
// wire encoding (RFC 8548 section 3.3). es has 32 (X25519, P-256), 56 (X448) or
// 66 (P-521) bytes; the caller clears it when the session has been made.
// shortLen reports which reading of pubkey_len the peer uses, see Public; it is
// false for X25519 and X448.
//
// It fails with ErrBadKey if the key does not validate, ErrZeroShared, or
// ErrPrivateKey after Erase.
func (p *PrivateKey) Shared(peerWire []byte) (es []byte, shortLen bool, err error) {
	shortLen, err = checkPub(p.tep, peerWire)
	if err != nil {
		return nil, false, err
	}
	switch {
	case p.x25519 != nil:
		var secret, peer x25519.Key
		copy(peer[:], peerWire)
		if !x25519.Shared(&secret, p.x25519, &peer) || secret == (x25519.Key{}) {
			return nil, false, ErrZeroShared
		}
		return secret[:], false, nil
	case p.x448 != nil:
		var secret, peer x448.Key
		copy(peer[:], peerWire)
		if !x448.Shared(&secret, p.x448, &peer) || secret == (x448.Key{}) {
			return nil, false, ErrZeroShared
		}
		return secret[:], false, nil
	case p.ec != nil:
		curve, el, size, _ := nistCurve(p.tep)
		x, y := elliptic.UnmarshalCompressed(el, peerWire[nistPrefix:])
		if x == nil {
			return nil, false, fmt.Errorf("%v: not a point of the curve: %w", p.tep, ErrBadKey)
		}
		point := make([]byte, 1+2*size)
		point[0] = 4
		x.FillBytes(point[1 : 1+size])
		y.FillBytes(point[1+size:])
		peer, err := curve.NewPublicKey(point)
		if err != nil {
			return nil, false, fmt.Errorf("%v: %w", p.tep, ErrBadKey)
		}
		if es, err = p.ec.ECDH(peer); err != nil {
			return nil, false, fmt.Errorf("%v: %w", p.tep, ErrBadKey)
		}
		return es, shortLen, nil
	}
	return nil, false, ErrPrivateKey
}

// Erase forgets the private key; Shared fails from then on. See the package
// comment for what erasing means.
func (p *PrivateKey) Erase() {
	if p.x25519 != nil {
		clear(p.x25519[:])
	}
	if p.x448 != nil {
		clear(p.x448[:])
	}
	p.ec, p.x25519, p.x448 = nil, nil, nil
}

// checkPub checks the form of a public key in its wire encoding: its length,
// and for the NIST curves pubkey_len and the compressed format.
func checkPub(tep TEP, wire []byte) (shortLen bool, err error) {
	if !tep.Valid() {
		return false, fmt.Errorf("%v: %w", tep, ErrUnknownTEP)
	}
	if len(wire) != tep.PubLen() {
		return false, fmt.Errorf("%v: %d bytes, want %d: %w", tep, len(wire), tep.PubLen(), ErrBadKey)
	}
	if _, _, _, ok := nistCurve(tep); !ok {
		return false, nil
	}
	switch n := int(binary.BigEndian.Uint16(wire)); n {
	case len(wire):
	case len(wire) - nistPrefix:
		shortLen = true
	default:
		return false, fmt.Errorf("%v: pubkey_len %d: %w", tep, n, ErrBadKey)
	}
	if format := wire[nistPrefix]; format != 2 && format != 3 {
		return false, fmt.Errorf("%v: not a compressed point: %w", tep, ErrBadKey)
	}
	return shortLen, nil
}
