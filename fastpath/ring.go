package fastpath

// This file uses unsafe for the size of an element.

import (
	"math/bits"
	"slices"
	"time"
	"unsafe"
)

const (
	ringMin     = 8  // elements of the smallest storage, a power of two
	ringClasses = 12 // sizes of storage that a pool keeps, each twice the one before
	ringSpare   = 64 // storages of a size that a pool keeps in any case

	// trimInterval is over how long the use of a pool is watched.
	trimInterval = time.Second
	// trimFloor is how many bytes of storage an engine that has nothing else to
	// do does not wake up for.
	trimFloor = 1 << 20
)

// ring is a growable double-ended queue. Its storage is borrowed from a pool
// while it holds something, so that idle flows stay small, and busy ones use the
// same few cache lines in turn.
type ring[T any] struct {
	b    []T // length a power of two, or nil
	head uint32
	n    uint32
}

// ringPool is storage for the rings of one engine. It keeps what it has once made
// for the next ring, as far as about so much was in use lately, except for the
// largest sizes, which few flows need. T must not hold pointers: storage is not
// cleared.
type ringPool[T any] struct {
	sizes [ringClasses]ringStock[T] // by the binary logarithm of length/ringMin
	bytes *int                      // counts all storage that there is, lent or not; nil: not counted
}

// ringStock is the storage of one size in a pool.
type ringStock[T any] struct {
	free [][]T
	made int // free or lent
	low  int // the fewest that were free since the last trim
}

// class returns the index of storage of n elements in a pool, which is
// ringClasses or more for sizes that a pool does not keep.
func class(n int) int { return bits.Len(uint(n/ringMin)) - 1 }

// count adds n storages of size elements to the bytes that there are.
func (p *ringPool[T]) count(n, size int) {
	if p.bytes != nil {
		var t T
		*p.bytes += n * size * int(unsafe.Sizeof(t))
	}
}

// take returns storage for n elements, a power of two not below ringMin. A nil
// pool has none and always makes some.
func (p *ringPool[T]) take(n int) []T {
	if p == nil {
		return make([]T, n)
	}
	c := class(n)
	if c >= ringClasses {
		p.count(1, n)
		return make([]T, n)
	}
	s := &p.sizes[c]
	i := len(s.free) - 1
	if i < 0 {
		p.count(1, n)
		s.made++
		// Room to take back all there are.
		s.free = slices.Grow(s.free, s.made)
		return make([]T, n)
	}
	b := s.free[i]
	s.free = s.free[:i]
	s.low = min(s.low, i)
	return b
}

// give takes storage back.
func (p *ringPool[T]) give(b []T) {
	if p == nil || len(b) == 0 {
		return
	}
	c := class(len(b))
	if c >= ringClasses {
		p.count(-1, len(b))
		return
	}
	s := &p.sizes[c]
	s.free = append(s.free, b)
}

// trim lets go of storage if there is much more than was lent at once since the
// last trim. What it leaves is twice that, so that a steady load makes none anew,
// or nothing that is not lent, where memory is short.
func (p *ringPool[T]) trim(short bool) {
	for c := range p.sizes {
		s := &p.sizes[c]
		peak := s.made - s.low
		surplus := s.made - 2*peak - ringSpare
		if short {
			surplus = len(s.free)
		}
		if surplus > 0 {
			// Not more than are free, as that is not less than low.
			p.count(-surplus, ringMin<<c)
			s.made -= surplus
			s.free = append(make([][]T, 0, s.made), s.free[:len(s.free)-surplus]...)
		}
		s.low = len(s.free)
	}
}

func (r *ring[T]) len() int { return int(r.n) }

// at returns element i, counted from the front.
func (r *ring[T]) at(i int) *T { return &r.b[(int(r.head)+i)&(len(r.b)-1)] }

// push appends an element, whose content is undefined, and returns it; the
// pointer is valid until the next push.
func (r *ring[T]) push(p *ringPool[T]) *T {
	if int(r.n) == len(r.b) {
		r.grow(p)
	}
	r.n++
	return r.at(int(r.n) - 1)
}

func (r *ring[T]) grow(p *ringPool[T]) {
	b := p.take(max(ringMin, 2*len(r.b)))
	k := copy(b, r.b[r.head:])
	copy(b[k:], r.b[:r.head])
	p.give(r.b)
	r.b, r.head = b, 0
}

// pop removes the front element. A ring that runs empty gives its storage back.
func (r *ring[T]) pop(p *ringPool[T]) {
	r.head = (r.head + 1) & uint32(len(r.b)-1)
	r.n--
	if r.n == 0 {
		r.clear(p)
	}
}

// clear removes all elements.
func (r *ring[T]) clear(p *ringPool[T]) {
	p.give(r.b)
	*r = ring[T]{}
}
