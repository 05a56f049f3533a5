package xdp

// This file uses unsafe for read and writev as raw system calls: they do not
// block, and the scheduler's bookkeeping around a call would cost more than a
// small packet.

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// A TAPQueue is one queue of a TAP device. Its methods may be called by one
// goroutine at a time, and different queues by different ones.
type TAPQueue struct {
	fd  int
	iov [1 + maxPieces]unix.Iovec
}

func newTAPQueue(fd int) *TAPQueue { return &TAPQueue{fd: fd} }

// FD returns the descriptor for poll. It is non-blocking.
func (q *TAPQueue) FD() int { return q.fd }

// Read reads one packet that the kernel hands down, virtio-net header first,
// into buf and returns its length. A buffer of MaxTAPPacket bytes takes every
// packet; what does not fit is cut off. unix.EAGAIN means that there is none.
func (q *TAPQueue) Read(buf []byte) (int, error) {
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(q.fd), uintptr(unsafe.Pointer(unsafe.SliceData(buf))), uintptr(len(buf)))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return 0, errno
		}
		return int(n), nil
	}
}

// Writev hands one packet up to the kernel: hdr is the virtio-net header with
// any number of the packet's first bytes, data the rest in up to 512 pieces.
// The kernel copies the packet before Writev returns; data it does not keep,
// and q keeps the pieces' addresses until the next call only. unix.EAGAIN
// means that the kernel has no memory for it now, unix.EMSGSIZE that there are
// too many pieces.
func (q *TAPQueue) Writev(hdr []byte, data [][]byte) error {
	if len(data) > maxPieces {
		return unix.EMSGSIZE
	}
	q.iov[0].Base = unsafe.SliceData(hdr)
	q.iov[0].SetLen(len(hdr))
	n := 1
	for _, piece := range data {
		if len(piece) == 0 {
			continue
		}
		q.iov[n].Base = unsafe.SliceData(piece)
		q.iov[n].SetLen(len(piece))
		n++
	}
	for {
		_, _, errno := unix.RawSyscall(unix.SYS_WRITEV, uintptr(q.fd), uintptr(unsafe.Pointer(&q.iov)), uintptr(n))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return errno
		}
		return nil
	}
}
