package fastpath

// This file uses unsafe for the address of memory, see adviseHuge.

import (
	"unsafe"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

const (
	slabSize  = 16 << 10 // holds several frames of any size a segment can carry
	smallSize = 2 << 10  // one frame of a flow that has no other
	bigSize   = 3 + 65535

	// slabGap keeps slabs from beginning at the same place of the cache.
	slabGap = 3 * cacheLine
)

// Where the bytes of a retained frame or a piece of custody live.
const (
	refNone  = iota
	refChunk // an RX chunk of the UMEM, idx is its number
	refSlab  // a slab of the buffers, idx is its index
)

// ref is one counted hold on a buffer.
type ref struct {
	kind uint8
	idx  uint32
}

type slab struct {
	mem  []byte
	used int // bytes handed out from the front
	refs int32
}

// buffers is a worker's memory for what must outlive a packet vector: slabs on
// the heap, and counted holds on RX chunks. Only the worker touches it.
type buffers struct {
	umem      *xdp.Umem
	holds     []uint16 // per chunk
	shift     uint
	held      int // chunks with holds
	maxHeld   int // above this, custody moves to slabs
	mostHeld  int // above this, it does not grow in chunks
	slabs     []slab
	free      []uint32 // slabs of slabSize without refs
	freeBig   []uint32 // slabs of bigSize without refs
	freeSmall []uint32 // slabs of smallSize without refs
	used      int      // bytes of all slabs with refs
	rings     int      // bytes of the storage that flows' queues are lent, or may be
	budget    int      // most bytes of slabs and that storage

	area     []byte // not yet cut
	areaSize int    // of the last area
}

func newBuffers(u *xdp.Umem, budget int) *buffers {
	b := &buffers{umem: u, budget: budget, holds: make([]uint16, u.Chunks())}
	for 1<<b.shift < u.ChunkSize() {
		b.shift++
	}
	b.maxHeld, b.mostHeld = u.Chunks()/2, u.Chunks()/4*3
	return b
}

// room returns how many bytes of the budget are left. It may be negative: the
// storage of queues is not refused to what has its bytes already.
func (b *buffers) room() int { return b.budget - b.used - b.rings }

// tight reports whether so little of the budget is left that it is for what has
// little of it.
func (b *buffers) tight() bool { return b.room() < b.budget/8 }

// short reports whether storage of queues that is not in use has to make room: there
// might not be enough for a single frame.
func (b *buffers) short() bool { return b.tight() || b.room() < 2*bigSize }

// hold counts another user of the chunk that holds addr.
func (b *buffers) hold(addr uint64) ref {
	i := uint32(addr >> b.shift)
	if b.holds[i] == 0 {
		b.held++
	}
	b.holds[i]++
	return ref{refChunk, i}
}

// crowded reports whether too many RX chunks are held to hold another for long.
func (b *buffers) crowded() bool { return b.held > b.maxHeld }

// starved reports whether n more bytes would have to stay in the chunk that they came
// in, of which a part must be left: a gateway's inner hosts cannot acknowledge, and
// so give back, anything without chunks for it to come in.
func (b *buffers) starved(n int) bool {
	return b.held > b.mostHeld && b.room() < slabSize+n
}

// alloc takes n bytes, at most bigSize, from a slab. With cur it continues the
// slab that *cur names (index plus one), so that a flow's bytes lie together; a
// flow that has no other bytes, lone, gets a small slab, and many bytes get one of
// their own. A slab is recycled when all its refs are gone. It fails when the
// budget is used up.
func (b *buffers) alloc(n int, cur *uint32, lone bool) (mem []byte, r ref, off uint32, ok bool) {
	switch {
	case n > slabSize:
		return b.whole(n, &b.freeBig, bigSize)
	case lone && *cur == 0 && n <= smallSize:
		return b.whole(n, &b.freeSmall, smallSize)
	}
	if *cur != 0 {
		if s := &b.slabs[*cur-1]; s.used+n <= slabSize {
			off = uint32(s.used)
			s.used += n
			s.refs++
			return s.mem[off:s.used:s.used], ref{refSlab, *cur - 1}, off, true
		}
		b.leave(cur)
	}
	i, ok := b.take(&b.free, slabSize)
	if !ok {
		return nil, ref{}, 0, false
	}
	s := &b.slabs[i]
	// One ref for the caller's bytes and one for cur, which may hand out more.
	s.used, s.refs = n, 2
	*cur = i + 1
	return s.mem[:n:n], ref{refSlab, i}, 0, true
}

// whole takes n bytes from a slab that is for them alone.
func (b *buffers) whole(n int, list *[]uint32, size int) (mem []byte, r ref, off uint32, ok bool) {
	i, ok := b.take(list, size)
	if !ok {
		return nil, ref{}, 0, false
	}
	s := &b.slabs[i]
	s.used, s.refs = size, 1
	return s.mem[:n:n], ref{refSlab, i}, 0, true
}

// leave gives up cur's own hold on its slab.
func (b *buffers) leave(cur *uint32) {
	if *cur != 0 {
		r := ref{refSlab, *cur - 1}
		*cur = 0
		b.release(r)
	}
}

func (b *buffers) take(list *[]uint32, size int) (uint32, bool) {
	if size > b.room() {
		return 0, false
	}
	b.used += size
	if n := len(*list); n > 0 {
		i := (*list)[n-1]
		*list = (*list)[:n-1]
		return i, true
	}
	b.slabs = append(b.slabs, slab{mem: b.grow(size)})
	return uint32(len(b.slabs) - 1), true
}

// grow returns memory of the given size, from areas as flowPool has them.
func (b *buffers) grow(size int) []byte {
	if len(b.area) < size+slabGap {
		b.areaSize = min(max(2*b.areaSize, 8*slabSize), maxArea)
		b.area = make([]byte, b.areaSize)
		adviseHuge(unsafe.Pointer(unsafe.SliceData(b.area)), b.areaSize)
	}
	mem := b.area[:size:size]
	b.area = b.area[size+slabGap:]
	return mem
}

// release ends one hold.
func (b *buffers) release(r ref) {
	switch r.kind {
	case refChunk:
		b.holds[r.idx]--
		if b.holds[r.idx] == 0 {
			b.held--
			b.umem.Free(uint64(r.idx) << b.shift)
		}
	case refSlab:
		s := &b.slabs[r.idx]
		s.refs--
		if s.refs == 0 {
			b.used -= len(s.mem)
			switch len(s.mem) {
			case slabSize:
				b.free = append(b.free, r.idx)
			case smallSize:
				b.freeSmall = append(b.freeSmall, r.idx)
			default:
				b.freeBig = append(b.freeBig, r.idx)
			}
		}
	}
}

// bytes returns n bytes at off of what r holds.
func (b *buffers) bytes(r ref, off uint32, n int) []byte {
	if r.kind == refChunk {
		return b.umem.Bytes(uint64(r.idx)<<b.shift+uint64(off), n)
	}
	if r.kind == refNone {
		return nil
	}
	return b.slabs[r.idx].mem[off : int(off)+n]
}
