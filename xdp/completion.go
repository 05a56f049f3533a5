package xdp

import "sync/atomic"

// completionRing brings transmitted chunks back.
//
// The kernel writes entries and the producer index; the worker reads the
// entries and writes the consumer index. An entry may be read once the
// producer index covers it, and may be overwritten once the consumer index has
// passed it: available loads the producer index with acquire, release stores
// the consumer index with release.
type completionRing struct {
	indices
	entries []uint64
	mask    uint32

	produced uint32 // producer index as last seen
	consumed uint32 // our copy of the consumer index, with entries not released
}

func (r *completionRing) available() int {
	if r.produced == r.consumed {
		r.produced = atomic.LoadUint32(r.producer)
	}
	return int(r.produced - r.consumed)
}

func (r *completionRing) pop() uint64 {
	addr := r.entries[r.consumed&r.mask]
	r.consumed++
	return addr
}

func (r *completionRing) release() { atomic.StoreUint32(r.consumer, r.consumed) }
