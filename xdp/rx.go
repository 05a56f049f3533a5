package xdp

import "sync/atomic"

// rxRing brings received packets.
//
// The kernel writes descriptors and the producer index; the worker reads the
// descriptors and writes the consumer index. A descriptor and the chunk behind
// it may be read once the producer index covers it: available loads that with
// acquire. The slot may be overwritten once the consumer index has passed it:
// release stores that with release.
type rxRing struct {
	indices
	entries []Desc
	mask    uint32

	produced uint32 // producer index as last seen
	consumed uint32 // our copy of the consumer index, with slots not released
}

func (r *rxRing) available() int {
	if r.produced == r.consumed {
		r.produced = atomic.LoadUint32(r.producer)
	}
	return int(r.produced - r.consumed)
}

func (r *rxRing) pop() Desc {
	d := r.entries[r.consumed&r.mask]
	r.consumed++
	return d
}

func (r *rxRing) release() { atomic.StoreUint32(r.consumer, r.consumed) }
