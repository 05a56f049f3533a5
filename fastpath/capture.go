package fastpath

import (
	"context"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// captureQueue is how many packets of a capture may wait to be written.
const captureQueue = 4096

// CaptureConfig selects the packets of a capture.
type CaptureConfig struct {
	// Local and Remote are the endpoints of one flow; both zero: all flows that
	// are diverted to the daemon.
	Local, Remote netip.AddrPort
	Wire          bool // packets between the daemon and the NIC
	Inner         bool // packets between the daemon and the local stack
	Snap          int  // most bytes of a packet; 0: all
}

// Captured is one packet of a capture.
type Captured struct {
	At    time.Time `json:"at"`
	Inner bool      `json:"inner"` // between the daemon and the local stack, and so in plaintext
	Out   bool      `json:"out"`   // towards the wire
	Len   int       `json:"len"`   // bytes of the packet, of which Frame may have less
	Lost  uint64    `json:"lost"`  // packets of the capture that were lost before this one
	Frame []byte    `json:"frame"` // from the Ethernet header on
}

// capture is a running capture. The engines fill its queue, and lose what does
// not fit: a slow reader slows no flow down.
type capture struct {
	cfg   CaptureConfig
	one   bool // one flow only
	queue chan Captured
	lost  atomic.Uint64
}

func (c *capture) wants(inner bool, k *packet.Key) bool {
	if inner && !c.cfg.Inner || !inner && !c.cfg.Wire {
		return false
	}
	return !c.one || k.LocalAddr() == c.cfg.Local && k.RemoteAddr() == c.cfg.Remote
}

// tap gives a packet of the flow k to the captures that want it; part after
// part makes up the frame, in which the TCP checksum is completed when fix is
// set.
func (e *Engine) tap(inner, out bool, k *packet.Key, fix *outMeta, parts ...[]byte) {
	for _, c := range e.captures {
		if !c.wants(inner, k) {
			continue
		}
		f := slices.Concat(parts...)
		if fix != nil {
			packet.FullChecksum(f, int(fix.l3), int(fix.l4), fix.v6)
		}
		p := Captured{At: time.Now(), Inner: inner, Out: out, Len: len(f), Lost: c.lost.Load(), Frame: f}
		if c.cfg.Snap > 0 && len(f) > c.cfg.Snap {
			p.Frame = f[:c.cfg.Snap]
		}
		select {
		case c.queue <- p:
		default:
			c.lost.Add(1)
		}
	}
}

// tapOut captures the vector that goes to the wire.
func (e *Engine) tapOut() {
	var s packet.Segment
	for i := range e.out {
		f := e.umem.Bytes(e.out[i].Addr, int(e.out[i].Len))
		if packet.Parse(f, packet.FromInner, &s) == nil {
			e.tap(false, true, &s.Key, &e.outMeta[i], f)
		}
	}
}

// tapIn captures the vector that goes to the local stack.
func (e *Engine) tapIn() {
	var s packet.Segment
	for i := range e.in[:e.nIn] {
		parts := append([][]byte{e.in[i].Header()[xdp.VnetHdrLen:]}, e.in[i].data...)
		f := slices.Concat(parts...)
		var x packet.L3Info
		if packet.Parse(f, packet.FromOuter, &s) == nil && packet.ParseL3(f, &x) == nil {
			e.tap(true, false, &s.Key, &outMeta{l3: uint8(x.L3), l4: uint8(x.L4), v6: x.V6}, f)
		}
	}
}

// Capture gives fn the packets that cfg selects, as they come, until ctx is done,
// the host ends, or fn fails; it returns the error of fn, and how many packets fn
// was too slow for: they are lost. Packets that came before ctx was done are given
// to fn before Capture returns. What this host makes has the right TCP checksums,
// also where the device or the kernel fills them in later. A super-segment that
// the local stack hands down, or takes, is one packet.
func (h *Host) Capture(ctx context.Context, cfg CaptureConfig, fn func(*Captured) error) (lost uint64, err error) {
	cfg.Local, cfg.Remote = unmapped(cfg.Local), unmapped(cfg.Remote)
	c := &capture{cfg: cfg, one: cfg.Local.IsValid() || cfg.Remote.IsValid(), queue: make(chan Captured, captureQueue)}
	h.each(func(w *worker) { w.eng.captures = append(w.eng.captures, c) })
	for running := true; running && err == nil; {
		select {
		case p := <-c.queue:
			err = fn(&p)
		case <-ctx.Done():
			running = false
		case <-h.done:
			running = false
		}
	}
	h.each(func(w *worker) {
		w.eng.captures = slices.DeleteFunc(w.eng.captures, func(x *capture) bool { return x == c })
	})
	// No engine fills the queue any more.
	for err == nil && len(c.queue) > 0 {
		p := <-c.queue
		err = fn(&p)
	}
	return c.lost.Load(), err
}

func unmapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
