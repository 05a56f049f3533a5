package fastpath

import (
	"errors"
	"fmt"
	"math"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

const (
	tapReads   = 8     // super-segments taken from the TAP in one round
	tapBufSize = 70000 // a virtio-net header and the largest packet

	// spinFor is how long a worker without work looks on before it sleeps. To
	// wake an idle CPU costs tens of microseconds, which a connection that is
	// being opened, or a request and its answer, would pay at every step.
	spinFor = 200 * time.Microsecond

	// restMost is the longest sleep of a worker. One that has not looked at its
	// ports for stallAfter did not run, and the BPF programs may have taken the
	// daemon for hung: what waits is as old as that, see slowSide.take.
	// It holds that restMost < stallAfter < beatStale - beatEvery.
	restMost   = 250 * time.Millisecond
	stallAfter = 450 * time.Millisecond
)

// Poll is what a worker without work does.
type Poll uint8

const (
	// PollHybrid looks on a little, then sleeps until there is work.
	PollHybrid Poll = iota
	// PollBusy never sleeps.
	PollBusy
	// PollSleep sleeps at once.
	PollSleep
)

// PollNames are the names of the Poll values, in their order.
var PollNames = []string{"hybrid", "busy", "sleep"}

// String returns the name.
func (p Poll) String() string {
	if int(p) < len(PollNames) {
		return PollNames[p]
	}
	return fmt.Sprintf("Poll(%d)", uint8(p))
}

// spin returns how long a worker looks on.
func (p Poll) spin() time.Duration {
	switch p {
	case PollBusy:
		return math.MaxInt64
	case PollSleep:
		return 0
	}
	return spinFor
}

// workerConfig says what a worker is made of.
type workerConfig struct {
	id    int
	cpu   int  // -1: not pinned
	own   bool // nothing else runs on that CPU
	poll  Poll
	drive bool // the sockets are to be polled by system calls
	start time.Time
	eng   *Engine
	umem  *xdp.Umem
	ports []port
	tap   *xdp.TAPQueue // nil in gateway mode
	inner []port        // of the inner NIC, in gateway mode
	slow  *slowSide

	peers  []*worker // all workers of the host by their numbers; nil: there is one
	owners *owners   // nil: there is one worker
}

// port is one queue of the NIC.
type port struct {
	queue  int
	sock   *xdp.Socket
	handed uint64 // packets that went on to other workers
	multi  []byte // a packet of several buffers, as far as it was received
	old    aged
}

// aged is how many of the packets that wait at a port may be there since before
// the worker's thread stood still.
type aged int

// taken notes that n packets were taken, and whether the port was found empty. Of a
// ring only none at all says so: the socket looks at what the kernel has added when
// it has nothing left of the last time.
func (a *aged) taken(n int, empty bool) {
	if *a -= aged(n); empty || *a < 0 {
		*a = 0
	}
}

// worker owns one engine, its UMEM and its ports, and the slow path of their
// flows. It runs on one OS thread.
type worker struct {
	workerConfig
	mail      mailbox
	delivered delivery
	pushed    uint64 // bit i: something was handed over to worker i and not published
	port      int    // that the worker receives from
	tid       chan int

	calls  chan func(*worker) // what other goroutines ask for, run on the worker's thread
	wakeFD int
	asleep atomic.Bool
	pulse  atomic.Uint64 // counts rounds, for the heartbeat
	stop   atomic.Bool
	done   chan struct{}
	err    error

	offload bool // the port completes TCP checksums
	request func(d *xdp.Desc, start, offset uint16)
	// The same of the inner NIC.
	requestInner func(d *xdp.Desc, start, offset uint16)
	descs        []xdp.Desc
	bufs         [tapReads][]byte
	supers       [tapReads][]byte // what of bufs was read
	pfds         []unix.PollFd
	nics         int // of them, those of NIC queues, which come first

	looked  time.Duration // when the ports were looked at
	stalled bool          // what was taken from the ports may be out of date
	tapOld  aged

	st workerStats
}

type workerStats struct {
	rounds, sleeps, txFull, tapErrors, multiBuffer, stalls uint64
	// Packets handed over to other workers and from them, and those lost for
	// want of room.
	handedOuter, handedInner, handedIn, handoverFull uint64
}

func newWorker(c workerConfig) (*worker, error) {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	w := &worker{
		workerConfig: c, tid: make(chan int, 1),
		calls: make(chan func(*worker), 1024), wakeFD: fd, done: make(chan struct{}),
		descs: make([]xdp.Desc, VectorSize),
	}
	for i := range w.bufs {
		w.bufs[i] = make([]byte, tapBufSize)
	}
	for i := range w.ports {
		w.pfds = append(w.pfds, unix.PollFd{Fd: int32(w.ports[i].sock.FD()), Events: unix.POLLIN})
	}
	for i := range w.inner {
		w.pfds = append(w.pfds, unix.PollFd{Fd: int32(w.inner[i].sock.FD()), Events: unix.POLLIN})
	}
	w.nics = len(w.pfds)
	if w.tap != nil {
		w.pfds = append(w.pfds, unix.PollFd{Fd: int32(w.tap.FD()), Events: unix.POLLIN})
	}
	w.pfds = append(w.pfds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	w.slow.w = w
	w.eng.cfg.Drain = w.transmit
	if w.owners != nil {
		w.eng.cfg.Elsewhere = w.elsewhere
	}
	w.offload = w.ports[0].sock.ChecksumOffload()
	if w.offload {
		w.request = w.ports[0].sock.RequestChecksum
	}
	if len(w.inner) > 0 && w.inner[0].sock.ChecksumOffload() {
		w.requestInner = w.inner[0].sock.RequestChecksum
	}
	return w, nil
}

func (w *worker) now() time.Duration { return time.Since(w.start) }

// post queues fn for the worker's thread and wakes it. It blocks while the
// queue is full, and gives up when the worker has ended.
func (w *worker) post(fn func(*worker)) {
	select {
	case w.calls <- fn:
		w.wake()
	case <-w.done:
	}
}

// tryPost is post that does not wait for room: it reports whether there was any.
// Workers post to each other in this way only.
func (w *worker) tryPost(fn func(*worker)) bool {
	select {
	case w.calls <- fn:
		w.wake()
		return true
	default:
		return false
	}
}

// wake ends the worker's sleep, if it sleeps.
func (w *worker) wake() {
	if w.asleep.Load() {
		one := [8]byte{1}
		// A full counter wakes just as well.
		_, _ = unix.Write(w.wakeFD, one[:])
	}
}

// call runs fn on the worker's thread and waits for it; false when the worker
// has ended.
func (w *worker) call(fn func(*worker)) bool {
	ran := make(chan struct{})
	w.post(func(w *worker) { fn(w); close(ran) })
	select {
	case <-ran:
		return true
	case <-w.done:
		return false
	}
}

// run is the worker's thread. A round goes over the ports once, a vector at a
// time; the functions below stand in the order in which a round calls them:
//
//	1 outerVector   receive descriptors from the NIC queues, translate inward
//	2 innerVector   read super-segments from the TAP, translate outward
//	3 requests      what other workers, the control side and the agreement pool ask for
//	4 handedOver    packets that reached another worker
//	5 timers        due timers of flows
//	6 slow.round    SYNs, Init messages and ended flows
//	7 transmit      checksums, TX ring, TAP writes
//	8 publish       packets that belong to another worker
//	9 reclaim       completions to the pool, pool to the fill rings
//	  rest          work ahead, look on a little, sleep until something is due
//
// Inside 1, 2 and 4 the engine parses, looks up, groups by flow, claims, and runs
// the cryptography of the whole vector at once.
func (w *worker) run() {
	defer close(w.done)
	runtime.LockOSThread()
	if w.cpu >= 0 {
		var set unix.CPUSet
		set.Set(w.cpu)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			w.err = fmt.Errorf("pin worker %d to CPU %d: %w", w.id, w.cpu, err)
			return
		}
	}
	w.tid <- unix.Gettid()
	var idleSince time.Duration
	w.looked = w.now()
	spin := w.poll.spin()
	w.reclaim()
	for !w.stop.Load() {
		w.st.rounds++
		w.notice()
		w.pulse.Add(1)
		w.collect()
		n := w.outerVector()
		n += w.innerVector()
		n += w.requests()
		n += w.handedOver()
		w.timers()
		busy := w.slow.round(w.now())
		w.stalled = w.stalled && w.old()
		w.transmit()
		w.publish()
		if w.err != nil {
			return
		}
		w.reclaim()
		if n > 0 || busy {
			idleSince = 0
			continue
		}
		now := w.now()
		switch {
		case w.slow.m.Ahead(now):
			idleSince = 0
		case idleSince == 0 && spin > 0:
			idleSince = now
		case now-idleSince > spin:
			w.rest()
			idleSince = 0
		default:
			w.yield()
		}
	}
}

// notice finds out whether the worker's thread did not run for a while: the
// process was stopped, or the machine starved it.
func (w *worker) notice() {
	now := w.now()
	gap := now - w.looked
	w.looked = now
	if gap < stallAfter {
		return
	}
	w.st.stalls++
	w.stalled = true
	for i := range w.ports {
		w.ports[i].old = ringSize
	}
	for i := range w.inner {
		w.inner[i].old = ringSize
	}
	if w.tap != nil {
		w.tapOld = xdp.TAPQueueLen
	}
	w.slow.stalled(gap)
}

// old reports whether something may still wait at a port since before the thread
// stood still.
func (w *worker) old() bool {
	for i := range w.ports {
		if w.ports[i].old > 0 {
			return true
		}
	}
	for i := range w.inner {
		if w.inner[i].old > 0 {
			return true
		}
	}
	return w.tapOld > 0
}

// yield gives the CPU to whoever else wants it: a worker that shares its CPU
// may be waiting for that very thread.
func (w *worker) yield() {
	if !w.own {
		_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	}
}

func (w *worker) outerVector() int {
	total := 0
	for k := range w.ports {
		p := &w.ports[k]
		if w.drive {
			p.sock.Drive()
		}
		n := p.sock.Receive(w.descs)
		p.old.taken(n, n == 0)
		if n == 0 {
			continue
		}
		w.port = k
		total += n
		v := w.descs[:n]
		for i := range v {
			if v[i].Options&xdp.OptionContinued != 0 || len(p.multi) > 0 {
				v = w.linearize(p, v, w.eng.OuterFrame)
				break
			}
		}
		w.eng.OuterIn(v, w.now())
	}
	return total
}

// innerPorts is innerVector for gateway mode.
func (w *worker) innerPorts() int {
	total := 0
	for k := range w.inner {
		p := &w.inner[k]
		if w.drive {
			p.sock.Drive()
		}
		n := p.sock.Receive(w.descs)
		p.old.taken(n, n == 0)
		if n == 0 {
			continue
		}
		total += n
		v := w.descs[:n]
		for i := range v {
			if v[i].Options&xdp.OptionContinued != 0 || len(p.multi) > 0 {
				v = w.linearize(p, v, w.eng.InnerFrame)
				break
			}
		}
		w.eng.InnerChunks(v, w.now())
	}
	return total
}

// linearize puts packets of several buffers together, which can straddle two
// vectors of a port, and returns the descriptors of the others. Such packets are
// larger than a chunk; they come from senders that ignore the announced MSS, and
// are given to whole.
func (w *worker) linearize(p *port, v []xdp.Desc, whole func(frame []byte, now time.Duration)) []xdp.Desc {
	keep := v[:0]
	for _, d := range v {
		more := d.Options&xdp.OptionContinued != 0
		if !more && len(p.multi) == 0 {
			keep = append(keep, d)
			continue
		}
		if len(p.multi) < tapBufSize {
			p.multi = append(p.multi, w.umem.Bytes(d.Addr, int(d.Len))...)
		}
		w.umem.Free(d.Addr)
		if !more {
			w.st.multiBuffer++
			whole(p.multi, w.now())
			p.multi = p.multi[:0]
		}
	}
	return keep
}

func (w *worker) innerVector() int {
	if w.tap == nil {
		return w.innerPorts()
	}
	n := 0
	for n < tapReads {
		k, err := w.tap.Read(w.bufs[n])
		if err != nil {
			if !errors.Is(err, unix.EAGAIN) {
				w.st.tapErrors++
			}
			break
		}
		w.supers[n] = w.bufs[n][:k]
		n++
	}
	w.tapOld.taken(n, n < tapReads)
	if n > 0 {
		now := w.now()
		w.eng.InnerVec(w.supers[:n], now)
		w.eng.Flush(now)
	}
	return n
}

func (w *worker) requests() int {
	n := len(w.calls)
	for range n {
		(<-w.calls)(w)
	}
	return n
}

func (w *worker) timers() {
	if at, ok := w.eng.Deadline(); ok {
		if now := w.now(); at <= now {
			w.eng.Tick(now)
		}
	}
}

// transmit empties the engine's output vectors. The engine calls it too, when
// one of them is full.
func (w *worker) transmit() {
	if out := w.eng.Out(); len(out) > 0 {
		w.eng.FinishOut(w.request)
		w.transmitTo(w.ports[0].sock, out)
		w.eng.ClearOut()
	}
	if in := w.eng.InnerOut(); len(in) > 0 {
		w.eng.FinishInner(w.requestInner)
		w.transmitTo(w.inner[0].sock, in)
		w.eng.ClearInner()
	}
	if in := w.eng.In(); len(in) > 0 {
		for i := range in {
			if err := w.tap.Writev(in[i].Header(), in[i].Data()); err != nil {
				// Lost, as in any queue: custody resends it (T13).
				w.st.tapErrors++
			}
		}
		w.eng.ClearIn()
	}
}

func (w *worker) transmitTo(s *xdp.Socket, out []xdp.Desc) {
	for try := 0; len(out) > 0; try++ {
		n := s.Transmit(out)
		out = out[n:]
		if err := s.Kick(); err != nil {
			if errors.Is(err, xdp.ErrDeviceGone) {
				w.err = err
			}
			break
		}
		if len(out) > 0 {
			s.Complete()
			if try == 16 {
				break
			}
		}
	}
	for _, d := range out {
		w.st.txFull++
		w.umem.Discard(d.Addr)
	}
}

func (w *worker) reclaim() {
	for i := range w.ports {
		s := w.ports[i].sock
		s.Complete()
		s.Refill()
	}
	for i := range w.inner {
		s := w.inner[i].sock
		s.Complete()
		s.Refill()
	}
}

func (w *worker) rest() {
	timeout := restMost
	if at, ok := w.eng.Deadline(); ok {
		timeout = min(timeout, at-w.now())
	}
	if at, ok := w.slow.m.Deadline(); ok {
		timeout = min(timeout, at-w.now())
	}
	if timeout <= 0 {
		return
	}
	w.asleep.Store(true)
	defer w.asleep.Store(false)
	if len(w.calls) > 0 || w.mail.pending.Load() != 0 || w.stop.Load() {
		return
	}
	w.st.sleeps++
	ts := unix.NsecToTimespec(int64(timeout))
	if _, err := unix.Ppoll(w.pfds, &ts, nil); err != nil && err != unix.EINTR {
		w.err = fmt.Errorf("poll: %w", err)
		w.stop.Store(true)
		return
	}
	if w.pfds[len(w.pfds)-1].Revents != 0 {
		var b [8]byte
		_, _ = unix.Read(w.wakeFD, b[:])
	}
	for _, p := range w.pfds[:w.nics] {
		if p.Revents&(unix.POLLERR|unix.POLLHUP|unix.POLLNVAL) != 0 {
			w.err = xdp.ErrDeviceGone
			w.stop.Store(true)
		}
	}
}
