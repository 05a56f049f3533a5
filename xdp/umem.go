package xdp

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Headroom is the offset in a chunk, in bytes, of received data
// (XDP_PACKET_HEADROOM). Frames to transmit are best written there too: the
// space before it takes the TX metadata and headers that grow.
const Headroom = unix.XDP_PACKET_HEADROOM

// slack is readable memory kept behind the last chunk, so that vector code may
// load past the end of a frame without a fault.
const slack = 4096

const hugePageSize = 2 << 20

// UmemConfig sizes a Umem.
type UmemConfig struct {
	Chunks    int // number of chunks, at least 1
	ChunkSize int // bytes: 2048 or 4096; a chunk holds ChunkSize-Headroom received bytes

	// TXMetadata reserves the bytes before each transmitted frame for
	// checksum requests. Where the kernel cannot do it (before Linux 6.11)
	// Socket.ChecksumOffload says so.
	TXMetadata bool

	// HugePages asks for 2 MiB pages: reserved ones if there are enough, else
	// transparent ones. It is a wish; Umem.HugePages tells the outcome.
	HugePages bool
}

// A Umem is the packet memory that one worker and its sockets share, cut into
// chunks of equal size. A chunk has one owner at any time: the pool, the
// worker, or one of the rings of a socket; a retained chunk in a TX ring may
// also be read by the worker. All methods may be called only by the worker that
// owns the Umem.
type Umem struct {
	mem    []byte // chunks and slack
	size   int    // bytes of all chunks
	chunk  uint64 // bytes of one
	shift  uint
	mask   uint64 // chunk - 1
	config UmemConfig
	huge   bool

	free []uint64 // LIFO of chunk addresses, valid up to top
	top  int

	// holder tells for every chunk which ring of which socket has it, so that
	// a closed socket's chunks can be found; see socket.hold.
	holder []uint16

	// retained tells which chunks the worker goes on to read while a ring has
	// them, and after it.
	retained []uint8

	sockets    []*Socket // by their id; nil where closed
	quarantine map[deviceQueue][]uint64
	txMetadata bool // as the kernel granted it

	debug umemDebug
}

type deviceQueue struct{ ifindex, queue int }

// NewUmem maps the memory and puts all chunks into the pool. It needs no
// privilege; only binding a socket does.
func NewUmem(cfg UmemConfig) (*Umem, error) {
	if cfg.ChunkSize != 2048 && cfg.ChunkSize != 4096 {
		return nil, fmt.Errorf("xdp: UMEM chunk size %d: must be 2048 or 4096", cfg.ChunkSize)
	}
	if cfg.Chunks < 1 || cfg.Chunks > 1<<22 {
		return nil, fmt.Errorf("xdp: UMEM of %d chunks: must be 1 to %d", cfg.Chunks, 1<<22)
	}
	u := &Umem{
		size:       cfg.Chunks * cfg.ChunkSize,
		chunk:      uint64(cfg.ChunkSize),
		mask:       uint64(cfg.ChunkSize - 1),
		config:     cfg,
		free:       make([]uint64, cfg.Chunks),
		holder:     make([]uint16, cfg.Chunks),
		retained:   make([]uint8, cfg.Chunks),
		quarantine: make(map[deviceQueue][]uint64),
	}
	for 1<<u.shift < cfg.ChunkSize {
		u.shift++
	}
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	var err error
	if cfg.HugePages {
		n := (u.size + slack + hugePageSize - 1) &^ (hugePageSize - 1)
		if u.mem, err = unix.Mmap(-1, 0, n, prot, flags|unix.MAP_HUGETLB); err == nil {
			u.huge = true
		}
	}
	if u.mem == nil {
		if u.mem, err = unix.Mmap(-1, 0, u.size+slack, prot, flags); err != nil {
			return nil, fmt.Errorf("xdp: map %d bytes of packet memory: %w", u.size, err)
		}
		if cfg.HugePages {
			u.huge = unix.Madvise(u.mem, unix.MADV_HUGEPAGE) == nil
		}
	}
	// The lowest address is on top: a lightly loaded worker stays in few pages.
	for i := range u.free {
		u.free[i] = uint64(cfg.Chunks-1-i) << u.shift
	}
	u.top = cfg.Chunks
	u.debug.init(cfg.Chunks)
	return u, nil
}

// Alloc takes a chunk out of the pool and gives its first address to the
// caller. ok is false when the pool is empty.
func (u *Umem) Alloc() (addr uint64, ok bool) {
	if u.top == 0 {
		return 0, false
	}
	u.top--
	addr = u.free[u.top]
	u.debug.move(addr>>u.shift, ownerPool, ownerWorker)
	return addr, true
}

// Free puts the caller's chunk that contains addr back into the pool. One that
// was retained gets there when it was transmitted or discarded.
func (u *Umem) Free(addr uint64) {
	chunk := addr >> u.shift
	state := u.retained[chunk]
	u.retained[chunk] = state &^ stateRetained
	if state&stateQueued != 0 || state != 0 && u.holder[chunk]&holderTX != 0 {
		return
	}
	u.debug.move(chunk, ownerWorker, ownerPool)
	u.put(addr)
}

// States of a chunk that the worker goes on to read while it is transmitted.
const (
	stateRetained = 1 << iota // Free was not called yet
	stateQueued               // neither Transmit nor Discard was called yet
)

// Retain announces that the caller's chunk that contains addr is to be
// transmitted, and that the caller goes on to read it until it calls Free. It
// must not be written until Sending is false.
func (u *Umem) Retain(addr uint64) { u.retained[addr>>u.shift] = stateRetained | stateQueued }

// Sending reports whether the chunk that contains addr is retained and not yet
// transmitted.
func (u *Umem) Sending(addr uint64) bool {
	chunk := addr >> u.shift
	return u.retained[chunk]&stateQueued != 0 || u.holder[chunk]&holderTX != 0
}

// Discard takes a chunk that was to be transmitted and is not: it goes to the
// pool, unless it is retained.
func (u *Umem) Discard(addr uint64) {
	chunk := addr >> u.shift
	u.retained[chunk] &^= stateQueued
	if u.retained[chunk] == 0 {
		u.Free(addr)
	}
}

func (u *Umem) put(addr uint64) {
	u.free[u.top] = addr &^ u.mask
	u.top++
}

// Available returns the number of chunks in the pool.
func (u *Umem) Available() int { return u.top }

// Chunks returns the number of chunks of the Umem.
func (u *Umem) Chunks() int { return u.config.Chunks }

// ChunkSize returns the bytes of a chunk.
func (u *Umem) ChunkSize() int { return int(u.chunk) }

// HugePages reports whether the memory was asked to be on huge pages with
// success.
func (u *Umem) HugePages() bool { return u.huge }

// Bytes returns the n bytes from addr; its capacity ends with the chunk. The
// slice is valid until the chunk changes owner. A range that is not inside one
// chunk is a bug of the caller and panics.
func (u *Umem) Bytes(addr uint64, n int) []byte {
	return u.mem[addr : addr+uint64(n) : addr|u.mask+1]
}

// Close unmaps the memory; all slices of it die. The sockets must be closed
// before.
func (u *Umem) Close() error {
	for _, s := range u.sockets {
		if s != nil {
			return fmt.Errorf("xdp: UMEM closed with the socket of queue %d open", s.config.Queue)
		}
	}
	if u.mem == nil {
		return nil
	}
	mem := u.mem
	u.mem, u.free, u.top = nil, nil, 0
	if err := unix.Munmap(mem); err != nil {
		return fmt.Errorf("xdp: unmap packet memory: %w", err)
	}
	return nil
}
