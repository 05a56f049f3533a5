package lab

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
)

// Dir is a direction through a Forwarder.
type Dir uint8

// The directions.
const (
	AtoB Dir = iota
	BtoA
)

// String returns "a>b" or "b>a".
func (d Dir) String() string {
	if d == AtoB {
		return "a>b"
	}
	return "b>a"
}

// Reverse returns the other direction.
func (d Dir) Reverse() Dir { return d ^ 1 }

// Verdict is what a Hook decides about a frame.
type Verdict uint8

// The verdicts.
const (
	Pass      Verdict = iota // through the impairments
	Drop                     // counted in Stats.HookDropped
	Duplicate                // forward it twice, without impairments
	HoldBack                 // as if chosen by Impair.Reorder
	Bypass                   // forward it as it is, without impairments
)

// Hook sees every frame that comes in, also ARP and ND, before anything else is
// done to it. It may change the bytes in place, not the length, and has to mend
// checksums itself. It is called by two goroutines, one for each direction; the
// frame is valid during the call only.
type Hook func(d Dir, b []byte) Verdict

// Link is one of the two cables at a Forwarder.
type Link uint8

// The links.
const (
	LinkA Link = iota
	LinkB
)

// String returns "a" or "b".
func (l Link) String() string { return [...]string{"a", "b"}[l&1] }

// Tap sees every frame that crosses a link: on the way in before the hook, on
// the way out after all impairments. It is called by two goroutines; the frame
// is valid during the call only.
type Tap func(l Link, d Dir, b []byte)

// Segments says which TCP segments Strip is about.
type Segments uint8

// Kinds of segments, to be combined with |.
const (
	SYNs        Segments = 1 << iota // SYN without ACK
	SYNACKs                          // SYN with ACK
	NonSYNs                          // all others
	AllSegments = SYNs | SYNACKs | NonSYNs
)

func kindOf(flags uint8) Segments {
	switch {
	case flags&frame.SYN == 0:
		return NonSYNs
	case flags&frame.ACK == 0:
		return SYNs
	}
	return SYNACKs
}

// Strip overwrites a TCP option with NOPs.
type Strip struct {
	Kind uint8
	From Segments // 0 stands for AllSegments
}

// Impair says what happens to the TCP segments of one direction; everything
// else passes untouched. Probabilities are from 0 to 1. The zero value is a
// perfect wire.
//
// A segment goes through the stages in this order: strip, cut, coalesce, drop,
// corrupt, duplicate, reorder, rate and delay. Each is decided by a generator
// that is seeded for the direction, so the n-th segment of two runs meets the
// same fate if the segments before it were the same.
type Impair struct {
	// Seed, if not 0, starts the generator of the direction anew.
	Seed uint64

	Strip []Strip

	// Cut is the probability that a segment with more than one byte of data
	// is sent as 2 to CutPieces (default 3) segments, cut at random places.
	Cut       float64
	CutPieces int
	// Coalesce is the probability that a segment waits, for at most 1 ms, to
	// be merged with a following one of the same connection that continues
	// it, as long as the result fits the MTU.
	Coalesce float64

	Drop float64

	// Corrupt is the probability that one random bit of the TCP header or
	// the data is inverted; the checksum tells the receiver. With
	// CorruptHidden it is a bit of the data, and the checksum is made right.
	Corrupt       float64
	CorruptHidden bool

	Duplicate float64

	// Reorder is the probability that a segment is held back until
	// ReorderPackets (default 3) others overtook it, or for ReorderTime
	// (default 5 ms), whichever is first.
	Reorder        float64
	ReorderPackets int
	ReorderTime    time.Duration

	// Rate limits the direction to so many bits of frames a second, 0 for no
	// limit. Delay is added after that. QueueBytes bounds the frames that wait
	// for either (default 64 MiB, with Rate 1 MiB); what does not fit is
	// dropped and counted in Stats.Overflow.
	Rate       float64
	Delay      time.Duration
	QueueBytes int
}

const (
	coalesceTime = time.Millisecond
	maxHeld      = 512 // frames held back for reordering
)

// Stats counts what a Forwarder did in one direction, in frames unless the name
// says otherwise.
type Stats struct {
	Received, ReceivedBytes uint64
	Sent, SentBytes         uint64 // bytes include frames counted in SendErrors
	HookDropped             uint64
	Stripped                uint64 // options
	Cut                     uint64 // segments that were cut
	Coalesced               uint64 // segments merged into another
	Dropped                 uint64 // by Impair.Drop
	Corrupted               uint64
	Duplicated              uint64
	Reordered               uint64 // held back
	Overflow                uint64 // did not fit Impair.QueueBytes
	Oversize                uint64 // longer than the MTU and not TCP
	SendErrors              uint64 // refused by the interface
	KernelDrops             uint64 // came in faster than they were forwarded
}

type counters struct {
	received, receivedBytes, sent, sentBytes, hookDropped, stripped, cut, coalesced, dropped, corrupted,
	duplicated, reordered, overflow, oversize, sendErrors, kernelDrops atomic.Uint64
}

// ForwarderOptions configure a Forwarder.
type ForwarderOptions struct {
	Seed       uint64
	AtoB, BtoA Impair
	Hook       Hook
	Tap        Tap
}

// Forwarder bridges two interfaces of a namespace in user space and impairs
// what it carries. It hands frames on complete and with full checksums, whatever
// offloads the hosts use: segments longer than the MTU are cut to it.
type Forwarder struct {
	tap  Tap
	half [2]*half
	wg   sync.WaitGroup

	captures atomic.Pointer[[]*Capture]

	mu  sync.Mutex
	err error
}

// Forward bridges the path's two middle interfaces until Close or the end of
// the lab.
func (p *Path) Forward(o ForwarderOptions) (*Forwarder, error) {
	return NewForwarder(p.MidA, p.MidB, o)
}

// NewForwarder bridges two interfaces until Close or the end of their lab.
func NewForwarder(a, b *Iface, o ForwarderOptions) (*Forwarder, error) {
	f := &Forwarder{tap: o.Tap}
	var sock [2]*PacketSocket
	for i, ifc := range []*Iface{a, b} {
		var err error
		if sock[i], err = ifc.OpenPacket(); err != nil {
			if i == 1 {
				_ = sock[0].Close()
			}
			return nil, err
		}
	}
	mtu := [2]int{a.MTU, b.MTU}
	for d := AtoB; d <= BtoA; d++ {
		h := &half{f: f, dir: d, in: sock[d], out: sock[d.Reverse()], hook: o.Hook, mtu: mtu[d.Reverse()],
			rng: rand.New(rand.NewPCG(o.Seed, uint64(d)))}
		h.impair.Store(&Impair{})
		f.half[d] = h
	}
	f.Set(AtoB, o.AtoB)
	f.Set(BtoA, o.BtoA)
	for _, h := range f.half {
		f.wg.Add(1)
		go h.run()
	}
	a.NS.lab.AtClose(f.Close)
	return f, nil
}

// Set replaces the impairments of a direction; without a seed the generator goes
// on where it is. It may be called at any time from any goroutine.
func (f *Forwarder) Set(d Dir, i Impair) {
	if i.CutPieces < 2 {
		i.CutPieces = 3
	}
	if i.ReorderPackets <= 0 {
		i.ReorderPackets = 3
	}
	if i.ReorderTime <= 0 {
		i.ReorderTime = 5 * time.Millisecond
	}
	if i.QueueBytes <= 0 {
		i.QueueBytes = 64 << 20
		if i.Rate > 0 {
			i.QueueBytes = 1 << 20
		}
	}
	f.half[d].impair.Store(&i)
}

// Inject sends a frame out in the given direction, past hook and impairments. It
// may be called from any goroutine.
func (f *Forwarder) Inject(d Dir, b []byte) error {
	return f.half[d].send(b)
}

// Stats returns the counters of a direction.
func (f *Forwarder) Stats(d Dir) Stats {
	f.half[d].countDrops()
	c := &f.half[d].c
	return Stats{
		Received: c.received.Load(), ReceivedBytes: c.receivedBytes.Load(),
		Sent: c.sent.Load(), SentBytes: c.sentBytes.Load(),
		HookDropped: c.hookDropped.Load(), Stripped: c.stripped.Load(), Cut: c.cut.Load(),
		Coalesced: c.coalesced.Load(), Dropped: c.dropped.Load(), Corrupted: c.corrupted.Load(),
		Duplicated: c.duplicated.Load(), Reordered: c.reordered.Load(), Overflow: c.overflow.Load(),
		Oversize: c.oversize.Load(), SendErrors: c.sendErrors.Load(), KernelDrops: c.kernelDrops.Load(),
	}
}

// Close stops forwarding and returns the error that stopped a direction before,
// if one did. What is held back or delayed is lost. Captures are finished.
func (f *Forwarder) Close() error {
	var errs []error
	for _, h := range f.half {
		h.countDrops()
		if err := h.in.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			errs = append(errs, err)
		}
	}
	f.wg.Wait()
	if cs := f.captures.Swap(nil); cs != nil {
		for _, c := range *cs {
			errs = append(errs, c.Close())
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return errors.Join(append(errs, f.err)...)
}

func (f *Forwarder) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = errors.Join(f.err, err)
}

func (f *Forwarder) tapped(l Link, d Dir, b []byte) {
	if f.tap != nil {
		f.tap(l, d, b)
	}
	if cs := f.captures.Load(); cs != nil {
		for _, c := range *cs {
			c.write(l, d, b)
		}
	}
}

// half is one direction. Everything but impair, c and out is used by its run
// goroutine only.
//
// The goroutine is not locked to a thread: its sockets were made in the
// namespace and stay there, and a locked thread costs a context switch at every
// wake-up of the network poller.
type half struct {
	f      *Forwarder
	dir    Dir
	in     *PacketSocket
	hook   Hook
	mtu    int
	impair atomic.Pointer[Impair]
	c      counters
	rng    *rand.Rand
	im     *Impair // of the batch at hand

	outMu sync.Mutex // Inject sends from other goroutines
	out   *PacketSocket

	ready  [][]byte // to be sent at the end of the batch
	spent  [][]byte // buffers of h.ready that go back to free after it
	free   [][]byte
	merge  []byte // segment that waits to be coalesced
	mergeX frame.Info
	mergeT time.Time
	held   []heldFrame // by reordering
	queue  []queuedFrame
	queued int       // bytes in queue
	busy   time.Time // until then the rate limiter is busy
}

type heldFrame struct {
	b     []byte
	after int // frames that have still to overtake it
	until time.Time
}

type queuedFrame struct {
	b  []byte
	at time.Time
}

func (h *half) run() {
	defer h.f.wg.Done()
	for {
		frames, err := h.in.Receive(h.deadline())
		switch {
		case err == nil, errors.Is(err, os.ErrDeadlineExceeded):
		case errors.Is(err, os.ErrClosed):
			return
		case errors.Is(err, unix.ENETDOWN):
			// The interface went down; it may come back.
		default:
			h.f.fail(fmt.Errorf("lab: forwarder %v: %w", h.dir, err))
			return
		}
		if im := h.impair.Load(); im != h.im {
			if h.im = im; im.Seed != 0 {
				h.rng = rand.New(rand.NewPCG(im.Seed, uint64(h.dir)))
			}
		}
		for _, b := range frames {
			h.receive(b)
		}
		h.expire()
		h.flush()
	}
}

// countDrops fetches the kernel's counter, which starts anew at every reading.
func (h *half) countDrops() {
	if n, err := h.in.Drops(); err == nil {
		h.c.kernelDrops.Add(uint64(n))
	}
}

// deadline returns when the next frame that waits is due, the zero time if none
// does.
func (h *half) deadline() (t time.Time) {
	earlier := func(u time.Time) {
		if t.IsZero() || u.Before(t) {
			t = u
		}
	}
	if h.merge != nil {
		earlier(h.mergeT)
	}
	for i := range h.held {
		earlier(h.held[i].until)
	}
	if len(h.queue) > 0 {
		earlier(h.queue[0].at)
	}
	return t
}

// copyOf returns a copy of b that outlives the batch; retire gives it back.
func (h *half) copyOf(b []byte) []byte {
	var c []byte
	if n := len(h.free); n > 0 {
		c, h.free = h.free[n-1], h.free[:n-1]
	}
	return append(c[:0], b...)
}

const maxFree = 1024

func (h *half) retire(b []byte) {
	if len(h.free) < maxFree {
		h.free = append(h.free, b)
	}
}

// receive takes a frame from the wire through hook and impairments. b is valid
// until the end of the batch.
func (h *half) receive(b []byte) {
	h.c.received.Add(1)
	h.c.receivedBytes.Add(uint64(len(b)))
	h.f.tapped(Link(h.dir), h.dir, b)
	if h.hook != nil {
		switch h.hook(h.dir, b) {
		case Drop:
			h.c.hookDropped.Add(1)
			return
		case Duplicate:
			h.c.duplicated.Add(1)
			h.fit(b)
			h.fit(b)
			return
		case Bypass:
			h.fit(b)
			return
		case HoldBack:
			if len(b)-frame.EthLen <= h.mtu {
				h.hold(b)
			} else {
				h.fit(b)
			}
			return
		}
	}
	x, ok := frame.Parse(b)
	if !ok || !x.TCP {
		h.fit(b)
		return
	}
	if len(b)-x.L3 > h.mtu && x.End-x.L3 > h.mtu {
		h.segment(&x, b, h.cutStage)
		return
	}
	h.cutStage(&x, b)
}

// fit sends a frame that skips the impairments.
func (h *half) fit(b []byte) {
	x, ok := frame.Parse(b)
	switch {
	case !ok || x.L4 == 0 || x.End-x.L3 <= h.mtu:
		h.emit(b)
	case x.TCP:
		h.segment(&x, b, func(_ *frame.Info, p []byte) { h.emit(p) })
	default:
		h.c.oversize.Add(1)
	}
}

// segment does what the sender left to segmentation offload.
func (h *half) segment(x *frame.Info, b []byte, next func(*frame.Info, []byte)) {
	size := h.mtu - (x.Data - x.L3)
	n := x.End - x.Data
	if size <= 0 {
		h.c.oversize.Add(1)
		return
	}
	for id, at := 0, 0; at < n; id, at = id+1, at+size {
		h.piece(x, b, at, min(at+size, n), id, next)
	}
}

// piece makes a segment of some of the payload of b and passes it on.
func (h *half) piece(x *frame.Info, b []byte, from, to, id int, next func(*frame.Info, []byte)) {
	p := x.Cut(h.copyOf(nil), b, from, to, id)
	h.spent = append(h.spent, p)
	if y, ok := frame.Parse(p); ok {
		next(&y, p)
	}
}

func (h *half) chance(p float64) bool { return p > 0 && h.rng.Float64() < p }

// cutStage strips options and cuts.
func (h *half) cutStage(x *frame.Info, b []byte) {
	flags := x.Flags(b)
	if len(h.im.Strip) > 0 {
		h.strip(x, b, kindOf(flags))
	}
	n := x.End - x.Data
	if n < 2 || flags&(frame.SYN|frame.URG|frame.RST) != 0 || !h.chance(h.im.Cut) || !x.ChecksumOK(b) {
		h.coalesceStage(x, b)
		return
	}
	h.c.cut.Add(1)
	pieces := 2 + h.rng.IntN(h.im.CutPieces-1)
	for id, at := 0, 0; at < n; id++ {
		end := n
		if id < pieces-1 && n-at > 1 {
			end = at + 1 + h.rng.IntN(n-at-1)
		}
		h.piece(x, b, at, end, id, h.coalesceStage)
		at = end
	}
}

func (h *half) strip(x *frame.Info, b []byte, kind Segments) {
	ok := x.ChecksumOK(b)
	opts := x.Options(b)
	n := uint64(0)
	for _, s := range h.im.Strip {
		if s.From != 0 && s.From&kind == 0 {
			continue
		}
		frame.EachOption(opts, func(o frame.Option) bool {
			if o.Kind == s.Kind {
				n++
				for i := range o.Len {
					opts[o.At+i] = frame.OptNOP
				}
			}
			return true
		})
	}
	// A checksum that was wrong stays wrong.
	if n > 0 && ok {
		x.FixChecksums(b)
	}
	h.c.stripped.Add(n)
}

// coalesceStage merges b with the segment that waits, and may let b wait.
func (h *half) coalesceStage(x *frame.Info, b []byte) {
	if h.merge != nil {
		if h.mergeable(x, b) {
			h.c.coalesced.Add(1)
			p := h.mergeX.Join(h.copyOf(nil), h.merge, x, b)
			h.spent = append(h.spent, p, h.merge)
			h.merge = nil
			if y, ok := frame.Parse(p); ok {
				h.coalesceStage(&y, p)
			}
			return
		}
		h.unmerge()
	}
	if x.Data < x.End && x.Flags(b)&(frame.SYN|frame.FIN|frame.RST|frame.URG) == 0 && h.chance(h.im.Coalesce) && x.ChecksumOK(b) {
		h.merge = h.copyOf(b)
		h.mergeX, h.mergeT = *x, time.Now().Add(coalesceTime)
		return
	}
	h.loseStage(x, b)
}

// unmerge lets the waiting segment go on alone.
func (h *half) unmerge() {
	b := h.merge
	h.merge = nil
	h.spent = append(h.spent, b)
	h.loseStage(&h.mergeX, b)
}

func (h *half) mergeable(x *frame.Info, b []byte) bool {
	a := &h.mergeX
	return a.Src(h.merge) == x.Src(b) && a.Dst(h.merge) == x.Dst(b) && a.L3 == x.L3 &&
		x.Flags(b)&(frame.SYN|frame.RST|frame.URG) == 0 &&
		x.Data < x.End && x.Seq(b) == a.Seq(h.merge)+uint32(a.End-a.Data) &&
		x.End-x.L3+a.End-a.Data <= h.mtu && x.ChecksumOK(b)
}

// loseStage drops, corrupts, duplicates and reorders.
func (h *half) loseStage(x *frame.Info, b []byte) {
	im := h.im
	if h.chance(im.Drop) {
		h.c.dropped.Add(1)
		return
	}
	if h.chance(im.Corrupt) {
		h.corrupt(x, b)
	}
	if h.chance(im.Duplicate) {
		h.c.duplicated.Add(1)
		h.emit(b)
	}
	if h.chance(im.Reorder) {
		h.hold(b)
		return
	}
	h.emit(b)
}

func (h *half) corrupt(x *frame.Info, b []byte) {
	from := x.L4
	if h.im.CorruptHidden {
		from = x.Data
	}
	if from == x.End {
		return
	}
	h.c.corrupted.Add(1)
	bit := h.rng.IntN((x.End - from) * 8)
	b[from+bit/8] ^= 1 << (bit % 8)
	if h.im.CorruptHidden {
		x.FixChecksums(b)
	}
}

func (h *half) hold(b []byte) {
	if len(h.held) >= maxHeld {
		h.emit(b)
		return
	}
	h.c.reordered.Add(1)
	h.held = append(h.held, heldFrame{h.copyOf(b), h.im.ReorderPackets, time.Now().Add(h.im.ReorderTime)})
}

// emit passes a frame on to the queue or to the wire, and after it those that
// have been overtaken often enough.
func (h *half) emit(b []byte) {
	h.enqueue(b)
	for i := 0; i < len(h.held); {
		h.held[i].after--
		if h.held[i].after > 0 {
			i++
			continue
		}
		h.release(i)
	}
}

func (h *half) release(i int) {
	b := h.held[i].b
	h.held = append(h.held[:i], h.held[i+1:]...)
	h.spent = append(h.spent, b)
	h.enqueue(b)
}

func (h *half) enqueue(b []byte) {
	im := h.im
	if im.Rate <= 0 && im.Delay <= 0 && len(h.queue) == 0 {
		h.ready = append(h.ready, b)
		return
	}
	if h.queued+len(b) > im.QueueBytes {
		h.c.overflow.Add(1)
		return
	}
	at := time.Now()
	if im.Rate > 0 {
		if h.busy.After(at) {
			at = h.busy
		}
		at = at.Add(time.Duration(float64(len(b)) * 8 / im.Rate * float64(time.Second)))
		h.busy = at
	}
	at = at.Add(im.Delay)
	if n := len(h.queue); n > 0 && at.Before(h.queue[n-1].at) {
		at = h.queue[n-1].at
	}
	h.queued += len(b)
	h.queue = append(h.queue, queuedFrame{h.copyOf(b), at})
}

// expire lets go what waited long enough.
func (h *half) expire() {
	if h.merge == nil && len(h.held) == 0 && len(h.queue) == 0 {
		return
	}
	now := time.Now()
	if h.merge != nil && !now.Before(h.mergeT) {
		h.unmerge()
	}
	for i := 0; i < len(h.held); {
		if now.Before(h.held[i].until) {
			i++
			continue
		}
		h.release(i)
	}
	n := 0
	for n < len(h.queue) && !now.Before(h.queue[n].at) {
		b := h.queue[n].b
		h.queued -= len(b)
		h.spent = append(h.spent, b)
		h.ready = append(h.ready, b)
		n++
	}
	h.queue = append(h.queue[:0], h.queue[n:]...)
}

// flush sends what is ready.
func (h *half) flush() {
	if len(h.ready) > 0 {
		_ = h.send(h.ready...)
		h.ready = h.ready[:0]
	}
	for _, b := range h.spent {
		h.retire(b)
	}
	h.spent = h.spent[:0]
}

func (h *half) send(frames ...[]byte) error {
	h.outMu.Lock()
	defer h.outMu.Unlock()
	n := 0
	for _, b := range frames {
		n += len(b)
		h.f.tapped(Link(h.dir.Reverse()), h.dir, b)
	}
	sent, err := h.out.Send(frames...)
	h.c.sent.Add(uint64(sent))
	h.c.sentBytes.Add(uint64(n))
	h.c.sendErrors.Add(uint64(len(frames) - sent))
	return err
}
