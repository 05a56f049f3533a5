package xdp

import "sync/atomic"

// txRing takes packets to transmit.
//
// The worker writes descriptors and the producer index; the kernel reads the
// descriptors and writes the consumer index and, when it needs to be woken,
// the flags. A descriptor and the bytes of its chunk must be visible before
// the producer index that covers it: submit stores that with release. The slot
// may be written again once the consumer index has passed it, which room loads
// with acquire; the chunk only when the completion ring has brought it back.
//
// The worker stores the producer index and then loads the flags, the kernel
// sets the flags and then loads the producer index: one of them must see the
// other's store. Go's atomics are sequentially consistent and give the full
// barrier this takes.
type txRing struct {
	indices
	entries []Desc
	mask    uint32

	produced uint32 // our copy of the producer index, with slots not submitted
	consumed uint32 // consumer index as last seen
}

// room returns how many of want descriptors can be written.
func (r *txRing) room(want int) int {
	size := uint32(len(r.entries))
	free := size - (r.produced - r.consumed)
	if int(free) < want {
		r.consumed = atomic.LoadUint32(r.consumer)
		free = size - (r.produced - r.consumed)
	}
	return min(want, int(free))
}

func (r *txRing) push(d Desc) {
	r.entries[r.produced&r.mask] = d
	r.produced++
}

func (r *txRing) submit() { atomic.StoreUint32(r.producer, r.produced) }

// unread returns the number of descriptors that the kernel has not taken.
func (r *txRing) unread() int {
	r.consumed = atomic.LoadUint32(r.consumer)
	return int(r.produced - r.consumed)
}
