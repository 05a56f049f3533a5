package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe" // for the message vectors of recvmmsg and sendmmsg, which x/sys lacks

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
)

const (
	batchSize = 64
	// slotSize holds the largest packet that segmentation offload makes, and
	// headroom for a VLAN tag.
	slotSize = frame.VLANLen + frame.EthLen + 65535 + 64
	// recvBuffer bounds what the kernel queues, in bytes of its own
	// accounting: a few of the largest TCP windows.
	recvBuffer = 32 << 20
	ctlSize    = 64
)

// mmsghdr is struct mmsghdr.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// PacketSocket is an AF_PACKET socket that sends and receives whole Ethernet
// frames of one interface. One goroutine may receive and one may send at the
// same time.
type PacketSocket struct {
	file   *os.File
	raw    syscall.RawConn
	closed atomic.Bool
	tx     []mmsghdr
	txv    []unix.Iovec
	// rx is made by the first Receive: a socket that only sends needs none.
	rx *rxBatch
}

type rxBatch struct {
	slots    [][]byte
	ctl      [batchSize][ctlSize]byte
	iov      [batchSize]unix.Iovec
	hdr      [batchSize]mmsghdr
	frames   [][]byte
	deadline bool
}

// OpenPacket opens a packet socket on the interface. It receives every frame
// that the interface takes in, for whatever destination, and none that goes
// out.
func (i *Iface) OpenPacket() (*PacketSocket, error) {
	var s *PacketSocket
	err := i.NS.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		file := os.NewFile(uintptr(fd), "packet:"+i.Name)
		raw, err := file.SyscallConn()
		if err == nil {
			err = errors.Join(
				unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
				unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
				unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, recvBuffer),
				unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, recvBuffer),
				// Protocol 0 at creation received nothing; from here on all do.
				unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: i.Index}),
			)
		}
		if err != nil {
			_ = file.Close()
			return err
		}
		s = &PacketSocket{file: file, raw: raw}
		return nil
	})
	return s, i.wrap("packet socket", err)
}

func htons(v uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v))
}

// Close closes the socket and ends pending calls with os.ErrClosed.
func (s *PacketSocket) Close() error {
	s.closed.Store(true)
	return s.file.Close()
}

// rawError translates an error of the raw connection, whose own error for a
// closed file is hidden inside the runtime's packages.
func (s *PacketSocket) rawError(err error) error {
	if err != nil && s.closed.Load() {
		return os.ErrClosed
	}
	return err
}

// Drops returns how many frames the kernel dropped, since the last call, because
// they were not received fast enough.
func (s *PacketSocket) Drops() (n int, err error) {
	cerr := s.raw.Control(func(fd uintptr) {
		var st *unix.TpacketStats
		if st, err = unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			n = int(st.Drops)
		}
	})
	return n, errors.Join(cerr, err)
}

func newRxBatch() *rxBatch {
	r := &rxBatch{}
	for i := range r.hdr {
		b := make([]byte, slotSize)
		r.slots = append(r.slots, b)
		r.iov[i].Base = &b[frame.VLANLen]
		r.iov[i].SetLen(slotSize - frame.VLANLen)
		h := &r.hdr[i].hdr
		h.Iov = &r.iov[i]
		h.SetIovlen(1)
		h.Control = &r.ctl[i][0]
	}
	return r
}

// Receive waits for frames until the deadline (the zero time: forever) and
// returns up to 64 of them, as they were on the wire: VLAN tags in place and
// checksums that the sender left to offload completed. The frames stay valid
// until the next call. After the deadline the error is os.ErrDeadlineExceeded.
func (s *PacketSocket) Receive(deadline time.Time) ([][]byte, error) {
	if s.rx == nil {
		s.rx = newRxBatch()
	}
	r := s.rx
	if set := !deadline.IsZero(); set || r.deadline {
		if err := s.file.SetReadDeadline(deadline); err != nil {
			return nil, s.rawError(err)
		}
		r.deadline = set
	}
	for {
		n, err := r.recv(s.raw, deadline)
		if err != nil {
			return nil, s.rawError(err)
		}
		r.frames = r.frames[:0]
		for i := range n {
			if f := r.frame(i); f != nil {
				r.frames = append(r.frames, f)
			}
		}
		if len(r.frames) > 0 {
			return r.frames, nil
		}
	}
}

// fineWait is the end of a wait that is not left to the runtime, whose timers
// may be late by a millisecond: longer than the delays that are to be made.
const fineWait = 3 * time.Millisecond

func (r *rxBatch) recv(raw syscall.RawConn, deadline time.Time) (int, error) {
	var n uintptr
	var errno syscall.Errno
	for i := range r.hdr {
		r.hdr[i].hdr.SetControllen(ctlSize)
	}
	err := raw.Read(func(fd uintptr) bool {
		for {
			n, _, errno = unix.Syscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&r.hdr[0])), batchSize, unix.MSG_DONTWAIT, 0, 0)
			if errno == unix.EINTR {
				continue
			}
			if errno != unix.EAGAIN {
				return true
			}
			left := time.Until(deadline)
			if deadline.IsZero() || left <= 0 || left > fineWait {
				return false
			}
			ts := unix.NsecToTimespec(int64(left))
			_, _ = unix.Ppoll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, &ts, nil)
		}
	})
	if err != nil {
		return 0, err
	}
	if errno != 0 {
		return 0, fmt.Errorf("lab: receive: %w", errno)
	}
	return int(n), nil
}

// frame returns message i as a frame on the wire; nil when it was cut off.
func (r *rxBatch) frame(i int) []byte {
	h := &r.hdr[i]
	if h.hdr.Flags&unix.MSG_TRUNC != 0 {
		return nil
	}
	slot := r.slots[i]
	f := slot[frame.VLANLen : frame.VLANLen+int(h.n)]
	ctl := r.ctl[i][:h.hdr.Controllen]
	if len(ctl) < unix.CmsgLen(int(unsafe.Sizeof(unix.TpacketAuxdata{}))) {
		return f
	}
	aux := (*unix.TpacketAuxdata)(unsafe.Pointer(&ctl[unix.CmsgLen(0)]))
	if aux.Status&unix.TP_STATUS_VLAN_VALID != 0 && len(f) >= 12 {
		copy(slot, f[:12])
		tpid := uint16(frame.EtherVLAN)
		if aux.Status&unix.TP_STATUS_VLAN_TPID_VALID != 0 {
			tpid = aux.Vlan_tpid
		}
		binary.BigEndian.PutUint16(slot[12:], tpid)
		binary.BigEndian.PutUint16(slot[14:], aux.Vlan_tci)
		f = slot[:frame.VLANLen+len(f)]
	}
	if aux.Status&unix.TP_STATUS_CSUMNOTREADY != 0 {
		if x, ok := frame.Parse(f); ok && x.L4 > 0 && !x.Fragment {
			switch {
			case x.TCP:
				frame.CompleteChecksum(f, x.L4, x.End, x.L4+16)
			case x.Proto == unix.IPPROTO_UDP && x.End-x.L4 >= 8:
				frame.CompleteChecksum(f, x.L4, x.End, x.L4+6)
			}
		}
	}
	return f
}

// Send sends the frames, in order. It returns how many the interface took and
// the first error that made it skip one: a frame longer than the MTU allows, or
// an interface that is down.
func (s *PacketSocket) Send(frames ...[]byte) (sent int, err error) {
	for len(s.tx) < min(len(frames), batchSize) {
		s.tx = append(s.tx, mmsghdr{})
		s.txv = append(s.txv, unix.Iovec{})
	}
	for len(frames) > 0 {
		batch := frames[:min(len(frames), batchSize)]
		for i, f := range batch {
			s.txv[i] = unix.Iovec{Base: unsafe.SliceData(f)}
			s.txv[i].SetLen(len(f))
			s.tx[i] = mmsghdr{}
			s.tx[i].hdr.Iov = &s.txv[i]
			s.tx[i].hdr.SetIovlen(1)
		}
		n, e := s.sendBatch(len(batch))
		if e != nil && !isErrno(e) {
			return sent, e
		}
		sent += n
		if e != nil {
			n++
			if err == nil {
				err = fmt.Errorf("lab: send: %w", e)
			}
		}
		frames = frames[n:]
	}
	return sent, err
}

func isErrno(err error) bool {
	_, ok := err.(syscall.Errno)
	return ok
}

// sendRetries bounds how often a frame is offered to a full receive queue.
const sendRetries = 200

// sendBatch sends the first n prepared messages up to the first that fails. A
// receive queue at the far end that is full for a moment is waited for.
func (s *PacketSocket) sendBatch(n int) (int, error) {
	var done uintptr
	var errno syscall.Errno
	retries := 0
	err := s.raw.Write(func(fd uintptr) bool {
		for {
			done, _, errno = unix.Syscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&s.tx[0])), uintptr(n), unix.MSG_DONTWAIT, 0, 0)
			if errno == unix.ENOBUFS && retries < sendRetries {
				retries++
				_, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
				continue
			}
			if errno != unix.EINTR {
				return errno != unix.EAGAIN
			}
		}
	})
	if err != nil {
		return 0, s.rawError(err)
	}
	if errno != 0 {
		return 0, errno
	}
	return int(done), nil
}
