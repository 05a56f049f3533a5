package fastpath

// This file uses unsafe for addresses, which it only gives to the cache.

import "unsafe"

const cacheLine = 64

// hotBytes is how much of a flow packets in order need.
const hotBytes = unsafe.Offsetof(flow{}.asmRef)

// prefetch has the cache fetch what packets in order need of a flow.
func (f *flow) prefetch() {
	prefetch(unsafe.Pointer(f), (int(hotBytes)+cacheLine-1)/cacheLine)
}
