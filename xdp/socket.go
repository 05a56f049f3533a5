package xdp

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Errors of sockets, to be tested with errors.Is.
var (
	// ErrDeviceGone: the network device was removed, or the socket unbound.
	ErrDeviceGone = errors.New("xdp: network device is gone")
	// ErrDeviceDown: the network device is administratively down.
	ErrDeviceDown = errors.New("xdp: network device is down")
	// ErrQueueBusy: another socket is bound to this queue of the device.
	ErrQueueBusy = errors.New("xdp: queue is bound to another AF_XDP socket")
)

// Mode is a way by which packets pass between a device and the rings.
type Mode uint8

const (
	// ModeAuto takes the first that works of ModeZeroCopy, ModeCopy and, as
	// far as attached programs are concerned, ModeGeneric.
	ModeAuto Mode = iota
	// ModeZeroCopy: the device reads and writes the UMEM.
	ModeZeroCopy
	// ModeCopy: native XDP in the driver, the kernel copies.
	ModeCopy
	// ModeGeneric: XDP on socket buffers, the kernel copies; any driver.
	ModeGeneric
)

var modeNames = [...]string{"auto", "zerocopy", "copy", "generic"}

func (m Mode) String() string {
	if int(m) < len(modeNames) {
		return modeNames[m]
	}
	return fmt.Sprintf("Mode(%d)", uint8(m))
}

// ParseMode is the inverse of Mode.String.
func ParseMode(s string) (Mode, error) {
	for i, name := range modeNames {
		if s == name {
			return Mode(i), nil
		}
	}
	return 0, fmt.Errorf("mode %q: must be one of %s", s, strings.Join(modeNames[:], ", "))
}

// SocketConfig says what a Socket is bound to. Ring sizes are numbers of
// entries and powers of two; 0 means DefaultRingSize.
type SocketConfig struct {
	Ifindex, Queue int

	FillSize, CompletionSize, RXSize, TXSize int

	Mode Mode

	// MultiBuffer lets a packet span several chunks (XDP_USE_SG). It takes an
	// XDP program with fragment support; without it, packets above
	// ChunkSize-Headroom bytes are dropped by the kernel.
	MultiBuffer bool

	// Reserve is the number of chunks that Refill leaves in the pool, so that
	// there are chunks to transmit from.
	Reserve int

	// BusyPoll has the driver's queue processed by the system calls of the
	// worker, which then must call Drive, instead of by interrupts
	// (SO_PREFER_BUSY_POLL). It needs CAP_NET_ADMIN and Linux 5.11.
	BusyPoll bool

	// BindTimeout is how long a busy queue is tried again; 0 means one
	// second. The kernel lets go of a closed socket's queue with some delay.
	BindTimeout time.Duration
}

// DefaultRingSize is the number of entries of a ring whose size is not given:
// a fill ring that runs empty loses packets, and 4096 takes the bursts that a
// scheduling delay makes.
const DefaultRingSize = 4096

const (
	txMetadataLen  = 24      // sizeof(struct xsk_tx_metadata)
	sendBuffer     = 8 << 20 // bytes of socket buffers that copy-mode TX may have in flight
	busyPollMicros = 20      // time that one system call may poll
	busyPollBudget = 64      // packets of it
	maxSegments    = 18      // descriptors of one packet: MAX_SKB_FRAGS + 1
	maxKicks       = 256     // system calls of one Kick
	maxIdleKicks   = 4       // of these, without progress
	closeDrainTime = 50 * time.Millisecond
)

// A Socket is an AF_XDP socket bound to one queue of one device, with its four
// rings. Its methods may be called only by the worker that owns its Umem,
// except FD, Mode and Fallback, which any goroutine may call.
type Socket struct {
	umem     *Umem
	config   SocketConfig
	fd       int
	id       uint16
	mode     Mode
	fallback error
	offload  bool

	fill       fillRing
	completion completionRing
	rx         rxRing
	tx         txRing

	pending int
	count   socketCounters
	closed  bool
}

type socketCounters struct {
	received, transmitted, completed, refused   atomic.Uint64
	kicks, kickBusy, kickAgain, stalls, rxWakes atomic.Uint64
}

// Statistics are monotonic counters of a socket since it was made.
type Statistics struct {
	// Kernel (XDP_STATISTICS).
	RXDropped      uint64 // for other reasons than the following ones, mostly a packet too long
	RXInvalid      uint64 // bad entries in the fill ring
	TXInvalid      uint64 // bad descriptors in the TX ring
	RXRingFull     uint64 // packets dropped as the RX ring was full
	FillRingEmpty  uint64 // packets dropped as the fill ring was empty
	TXRingEmpty    uint64 // look-ups of the TX ring that found nothing
	Received       uint64 // descriptors handed to the worker
	Transmitted    uint64 // descriptors put into the TX ring
	Completed      uint64 // descriptors that came back
	Refused        uint64 // descriptors that the kernel would not have taken, freed by Transmit
	Kicks          uint64 // sendto system calls
	KickBusy       uint64 // of these, frames dropped by the device's queue (EBUSY)
	KickAgain      uint64 // of these, ended by the kernel's budget or lack of buffers (EAGAIN)
	KickStalls     uint64 // calls of Kick that gave up with descriptors left in the TX ring
	ReceiveWakeups uint64 // recvfrom system calls to point the driver at the fill ring
}

// Add adds the counters to m under their names, so that the sockets of a device
// can be summed up.
func (st *Statistics) Add(m map[string]uint64) {
	for _, c := range [...]struct {
		name  string
		value uint64
	}{
		{"xsk_rx_dropped", st.RXDropped},
		{"xsk_rx_invalid", st.RXInvalid},
		{"xsk_tx_invalid", st.TXInvalid},
		{"xsk_rx_ring_full", st.RXRingFull},
		{"xsk_fill_ring_empty", st.FillRingEmpty},
		{"xsk_tx_ring_empty", st.TXRingEmpty},
		{"xsk_received", st.Received},
		{"xsk_transmitted", st.Transmitted},
		{"xsk_completed", st.Completed},
		{"xsk_refused", st.Refused},
		{"xsk_kicks", st.Kicks},
		{"xsk_kick_busy", st.KickBusy},
		{"xsk_kick_again", st.KickAgain},
		{"xsk_kick_stalls", st.KickStalls},
		{"xsk_receive_wakeups", st.ReceiveWakeups},
	} {
		m[c.name] += c.value
	}
}

// NewSocket makes a socket on u and binds it to a queue of a device of the
// calling thread's network namespace. The first socket of a Umem registers it
// with the kernel; further ones share it, on other queues, devices or
// namespaces of the process, in the first one's mode.
//
// It needs CAP_NET_RAW. A mode that was asked for and cannot be had is an
// error; with ModeAuto, Fallback tells why it is not zero-copy.
func NewSocket(u *Umem, cfg SocketConfig) (*Socket, error) {
	for _, size := range []*int{&cfg.FillSize, &cfg.CompletionSize, &cfg.RXSize, &cfg.TXSize} {
		if *size == 0 {
			*size = DefaultRingSize
		}
		if *size < 1 || *size > 1<<20 || *size&(*size-1) != 0 {
			return nil, fmt.Errorf("xdp: ring size %d: must be a power of two", *size)
		}
	}
	if cfg.Mode > ModeGeneric {
		return nil, fmt.Errorf("xdp: unknown socket mode %v", cfg.Mode)
	}
	if cfg.BindTimeout == 0 {
		cfg.BindTimeout = time.Second
	}
	var owner *Socket
	for _, s := range u.sockets {
		if s != nil && owner == nil {
			owner = s
		}
	}
	s, err := newSocket(u, cfg, owner)
	if err != nil {
		return nil, fmt.Errorf("xdp: AF_XDP socket on interface %d queue %d: %w", cfg.Ifindex, cfg.Queue, err)
	}
	return s, nil
}

func newSocket(u *Umem, cfg SocketConfig, owner *Socket) (*Socket, error) {
	if owner != nil {
		zeroCopy := owner.mode == ModeZeroCopy
		if cfg.Mode != ModeAuto && (cfg.Mode == ModeZeroCopy) != zeroCopy {
			return nil, fmt.Errorf("mode %v: the UMEM is already used in mode %v", cfg.Mode, owner.mode)
		}
		s, err := openSocket(u, cfg, unix.XDP_SHARED_UMEM, owner)
		if err != nil {
			return nil, err
		}
		s.fallback = owner.fallback
		return s, nil
	}
	flags := uint16(unix.XDP_USE_NEED_WAKEUP)
	if cfg.MultiBuffer {
		flags |= unix.XDP_USE_SG
	}
	var fallback error
	if cfg.Mode == ModeAuto || cfg.Mode == ModeZeroCopy {
		s, err := openSocket(u, cfg, flags|unix.XDP_ZEROCOPY, nil)
		if err == nil || cfg.Mode == ModeZeroCopy || !modeRefused(err) {
			return s, err
		}
		fallback = err
	}
	s, err := openSocket(u, cfg, flags|unix.XDP_COPY, nil)
	if err != nil {
		return nil, err
	}
	s.fallback = fallback
	return s, nil
}

// modeRefused tells a device that cannot do zero-copy from errors that copy
// mode would meet too.
func modeRefused(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS)
}

func openSocket(u *Umem, cfg SocketConfig, flags uint16, owner *Socket) (_ *Socket, err error) {
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.EAFNOSUPPORT):
		return nil, fmt.Errorf("the kernel has no AF_XDP (CONFIG_XDP_SOCKETS): %w", err)
	case errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("needs CAP_NET_RAW: %w", err)
	case err != nil:
		return nil, fmt.Errorf("socket: %w", err)
	}
	s := &Socket{umem: u, config: cfg, fd: fd}
	s.fill.indices, s.completion.indices, s.rx.indices, s.tx.indices = emptyRing(), emptyRing(), emptyRing(), emptyRing()
	defer func() {
		if err != nil {
			s.release()
		}
	}()
	if owner == nil {
		if err := s.register(); err != nil {
			return nil, err
		}
	}
	if err := s.mapRings(); err != nil {
		return nil, err
	}
	address := &unix.SockaddrXDP{Flags: flags, Ifindex: uint32(cfg.Ifindex), QueueID: uint32(cfg.Queue)}
	if owner != nil {
		address.SharedUmemFD = uint32(owner.fd)
	}
	if err := s.bind(address); err != nil {
		return nil, err
	}

	var options uint32
	if err := getsockopt(fd, unix.SOL_XDP, unix.XDP_OPTIONS, &options); err != nil {
		return nil, fmt.Errorf("read mode: %w", err)
	}
	switch {
	case options&unix.XDP_OPTIONS_ZEROCOPY != 0:
		s.mode = ModeZeroCopy
	case cfg.Mode == ModeGeneric:
		s.mode = ModeGeneric
	default:
		s.mode = ModeCopy
	}
	s.offload = u.txMetadata && (s.mode != ModeZeroCopy || deviceFeatures(cfg.Ifindex).txChecksum)

	// Copy-mode TX stops after a budget of frames, and at the socket buffer's
	// end, with EAGAIN each: fewer system calls with both large. Kernels
	// before 6.17 know only the default budget.
	_ = unix.SetsockoptInt(fd, unix.SOL_XDP, unix.XDP_MAX_TX_SKB_BUDGET, cfg.TXSize)
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer)
	}

	if cfg.BusyPoll {
		if err := s.preferBusyPoll(); err != nil {
			return nil, err
		}
	}
	if err := u.adopt(s); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Socket) preferBusyPoll() error {
	for _, o := range []struct{ option, value int }{
		{unix.SO_PREFER_BUSY_POLL, 1},
		{unix.SO_BUSY_POLL, busyPollMicros},
		{unix.SO_BUSY_POLL_BUDGET, busyPollBudget},
	} {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, o.option, o.value); err != nil {
			return fmt.Errorf("prefer busy polling: %w", err)
		}
	}
	return nil
}

// Drive lets the driver process its queue now, for sockets with
// SocketConfig.BusyPoll. It does not block.
func (s *Socket) Drive() { wakeRX(s.fd) }

// register makes s the socket through which the kernel learns of the UMEM.
func (s *Socket) register() error {
	u := s.umem
	u.txMetadata = false
	if u.config.TXMetadata {
		err := registerUmem(s.fd, u, unix.XDP_UMEM_TX_METADATA_LEN, txMetadataLen)
		if err == nil {
			u.txMetadata = true
			return nil
		}
		if !errors.Is(err, unix.EINVAL) {
			return registerError(err)
		}
	}
	if err := registerUmem(s.fd, u, 0, 0); err != nil {
		return registerError(err)
	}
	return nil
}

func registerError(err error) error {
	if errors.Is(err, unix.ENOBUFS) {
		return fmt.Errorf("register UMEM: the locked-memory limit (ulimit -l) is too low: %w", err)
	}
	return fmt.Errorf("register UMEM: %w", err)
}

func (s *Socket) mapRings() error {
	for _, ring := range []struct{ option, size int }{
		{unix.XDP_UMEM_FILL_RING, s.config.FillSize},
		{unix.XDP_UMEM_COMPLETION_RING, s.config.CompletionSize},
		{unix.XDP_RX_RING, s.config.RXSize},
		{unix.XDP_TX_RING, s.config.TXSize},
	} {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_XDP, ring.option, ring.size); err != nil {
			return fmt.Errorf("ring of %d entries: %w", ring.size, err)
		}
	}
	var off unix.XDPMmapOffsets
	if err := getsockopt(s.fd, unix.SOL_XDP, unix.XDP_MMAP_OFFSETS, &off); err != nil {
		return fmt.Errorf("read ring offsets: %w", err)
	}
	var err error
	if s.fill.indices, s.fill.entries, err = mapRing[uint64](s.fd, unix.XDP_UMEM_PGOFF_FILL_RING, off.Fr, s.config.FillSize); err != nil {
		s.fill.indices = emptyRing()
		return err
	}
	s.fill.mask = uint32(s.config.FillSize - 1)
	if s.completion.indices, s.completion.entries, err = mapRing[uint64](s.fd, unix.XDP_UMEM_PGOFF_COMPLETION_RING, off.Cr, s.config.CompletionSize); err != nil {
		s.completion.indices = emptyRing()
		return err
	}
	s.completion.mask = uint32(s.config.CompletionSize - 1)
	if s.rx.indices, s.rx.entries, err = mapRing[Desc](s.fd, unix.XDP_PGOFF_RX_RING, off.Rx, s.config.RXSize); err != nil {
		s.rx.indices = emptyRing()
		return err
	}
	s.rx.mask = uint32(s.config.RXSize - 1)
	if s.tx.indices, s.tx.entries, err = mapRing[Desc](s.fd, unix.XDP_PGOFF_TX_RING, off.Tx, s.config.TXSize); err != nil {
		s.tx.indices = emptyRing()
		return err
	}
	s.tx.mask = uint32(s.config.TXSize - 1)
	return nil
}

func (s *Socket) bind(address *unix.SockaddrXDP) error {
	deadline := time.Now().Add(s.config.BindTimeout)
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := unix.Bind(s.fd, address)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EBUSY):
			if time.Now().After(deadline) {
				return fmt.Errorf("bind: %w", ErrQueueBusy)
			}
			time.Sleep(wait)
		case errors.Is(err, unix.ENODEV):
			return fmt.Errorf("bind: %w", ErrDeviceGone)
		case errors.Is(err, unix.ENETDOWN):
			return fmt.Errorf("bind: %w", ErrDeviceDown)
		case errors.Is(err, unix.EOPNOTSUPP) && address.Flags&unix.XDP_ZEROCOPY != 0:
			return fmt.Errorf("bind: the driver has no zero-copy for this queue: %w", err)
		case errors.Is(err, unix.EINVAL) && address.Flags&unix.XDP_SHARED_UMEM != 0:
			return fmt.Errorf("bind: no such queue, or one that a socket of this UMEM has: %w", err)
		case errors.Is(err, unix.EINVAL) && address.Flags&unix.XDP_ZEROCOPY != 0:
			return fmt.Errorf("bind: no such queue, or one for which the driver refuses zero-copy: %w", err)
		case errors.Is(err, unix.EINVAL):
			return fmt.Errorf("bind: no such queue: %w", err)
		default:
			return fmt.Errorf("bind: %w", err)
		}
	}
}

// release undoes openSocket. All four rings must be unmapped: each mapping
// keeps the file and with it the queue.
func (s *Socket) release() error {
	errs := []error{s.fill.unmap(), s.completion.unmap(), s.rx.unmap(), s.tx.unmap(), unix.Close(s.fd)}
	s.fill.entries, s.fill.produced, s.fill.consumed = nil, 0, 0
	s.completion.entries, s.completion.produced, s.completion.consumed = nil, 0, 0
	s.rx.entries, s.rx.produced, s.rx.consumed = nil, 0, 0
	s.tx.entries, s.tx.produced, s.tx.consumed = nil, 0, 0
	return errors.Join(errs...)
}

// Holders of chunks in Umem.holder: none, or a socket's id and which of its
// directions.
const (
	holderNone = 0
	holderTX   = 1 // or-ed to the id shifted by one; without it: fill or RX ring
)

// adopt gives s an id. That the queue could be bound proves that the kernel
// has let go of the chunks that an earlier socket left on it.
func (u *Umem) adopt(s *Socket) error {
	slot := -1
	for i, other := range u.sockets {
		if other == nil {
			slot = i
			break
		}
	}
	if slot < 0 {
		if len(u.sockets) == 1<<15-1 {
			return fmt.Errorf("too many sockets on one UMEM")
		}
		u.sockets = append(u.sockets, nil)
		slot = len(u.sockets) - 1
	}
	u.sockets[slot] = s
	s.id = uint16(slot+1) << 1

	queue := deviceQueue{s.config.Ifindex, s.config.Queue}
	for _, addr := range u.quarantine[queue] {
		u.debug.move(addr>>u.shift, ownerGone, ownerPool)
		u.put(addr)
	}
	delete(u.quarantine, queue)
	return nil
}

// FD returns the socket's descriptor for poll and for XSKMAPs.
func (s *Socket) FD() int { return s.fd }

// Mode returns what the kernel granted: ModeZeroCopy, ModeCopy or, when asked
// for, ModeGeneric.
func (s *Socket) Mode() Mode { return s.mode }

// Fallback returns why zero-copy was refused under ModeAuto, or nil.
func (s *Socket) Fallback() error { return s.fallback }

// ChecksumOffload reports whether RequestChecksum has an effect.
func (s *Socket) ChecksumOffload() bool { return s.offload }

// Umem returns the memory that the socket's descriptors refer to.
func (s *Socket) Umem() *Umem { return s.umem }

// Refill moves chunks from the pool to the fill ring until it is full or the
// pool is down to SocketConfig.Reserve, and returns their number.
func (s *Socket) Refill() int {
	u := s.umem
	n := s.fill.room(min(u.top-s.config.Reserve, len(s.fill.entries)))
	if n > 0 {
		for range n {
			u.top--
			addr := u.free[u.top]
			u.debug.move(addr>>u.shift, ownerPool, ownerFill)
			u.holder[addr>>u.shift] = s.id
			s.fill.push(addr)
		}
		s.fill.submit()
	} else {
		n = 0
	}
	// Zero-copy drivers that ran out of chunks wait to be told; copy mode
	// never sets the flag.
	if s.fill.needWakeup() {
		s.count.rxWakes.Add(1)
		wakeRX(s.fd)
	}
	return n
}

// Receive takes up to len(d) descriptors of received packets. Their chunks
// belong to the worker until it frees or transmits them. A packet of several
// descriptors has OptionContinued on all but the last, and may straddle two
// calls.
func (s *Socket) Receive(d []Desc) int {
	n := min(s.rx.available(), len(d))
	if n == 0 {
		return 0
	}
	u := s.umem
	for i := range d[:n] {
		d[i] = s.rx.pop()
		chunk := d[i].Addr >> u.shift
		u.debug.move(chunk, ownerFill, ownerWorker)
		u.holder[chunk] = holderNone
	}
	s.rx.release()
	s.count.received.Add(uint64(n))
	return n
}

// Transmit puts descriptors into the TX ring as far as there is room, and
// returns how many of d it took; Kick sends them. The chunks taken must not be
// written until Complete or Reap has brought them back. The descriptors of one
// packet are taken together or not at all, and must be in one call.
//
// A packet that the kernel would silently not send (empty, not inside a chunk,
// more than 18 descriptors, unknown options) is taken, freed and counted as
// refused: in the ring it would be lost with its chunk.
func (s *Socket) Transmit(d []Desc) int {
	room := s.tx.room(len(d))
	u := s.umem
	taken, pushed := 0, 0
	for taken < room {
		n, valid := s.packet(d[taken:room])
		if n == 0 {
			break
		}
		for _, desc := range d[taken : taken+n] {
			chunk := desc.Addr >> u.shift
			if !valid {
				if chunk < uint64(len(u.holder)) {
					u.Discard(desc.Addr)
				}
				continue
			}
			u.debug.move(chunk, ownerWorker, ownerTX)
			u.holder[chunk] = s.id | holderTX
			u.retained[chunk] &^= stateQueued
			s.tx.push(desc)
			pushed++
		}
		if !valid {
			s.count.refused.Add(uint64(n))
		}
		taken += n
	}
	if pushed > 0 {
		s.tx.submit()
		s.pending += pushed
		s.count.transmitted.Add(uint64(pushed))
	}
	return taken
}

// packet returns the number of descriptors of the packet that d starts with, 0
// if its end is not in d, and whether the kernel will take it.
func (s *Socket) packet(d []Desc) (n int, valid bool) {
	u := s.umem
	var metadata uint64
	options := uint32(OptionContinued)
	if u.txMetadata {
		metadata = txMetadataLen
		options |= OptionTXMetadata
	}
	valid = true
	for n < len(d) {
		desc := &d[n]
		n++
		start := desc.Addr & u.mask
		if desc.Len == 0 || desc.Addr >= uint64(u.size) || start < metadata ||
			start+uint64(desc.Len) > u.chunk || desc.Options&^options != 0 {
			valid = false
		}
		if desc.Options&OptionContinued == 0 {
			return n, valid && n <= maxSegments
		}
	}
	return 0, false
}

// Complete returns chunks that were transmitted to the pool, or to the worker if
// they are retained, and their number.
func (s *Socket) Complete() int {
	n := s.completion.available()
	if n == 0 {
		return 0
	}
	u := s.umem
	for range n {
		addr := s.completion.pop()
		chunk := addr >> u.shift
		u.holder[chunk] = holderNone
		if u.retained[chunk] != 0 {
			u.debug.move(chunk, ownerTX, ownerWorker)
			continue
		}
		u.debug.move(chunk, ownerTX, ownerPool)
		u.put(addr)
	}
	s.completed(n)
	return n
}

// Reap is Complete for chunks that the worker wants to keep: it writes the
// addresses of up to len(addrs) transmitted frames to addrs, and their chunks
// belong to the worker.
func (s *Socket) Reap(addrs []uint64) int {
	n := min(s.completion.available(), len(addrs))
	if n == 0 {
		return 0
	}
	u := s.umem
	for i := range addrs[:n] {
		addrs[i] = s.completion.pop()
		chunk := addrs[i] >> u.shift
		u.debug.move(chunk, ownerTX, ownerWorker)
		u.holder[chunk] = holderNone
	}
	s.completed(n)
	return n
}

func (s *Socket) completed(n int) {
	s.completion.release()
	s.pending -= n
	s.count.completed.Add(uint64(n))
}

// Pending returns the number of descriptors given to Transmit that have not
// come back.
func (s *Socket) Pending() int { return s.pending }

// Kick makes the kernel send what is in the TX ring, when it asks to be told.
// In copy mode the system call itself sends a bounded number of frames and
// stops early when a queue is full: Kick repeats it until the ring is empty or
// nothing moves, and reaps completions meanwhile, for which the kernel may be
// waiting. What it leaves in the ring is sent by a later Kick. A removed device
// is ErrDeviceGone, one that is down ErrDeviceDown.
func (s *Socket) Kick() error {
	left := s.tx.unread()
	if left == 0 || !s.tx.needWakeup() {
		return nil
	}
	idle := 0
	for range maxKicks {
		s.count.kicks.Add(1)
		switch errno := wakeTX(s.fd); errno {
		case 0:
			return nil
		case unix.EBUSY:
			s.count.kickBusy.Add(1)
		case unix.EAGAIN, unix.ENOBUFS:
			s.count.kickAgain.Add(1)
		case unix.EINTR:
		case unix.ENXIO:
			return ErrDeviceGone
		case unix.ENETDOWN:
			return ErrDeviceDown
		default:
			return fmt.Errorf("xdp: transmit on interface %d queue %d: %w", s.config.Ifindex, s.config.Queue, errno)
		}
		reaped := s.Complete()
		now := s.tx.unread()
		if now == 0 {
			return nil
		}
		if now == left && reaped == 0 {
			if idle++; idle == maxIdleKicks {
				break
			}
		} else {
			idle = 0
		}
		left = now
	}
	s.count.stalls.Add(1)
	return nil
}

// RequestChecksum asks the device to add the checksum of the frame that starts
// at d.Addr: over the bytes from start to the packet's end, stored at
// start+offset, where the sum of the pseudo-header must be. d is the packet's
// first descriptor. The request is written to the bytes before the frame, which
// must be the worker's. Without ChecksumOffload, or when the field is not in
// this descriptor, it does nothing.
func (s *Socket) RequestChecksum(d *Desc, start, offset uint16) {
	if !s.offload || d.Addr&s.umem.mask < txMetadataLen || uint32(start)+uint32(offset)+2 > d.Len {
		return
	}
	// struct xsk_tx_metadata: flags, then csum_start and csum_offset.
	m := s.umem.Bytes(d.Addr-txMetadataLen, txMetadataLen)
	clear(m)
	nativeEndian.PutUint64(m, unix.XDP_TXMD_FLAGS_CHECKSUM)
	nativeEndian.PutUint16(m[8:], start)
	nativeEndian.PutUint16(m[10:], offset)
	d.Options |= OptionTXMetadata
}

// Statistics reads the kernel's counters and adds the socket's own.
func (s *Socket) Statistics() (Statistics, error) {
	st := Statistics{
		Received:       s.count.received.Load(),
		Transmitted:    s.count.transmitted.Load(),
		Completed:      s.count.completed.Load(),
		Refused:        s.count.refused.Load(),
		Kicks:          s.count.kicks.Load(),
		KickBusy:       s.count.kickBusy.Load(),
		KickAgain:      s.count.kickAgain.Load(),
		KickStalls:     s.count.stalls.Load(),
		ReceiveWakeups: s.count.rxWakes.Load(),
	}
	var k unix.XDPStatistics
	if err := getsockopt(s.fd, unix.SOL_XDP, unix.XDP_STATISTICS, &k); err != nil {
		return st, fmt.Errorf("xdp: read socket statistics: %w", err)
	}
	st.RXDropped, st.RXInvalid, st.TXInvalid = k.Rx_dropped, k.Rx_invalid_descs, k.Tx_invalid_descs
	st.RXRingFull, st.FillRingEmpty, st.TXRingEmpty = k.Rx_ring_full, k.Rx_fill_ring_empty_descs, k.Tx_ring_empty_descs
	return st, nil
}

// Close sends what it can of the TX ring within 50 ms, unbinds the queue and
// puts the chunks of the rings back into the pool. Chunks that the device may
// still touch stay out of it until a socket is bound to the same queue again.
// The Umem stays usable. Nothing may be retained of what the socket transmits.
func (s *Socket) Close() error {
	if s.closed {
		return nil
	}
	s.closed = true
	for deadline := time.Now().Add(closeDrainTime); s.pending > 0 && s.Kick() == nil; {
		if s.Complete() == 0 {
			if time.Now().After(deadline) {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
	s.Complete()
	err := s.release()
	s.pending = 0

	u := s.umem
	u.sockets[s.id>>1-1] = nil
	queue := deviceQueue{s.config.Ifindex, s.config.Queue}
	for chunk, holder := range u.holder {
		if holder&^holderTX != s.id {
			continue
		}
		u.holder[chunk] = holderNone
		u.retained[chunk] = 0
		addr := uint64(chunk) << u.shift
		// In copy mode the kernel writes no chunk once the socket is closed,
		// but a frame in a device's queue may still refer to one. A zero-copy
		// driver stops some time after the close.
		if s.mode == ModeZeroCopy || holder&holderTX != 0 {
			u.debug.reset(uint64(chunk), ownerGone)
			u.quarantine[queue] = append(u.quarantine[queue], addr)
		} else {
			u.debug.reset(uint64(chunk), ownerPool)
			u.put(addr)
		}
	}
	if err != nil {
		return fmt.Errorf("xdp: close socket of queue %d: %w", s.config.Queue, err)
	}
	return nil
}
