package crypto

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto/internal/vaesgcm"
)

// The layout of an encryption frame (RFC 8548 section 4.2): control, clen and
// the ciphertext, which is as long as the plaintext value (flags, optional
// urgent field, data) plus the tag. All lengths are in bytes.
const (
	FrameHeader = 3  // control and clen
	TagLen      = 16 // of all three AEAD algorithms

	// Overhead is what a frame without urgent field adds to its data.
	Overhead = FrameHeader + 1 + TagLen

	// MaxCiphertext is the largest clen.
	MaxCiphertext = 65535

	// MaxPlain is the longest plaintext value, flags and urgent field included.
	MaxPlain = MaxCiphertext - TagLen

	// MaxFrame is the length of the longest frame.
	MaxFrame = FrameHeader + MaxCiphertext

	ControlRekey = 1 // rekey, bit 0 of control
	FlagFIN      = 1 // FINp, bit 0 of flags
	FlagURG      = 2 // URGp, bit 1 of flags

	// UrgentLen is the length of the urgent field that follows flags when URGp
	// is set.
	UrgentLen = 2

	nonceLen  = 12 // of all three AEAD algorithms
	maxKeyLen = 32
)

// FrameLen looks at the first bytes of a stream where a frame begins and
// returns the length of the whole frame; 0 if b is too short to tell. It fails
// with ErrFrameLen if clen has no room for flags and tag. Nothing of it is
// authentic yet.
func FrameLen(b []byte) (int, error) {
	if len(b) < FrameHeader {
		return 0, nil
	}
	clen := int(binary.BigEndian.Uint16(b[1:]))
	if clen < TagLen+1 {
		return 0, ErrFrameLen
	}
	return FrameHeader + clen, nil
}

// ParsePlain splits the plaintext value that Open returned (RFC 8548 section
// 4.2.1). urgent is meaningful if flags has FlagURG; data points into plain.
// Reserved flag bits are returned as they are and are to be ignored. It fails
// with ErrFrameLen if plain is empty and with ErrNoUrgent.
func ParsePlain(plain []byte) (flags byte, urgent uint16, data []byte, err error) {
	if len(plain) == 0 {
		return 0, 0, nil, ErrFrameLen
	}
	flags, data = plain[0], plain[1:]
	if flags&FlagURG != 0 {
		if len(data) < UrgentLen {
			return flags, 0, nil, ErrNoUrgent
		}
		urgent, data = binary.BigEndian.Uint16(data), data[UrgentLen:]
	}
	return flags, urgent, data, nil
}

// Key seals or opens the frames of one direction and generation: one traffic
// key k_ab[j] or k_ba[j] (RFC 8548 section 3.3). It comes from Session.SendKey
// or Session.RecvKey and belongs to the goroutine that owns the session. No
// method allocates.
//
// A Key is six cache lines, of which AES-128 needs five: what a frame costs when
// flows take turns depends on that. TestKeyLayout holds it to it.
type Key struct {
	std  *stdKey // nil unless the standard library seals
	rand uint64  // the last eight bytes of the nonce randomizer
	head uint32  // the first four
	_    [keyPad]byte
	vec  vaesgcm.Key // no key if std is set, or once erased
}

// keyPad puts vec where the powers of H that are used as one vector fill a line.
const keyPad = 8

// stdKey is a key of the standard library, or of a library with its interface.
type stdKey struct {
	aead  cipher.AEAD
	nonce [nonceLen]byte // on the stack it would escape through cipher.AEAD
}

func newAEAD(a AEAD, key []byte) cipher.AEAD {
	var c cipher.AEAD
	var err error
	if a == ChaCha20Poly1305 {
		c, err = chacha20poly1305.New(key)
	} else {
		var block cipher.Block
		if block, err = aes.NewCipher(key); err == nil {
			c, err = cipher.NewGCM(block)
		}
	}
	if err != nil {
		panic("crypto: " + err.Error())
	}
	return c
}

func newKey(a AEAD, key []byte, randomizer [nonceLen]byte) *Key {
	k := &Key{
		head: binary.BigEndian.Uint32(randomizer[:]),
		rand: binary.BigEndian.Uint64(randomizer[4:]),
	}
	if e := current.Load(); e.vector && a != ChaCha20Poly1305 {
		k.vec.Init(e.form, key)
	} else {
		k.std = &stdKey{aead: newAEAD(a, key)}
	}
	return k
}

func (k *Key) live() bool { return k.std != nil || k.vec.Live() }

func (k *Key) erase() {
	if k.std != nil {
		*k.std = stdKey{}
	}
	*k = Key{}
}

// nonce returns the nonce of the frame at offset: the frame ID, which is the
// offset padded with zeros on the left, XOR the randomizer (RFC 8548 sections
// 3.6 and 4.2.3).
func (k *Key) nonce(offset uint64) vaesgcm.Nonce {
	r := k.rand ^ offset
	return vaesgcm.Nonce{Hi: uint64(k.head)<<32 | r>>32, Lo: uint32(r)}
}

// stdNonce returns the nonce for the library, in memory of the key.
func (k *Key) stdNonce(offset uint64) []byte {
	n := k.std.nonce[:]
	binary.BigEndian.PutUint32(n, k.head)
	binary.BigEndian.PutUint64(n[4:], k.rand^offset)
	return n
}

// frameAAD is the additional data of a frame: control and clen.
func frameAAD(control byte, clen int) vaesgcm.AAD {
	return vaesgcm.ShortAAD(uint64(control)<<56|uint64(clen)<<40, FrameHeader)
}

// Seal writes a whole frame to dst and returns its length,
// FrameHeader+len(src)+TagLen. src is the plaintext value: the flags byte, the
// urgent field if flags has FlagURG, and the data. offset is the position of
// the frame's first byte in the stream, counted from the first byte after the
// SYN; control is 0 or ControlRekey.
//
// dst must have room for the frame. src must not overlap dst, except that the
// frame may be sealed in place: then src is dst[FrameHeader:][:len(src)].
//
// One offset may be sealed once only under one key: sealing two plaintexts with
// the same nonce gives both away. It is for the caller to see to that.
//
// Seal panics, since only a programming error leads there, if src is empty or
// longer than MaxPlain, if dst is too short or overlaps src otherwise, or if
// the key was erased.
func (k *Key) Seal(dst, src []byte, control byte, offset uint64) int {
	if len(src) == 0 || len(src) > MaxPlain {
		panic("crypto: Seal of an empty or oversized plaintext value")
	}
	clen := len(src) + TagLen
	dst = dst[:FrameHeader+clen]
	if k.std == nil {
		if !k.vec.Live() {
			panic("crypto: Seal with an erased key")
		}
		if partial(dst[FrameHeader:], src) {
			panic("crypto: Seal of a plaintext value that the frame overlaps")
		}
		dst[0] = control
		binary.BigEndian.PutUint16(dst[1:], uint16(clen))
		k.vec.Seal(k.nonce(offset), frameAAD(control, clen), dst[FrameHeader:], src)
		return len(dst)
	}
	dst[0] = control
	binary.BigEndian.PutUint16(dst[1:], uint16(clen))
	k.std.aead.Seal(dst[FrameHeader:FrameHeader], k.stdNonce(offset), src, dst[:FrameHeader])
	return len(dst)
}

// Open authenticates and decrypts the whole frame in place and returns the
// plaintext value, at least the flags byte, which points into frame. offset is
// the position of the frame's first byte in the stream, as for Seal.
//
// ok is false if the frame is not authentic, if its length is not what clen
// says, if clen is below TagLen+1, or if the key was erased. The ciphertext of
// a frame that is not authentic is lost.
func (k *Key) Open(frame []byte, offset uint64) (plain []byte, ok bool) {
	if len(frame) < FrameHeader+TagLen+1 {
		return nil, false
	}
	ct := frame[FrameHeader:]
	if int(binary.BigEndian.Uint16(frame[1:])) != len(ct) {
		return nil, false
	}
	if k.std == nil {
		if !k.vec.Live() || !k.vec.Open(k.nonce(offset), frameAAD(frame[0], len(ct)), ct) {
			return nil, false
		}
		return ct[:len(ct)-TagLen], true
	}
	plain, err := k.std.aead.Open(ct[:0], k.stdNonce(offset), ct, frame[:FrameHeader])
	return plain, err == nil
}

// fetchBatch is how many keys are fetched into the cache at once. A prefetch is
// not done with before the address is translated, so that one for each operation
// would cost nearly what it saves; many in a row overlap. 64 keys fill half of a
// first-level cache.
const fetchBatch = 64

// SealOp is one frame to seal: the arguments of Key.Seal, and the flags.
type SealOp struct {
	Key     *Key
	Dst     []byte // see Key.Seal
	Src     []byte // plaintext value; SealVec writes Flags to Src[0]
	Flags   byte
	Control byte
	Offset  uint64
}

// SealVec seals frames. The operations run strictly in the order of the slice,
// one after the other, and each writes Flags to Src[0] immediately before it
// seals. Src[0] may therefore be the last byte of the Src of the operation
// before, which is sealed by then: adjacent pieces of one buffer can be sealed
// without copying. It does not allocate and panics as Key.Seal does.
func SealVec(ops []SealOp) {
	for len(ops) > 0 {
		batch := ops[:min(fetchBatch, len(ops))]
		ops = ops[len(batch):]
		var last *Key
		for i := range batch {
			if k := batch[i].Key; k != last {
				k.vec.Fetch()
				last = k
			}
		}
		for i := range batch {
			op := &batch[i]
			op.Src[0] = op.Flags
			op.Key.Seal(op.Dst, op.Src, op.Control, op.Offset)
		}
	}
}

// OpenOp is one frame to open: the arguments and, set by OpenVec, the results
// of Key.Open.
type OpenOp struct {
	Key    *Key
	Frame  []byte
	Offset uint64

	Plain []byte // points into Frame; nil unless OK
	OK    bool
}

// OpenVec opens frames in place, in the order of the slice, and sets Plain and
// OK of each. It does not allocate.
func OpenVec(ops []OpenOp) {
	for len(ops) > 0 {
		batch := ops[:min(fetchBatch, len(ops))]
		ops = ops[len(batch):]
		var last *Key
		for i := range batch {
			if k := batch[i].Key; k != last {
				k.vec.Fetch()
				last = k
			}
		}
		for i := range batch {
			op := &batch[i]
			op.Plain, op.OK = op.Key.Open(op.Frame, op.Offset)
		}
	}
}
