package fastpath

// This file uses unsafe to advise the kernel about the pages of its memory.

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	hugePage  = 2 << 20
	firstArea = 64 << 10 // bytes of a pool's first area; each further one is twice as large
	maxArea   = 8 << 20
)

// flowPool is memory for flows, in areas on huge pages where there are any: what
// a packet of a flow costs that others have driven out of the cache is to no
// small part finding out where its pages are.
type flowPool struct {
	area    []flow
	free    []*flow
	retired []*flow // not free before recycle, as a vector may still point there
	size    int
}

// get returns a flow whose memory nobody uses. Its content is undefined.
func (p *flowPool) get() *flow {
	if n := len(p.free); n > 0 {
		f := p.free[n-1]
		p.free = p.free[:n-1]
		return f
	}
	if len(p.area) == 0 {
		p.size = min(max(2*p.size, firstArea), maxArea)
		p.area = make([]flow, p.size/int(unsafe.Sizeof(flow{})))
		adviseHuge(unsafe.Pointer(unsafe.SliceData(p.area)), p.size)
	}
	f := &p.area[0]
	p.area = p.area[1:]
	return f
}

// retire takes a flow back that is in no table any more.
func (p *flowPool) retire(f *flow) { p.retired = append(p.retired, f) }

// recycle lets the flows that were retired be used again. Nothing may point to
// them.
func (p *flowPool) recycle() {
	if len(p.retired) == 0 {
		return
	}
	for i, f := range p.retired {
		*f = flow{state: flowFree, gone: true}
		p.free = append(p.free, f)
		p.retired[i] = nil
	}
	p.retired = p.retired[:0]
}

// adviseHuge asks for huge pages for the whole ones of n bytes from p.
func adviseHuge(p unsafe.Pointer, n int) {
	from := (uintptr(p) + hugePage - 1) &^ (hugePage - 1)
	to := (uintptr(p) + uintptr(n)) &^ (hugePage - 1)
	if from < to {
		// Where there are none, small pages do.
		_ = unix.Madvise(unsafe.Slice((*byte)(unsafe.Add(p, from-uintptr(p))), to-from), unix.MADV_HUGEPAGE)
	}
}
