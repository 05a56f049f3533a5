package packet

import (
	"encoding/binary"
	"math/bits"
)

// Sum adds the one's complement sum of b (RFC 1071), in little-endian words,
// to an unfolded start value. b may have any length; when sums of several
// pieces are chained, all but the last must have even length.
func Sum(b []byte, start uint64) uint64 {
	var c uint64
	if len(b) >= vectorMin && hasWide {
		start, c = bits.Add64(start, sumWide(&b[0], len(b)), 0)
		return start + c
	}
	if len(b) >= vectorMin && hasVector {
		n := len(b) &^ 31
		start, c = bits.Add64(start, sumVector(&b[0], n), 0)
		start += c
		b = b[n:]
	}
	return sumWords(b, start)
}

// CopySum copies src to dst, which must be as long or longer and must not overlap it, and
// returns what Sum does for src: both in one pass over the memory.
func CopySum(dst, src []byte, start uint64) uint64 {
	dst = dst[:len(src):len(src)]
	if len(src) >= vectorMin && hasWide {
		s, c := bits.Add64(start, copySumWide(&dst[0], &src[0], len(src)), 0)
		return s + c
	}
	if len(src) >= vectorMin && hasVector {
		n := len(src) &^ 31
		s, c := bits.Add64(start, copySumVector(&dst[0], &src[0], n), 0)
		start = s + c
		dst, src = dst[n:], src[n:]
	}
	copy(dst, src)
	return sumWords(src, start)
}

// SumAt makes of the sum of a piece that begins at the given offset what is to be
// added for it.
func SumAt(sum uint64, offset int) uint64 {
	if offset&1 == 0 {
		return sum
	}
	return uint64(bits.ReverseBytes16(Fold(sum)))
}

// sumWords is Sum, 8 bytes at a time.
func sumWords(b []byte, a uint64) uint64 {
	var c uint64
	for len(b) >= 64 {
		a, c = bits.Add64(a, binary.LittleEndian.Uint64(b), 0)
		a, c = bits.Add64(a, binary.LittleEndian.Uint64(b[8:]), c)
		a, c = bits.Add64(a, binary.LittleEndian.Uint64(b[16:]), c)
		a, c = bits.Add64(a, binary.LittleEndian.Uint64(b[24:]), c)
		a, c = bits.Add64(a, binary.LittleEndian.Uint64(b[32:]), c)
		a, c = bits.Add64(a, binary.LittleEndian.Uint64(b[40:]), c)
		a, c = bits.Add64(a, binary.LittleEndian.Uint64(b[48:]), c)
		a, c = bits.Add64(a, binary.LittleEndian.Uint64(b[56:]), c)
		a, c = bits.Add64(a, 0, c)
		a += c
		b = b[64:]
	}
	// What is left is too little for the sum of 32-bit words to overflow.
	var t uint64
	for len(b) >= 8 {
		w := binary.LittleEndian.Uint64(b)
		t += w>>32 + w&0xffffffff
		b = b[8:]
	}
	if len(b) >= 4 {
		t += uint64(binary.LittleEndian.Uint32(b))
		b = b[4:]
	}
	if len(b) >= 2 {
		t += uint64(binary.LittleEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) > 0 {
		t += uint64(b[0])
	}
	a, c = bits.Add64(a, t, 0)
	return a + c
}

// Fold reduces a sum to 16 bits, to be stored as a little-endian word.
func Fold(a uint64) uint16 {
	a = a>>32 + a&0xffffffff
	a = a>>32 + a&0xffffffff
	a = a>>16 + a&0xffff
	a = a>>16 + a&0xffff
	a = a>>16 + a&0xffff
	return uint16(a)
}
