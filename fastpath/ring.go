package fastpath

import (
	"math/bits"
	"slices"
)

const (
	ringMin     = 8       // elements of the smallest storage, a power of two
	ringClasses = 12      // sizes of storage that a pool keeps, each twice the one before
	ringCut     = 1 << 10 // elements that a pool cuts small storage from
)

// ring is a growable double-ended queue. Its storage is borrowed from a pool
// while it holds something, so that idle flows stay small, and busy ones use the
// same few cache lines in turn.
type ring[T any] struct {
	b    []T // length a power of two, or nil
	head uint32
	n    uint32
}

// ringPool is storage for the rings of one engine. What it has once got it keeps
// for the next ring, except for the largest sizes, which few flows need. T must
// not hold pointers: storage is not cleared.
type ringPool[T any] struct {
	free [ringClasses][][]T // by the binary logarithm of length/ringMin
	made [ringClasses]int   // storages of a size, free or not
}

// class returns the index of storage of n elements in a pool, which is
// ringClasses or more for sizes that a pool does not keep.
func class(n int) int { return bits.Len(uint(n/ringMin)) - 1 }

// take returns storage for n elements, a power of two not below ringMin. A nil
// pool has none and always makes some.
func (p *ringPool[T]) take(n int) []T {
	c := class(n)
	if p == nil || c >= ringClasses {
		return make([]T, n)
	}
	if len(p.free[c]) == 0 {
		k := max(1, ringCut/n)
		area := make([]T, k*n)
		p.made[c] += k
		// Room to take back all there are.
		p.free[c] = slices.Grow(p.free[c], p.made[c])
		for range k {
			p.free[c] = append(p.free[c], area[:n:n])
			area = area[n:]
		}
	}
	i := len(p.free[c]) - 1
	b := p.free[c][i]
	p.free[c] = p.free[c][:i]
	return b
}

// give takes storage back.
func (p *ringPool[T]) give(b []T) {
	if c := class(len(b)); p != nil && len(b) != 0 && c < ringClasses {
		p.free[c] = append(p.free[c], b)
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
