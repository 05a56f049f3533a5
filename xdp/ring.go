package xdp

// This file maps the rings and uses unsafe: the kernel shares them as raw
// memory whose layout XDP_MMAP_OFFSETS tells. The four ring types in fill.go,
// completion.go, rx.go and tx.go work on the slices and indices made here.

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Desc is one descriptor of an RX or TX ring (struct xdp_desc).
type Desc struct {
	Addr    uint64 // first byte of the data, an offset into the UMEM
	Len     uint32 // bytes from Addr
	Options uint32 // XDP_PKT_CONTD: the packet goes on in the next descriptor; XDP_TX_METADATA
}

// Bits of Desc.Options.
const (
	OptionContinued  = unix.XDP_PKT_CONTD   // the packet goes on in the next descriptor
	OptionTXMetadata = unix.XDP_TX_METADATA // set by Socket.RequestChecksum
)

// indices are the shared words of a ring. They run freely modulo 2^32; their
// difference is the fill level.
type indices struct {
	producer *uint32
	consumer *uint32
	flags    *uint32
	mem      []byte
}

func (i *indices) needWakeup() bool {
	return atomic.LoadUint32(i.flags)&unix.XDP_RING_NEED_WAKEUP != 0
}

// emptyRing returns the indices of a ring without entries: what a socket has
// before it is mapped and after it was closed, so that its methods find nothing
// to do.
func emptyRing() indices {
	words := new([3]uint32)
	return indices{producer: &words[0], consumer: &words[1], flags: &words[2]}
}

func (i *indices) unmap() error {
	mem := i.mem
	*i = emptyRing()
	if mem == nil {
		return nil
	}
	return unix.Munmap(mem)
}

// mapRing maps one ring of size entries of type T.
func mapRing[T any](fd int, page int64, off unix.XDPRingOffset, size int) (indices, []T, error) {
	var entry T
	n := int(off.Desc) + size*int(unsafe.Sizeof(entry))
	mem, err := unix.Mmap(fd, page, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return indices{}, nil, fmt.Errorf("map ring: %w", err)
	}
	base := unsafe.Pointer(unsafe.SliceData(mem))
	return indices{
		producer: (*uint32)(unsafe.Add(base, off.Producer)),
		consumer: (*uint32)(unsafe.Add(base, off.Consumer)),
		flags:    (*uint32)(unsafe.Add(base, off.Flags)),
		mem:      mem,
	}, unsafe.Slice((*T)(unsafe.Add(base, off.Desc)), size), nil
}

func setsockopt[T any](fd, option int, value *T) error {
	_, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_XDP, uintptr(option),
		uintptr(unsafe.Pointer(value)), unsafe.Sizeof(*value), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func getsockopt[T any](fd, level, option int, value *T) error {
	size := uint32(unsafe.Sizeof(*value))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(value)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// registerUmem makes fd the socket through which the kernel learns of u.
func registerUmem(fd int, u *Umem, flags, txMetadataLen uint32) error {
	return setsockopt(fd, unix.XDP_UMEM_REG, &unix.XDPUmemReg{
		Addr:            uint64(uintptr(unsafe.Pointer(unsafe.SliceData(u.mem)))),
		Len:             uint64(u.size),
		Size:            uint32(u.chunk),
		Flags:           flags,
		Tx_metadata_len: txMetadataLen,
	})
}

// wakeTX is sendto without data: the kernel looks at the TX ring. A raw system
// call, as the worker's thread is its own and the call does not sleep.
func wakeTX(fd int) unix.Errno {
	_, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), 0, 0, unix.MSG_DONTWAIT, 0, 0)
	return errno
}

// wakeRX is recvfrom without data: the driver looks at the fill ring.
func wakeRX(fd int) unix.Errno {
	_, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), 0, 0, unix.MSG_DONTWAIT, 0, 0)
	return errno
}
