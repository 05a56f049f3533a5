package xdp

import "sync/atomic"

// fillRing gives empty chunks to the kernel.
//
// The worker writes entries and the producer index; the kernel reads the
// entries and writes the consumer index and, when it needs to be told of new
// entries, the flags. An entry may be written only while it is behind the
// consumer index by less than the ring's size, and must be visible before the
// producer index that covers it: room loads the consumer index with acquire,
// submit stores the producer index with release.
type fillRing struct {
	indices
	entries []uint64
	mask    uint32

	produced uint32 // our copy of the producer index, with entries not submitted
	consumed uint32 // consumer index as last seen
}

// room returns how many of want entries can be written.
func (r *fillRing) room(want int) int {
	size := uint32(len(r.entries))
	free := size - (r.produced - r.consumed)
	if int(free) < want {
		r.consumed = atomic.LoadUint32(r.consumer)
		free = size - (r.produced - r.consumed)
	}
	return min(want, int(free))
}

func (r *fillRing) push(addr uint64) {
	r.entries[r.produced&r.mask] = addr
	r.produced++
}

func (r *fillRing) submit() { atomic.StoreUint32(r.producer, r.produced) }
