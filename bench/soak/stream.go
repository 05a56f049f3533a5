package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// magic begins every block of a stream; the watch looks for it on the wire.
const magic = 0x7463_7263_736f_616b // "tcrcsoak"

const blockSize = 64

// stream is the endless content of one direction of one connection: blocks of
// the magic, the connection's number, the direction, the block's number and what
// follows from these. Every byte is a function of its offset.
type stream struct {
	id   uint64
	back bool // from the server to the client
}

func (s stream) block(b []byte, n uint64) {
	binary.BigEndian.PutUint64(b[0:], magic)
	binary.BigEndian.PutUint64(b[8:], s.id)
	x := n << 1
	if s.back {
		x |= 1
	}
	binary.BigEndian.PutUint64(b[16:], x)
	x ^= s.id << 20
	for i := 24; i < blockSize; i += 8 {
		// A step of SplitMix64.
		x += 0x9e3779b97f4a7c15
		z := (x ^ x>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		binary.BigEndian.PutUint64(b[i:], z^z>>31)
	}
}

// fill writes the stream's bytes from offset off on into b.
func (s stream) fill(b []byte, off int64) {
	var block [blockSize]byte
	for len(b) > 0 {
		at := int(off % blockSize)
		if at == 0 && len(b) >= blockSize {
			s.block(b, uint64(off/blockSize))
			b, off = b[blockSize:], off+blockSize
			continue
		}
		s.block(block[:], uint64(off/blockSize))
		n := copy(b, block[at:])
		b, off = b[n:], off+int64(n)
	}
}

// check compares got with the stream's bytes from offset off on, with scratch
// of at least its length.
func (s stream) check(got, scratch []byte, off int64) error {
	want := scratch[:len(got)]
	s.fill(want, off)
	if bytes.Equal(got, want) {
		return nil
	}
	for i := range got {
		if got[i] != want[i] {
			return fmt.Errorf("%w at offset %d", errCorrupt, off+int64(i))
		}
	}
	return nil
}
