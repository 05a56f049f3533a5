package crypto

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"

	"golang.org/x/crypto/chacha20poly1305"
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

// EngineName names the AEAD implementation in use, for status output.
func EngineName() string { return "std" }

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
type Key struct {
	aead cipher.AEAD // nil once erased
	rand uint64      // the last eight bytes of the nonce randomizer

	// nonce is scratch space that begins with the first four bytes of the
	// randomizer. On the stack it would escape through cipher.AEAD.
	nonce [nonceLen]byte
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
	return &Key{
		aead:  newAEAD(a, key),
		rand:  binary.BigEndian.Uint64(randomizer[4:]),
		nonce: randomizer,
	}
}

func (k *Key) erase() { *k = Key{} }

// setNonce makes the nonce of the frame at offset: the frame ID, which is the
// offset padded with zeros on the left, XOR the randomizer (RFC 8548 sections
// 3.6 and 4.2.3).
func (k *Key) setNonce(offset uint64) {
	binary.BigEndian.PutUint64(k.nonce[4:], k.rand^offset)
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
	if k.aead == nil {
		panic("crypto: Seal with an erased key")
	}
	clen := len(src) + TagLen
	dst = dst[:FrameHeader+clen]
	dst[0] = control
	binary.BigEndian.PutUint16(dst[1:], uint16(clen))
	k.setNonce(offset)
	k.aead.Seal(dst[FrameHeader:FrameHeader], k.nonce[:], src, dst[:FrameHeader])
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
	if len(frame) < FrameHeader+TagLen+1 || k.aead == nil {
		return nil, false
	}
	if int(binary.BigEndian.Uint16(frame[1:])) != len(frame)-FrameHeader {
		return nil, false
	}
	k.setNonce(offset)
	ct := frame[FrameHeader:]
	plain, err := k.aead.Open(ct[:0], k.nonce[:], ct, frame[:FrameHeader])
	return plain, err == nil
}

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
	for i := range ops {
		op := &ops[i]
		op.Src[0] = op.Flags
		op.Key.Seal(op.Dst, op.Src, op.Control, op.Offset)
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
	for i := range ops {
		op := &ops[i]
		op.Plain, op.OK = op.Key.Open(op.Frame, op.Offset)
	}
}
