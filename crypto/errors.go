package crypto

import "errors"

// Reasons for failure. The functions of this package return these values
// themselves or wrapped with detail: compare with errors.Is. All but the last
// five are faults of the peer, after which RFC 8548 requires the connection to
// be aborted.
var (
	// ErrBadMagic: the stream does not begin with INIT1_MAGIC or INIT2_MAGIC
	// (RFC 8548 section 4.1), so the peer or a middlebox speaks something else.
	ErrBadMagic = errors.New("init message: wrong magic number")

	// ErrInitLen: message_len is below what the fields need, above MaxInitLen,
	// or differs from the number of bytes passed to the parser.
	ErrInitLen = errors.New("init message: impossible length")

	// ErrBadKey: the public key failed validation (RFC 8548 section 5):
	// wrong pubkey_len, not a compressed point, or not on the curve.
	ErrBadKey = errors.New("public key failed validation")

	// ErrZeroShared: X25519 or X448 gave the all-zero shared secret, that is
	// the peer sent a point of small order (RFC 8548 section 5).
	ErrZeroShared = errors.New("all-zero shared secret")

	// ErrNoCipher: host A offered no AEAD that host B allows.
	ErrNoCipher = errors.New("no AEAD algorithm in common")

	// ErrCipherNotOffered: host B chose an AEAD that host A had not offered
	// (RFC 8548 section 3.3).
	ErrCipherNotOffered = errors.New("peer chose an AEAD algorithm that was not offered")

	// ErrFrameLen: clen has no room for the flags byte and the tag.
	ErrFrameLen = errors.New("frame: ciphertext too short for flags and tag")

	// ErrNoUrgent: an authentic frame has URGp set but ends before its urgent
	// field (RFC 8548 section 4.2.1).
	ErrNoUrgent = errors.New("frame: urgent field missing")

	// ErrUnknownTEP: not a TEP of RFC 8548.
	ErrUnknownTEP = errors.New("unknown TEP: want x25519, x448, p256 or p521")

	// ErrUnknownAEAD: not an AEAD algorithm of RFC 8548.
	ErrUnknownAEAD = errors.New("unknown AEAD algorithm: want aes128gcm, aes256gcm or chacha20poly1305")

	// ErrPrivateKey: the private key is malformed or has been erased.
	ErrPrivateKey = errors.New("private key malformed or erased")

	// ErrUnknownEngine: no AEAD engine has that name.
	ErrUnknownEngine = errors.New("unknown AEAD engine")

	// ErrNoEngine: the CPU, or the operating system, lacks what the AEAD engine
	// needs.
	ErrNoEngine = errors.New("this machine lacks the instructions of that AEAD engine")
)
