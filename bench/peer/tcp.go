package peer

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
)

// Reasons why a connection ended other than by FIN on both sides (Report.Err).
var (
	ErrReset   = errors.New("peer: reset by the other side")
	ErrTimeout = errors.New("peer: the other side stopped to acknowledge")
	ErrAborted = errors.New("peer: aborted by the test")
)

type state uint8

const (
	stateSYNSent state = iota
	stateSYNReceived
	stateEstablished
	stateClosed
)

// windowShift is the window scale that is announced.
const windowShift = 7

// Conn is a connection. Offsets count the bytes of a direction's TCP stream from
// 0, the first byte after the SYN.
type Conn struct {
	h             *Host
	cfg           Config
	local, remote netip.AddrPort
	passive       bool
	listener      *Listener
	rng           *rand.Rand
	changed       chan struct{} // closed and replaced at every change of state

	state    state
	iss, irs uint32
	err      error

	// Sending. The FIN counts as one byte at the end of out.
	out     []byte
	fin     bool // FIN follows out
	una     int
	next    int // what pump sends next; below sent when going back
	sent    int // highest offset ever sent
	bounds  []int
	sizes   []int // sizes of the next new segments
	corked  bool
	inits   int // length of the own Init message
	frameTo []int
	wnd     int // peer's window from una
	scale   uint8
	peerMSS int
	dupACKs int

	timer   *time.Timer
	armed   bool
	retries int

	// Receiving.
	in      []byte
	early   map[int][]byte // out of order
	finAt   int            // offset of the peer's FIN, -1 when unknown
	finIn   bool
	pushed  [][2]int // segments with PSH, until the Init message is complete
	ackDue  bool
	window  int
	edge    int // right edge announced
	tsRecv  uint32
	tsOK    bool
	tsStart time.Time
	nonSYN  bool // a non-SYN segment was received

	crypt
	report Report
}

func (h *Host) newConn(local, remote netip.AddrPort, cfg Config) *Conn {
	cfg.setDefaults(h.ifc.MTU, local.Addr().Is6())
	c := &Conn{
		h: h, cfg: cfg, local: local, remote: remote,
		rng:     rand.New(rand.NewPCG(uint64(local.Port()), uint64(remote.Port()))),
		changed: make(chan struct{}), iss: h.rng.Uint32(),
		early: map[int][]byte{}, finAt: -1, window: cfg.Window,
		peerMSS: 536, tsStart: time.Now(),
	}
	c.timer = time.AfterFunc(time.Hour, c.onTimer)
	c.disarm()
	c.report.Anomalies = map[string]int{}
	h.conns[pairKey{local, remote}] = c
	return c
}

// LocalAddr and RemoteAddr return the connection's endpoints.
func (c *Conn) LocalAddr() netip.AddrPort { return c.local }

// RemoteAddr returns the other endpoint.
func (c *Conn) RemoteAddr() netip.AddrPort { return c.remote }

func (c *Conn) notify() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// wait waits until cond, which is called with the host locked, is true.
func (c *Conn) wait(ctx context.Context, what string, cond func() bool) error {
	for {
		c.h.mu.Lock()
		ok, changed, err := cond(), c.changed, c.err
		closed := c.state == stateClosed
		c.h.mu.Unlock()
		if ok {
			return nil
		}
		if closed {
			if err == nil {
				err = errors.New("the connection is closed")
			}
			return fmt.Errorf("peer: waiting for %s: %w", what, err)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("peer: waiting for %s: %w", what, ctx.Err())
		}
	}
}

func (c *Conn) seq(off int) uint32 { return c.iss + 1 + uint32(off) }

// base makes a segment with everything but flags, payload and special options.
func (c *Conn) base(off int) frame.Segment {
	s := c.h.segment(c.local, c.remote)
	s.Seq = c.seq(off)
	if c.state != stateSYNSent {
		s.Ack, s.Flags = c.ackNumber(), frame.ACK
	}
	return s
}

func (c *Conn) ackNumber() uint32 {
	n := c.irs + 1 + uint32(len(c.in))
	if c.finIn {
		n++
	}
	return n
}

// windowField composes the window so that the right edge never retreats.
func (c *Conn) windowField(syn bool) uint16 {
	c.edge = max(c.edge, len(c.in)+c.window)
	w := c.edge - len(c.in)
	if c.scaled() && !syn {
		w >>= windowShift
	}
	return uint16(min(w, 65535))
}

func (c *Conn) scaled() bool { return c.report.scaleSeen && !c.cfg.NoScale }

func (c *Conn) timestamps(opts []byte) []byte {
	if !c.cfg.Timestamps || c.state != stateSYNSent && !c.tsOK {
		return opts
	}
	opts = append(opts, frame.OptNOP, frame.OptNOP, frame.OptTimestamp, 10)
	opts = binary.BigEndian.AppendUint32(opts, uint32(time.Since(c.tsStart).Milliseconds())+1)
	return binary.BigEndian.AppendUint32(opts, c.tsRecv)
}

// transmit sends a segment unless the hook loses it.
func (c *Conn) transmit(s *frame.Segment, off int, again bool) {
	if c.cfg.OnSend != nil && !c.cfg.OnSend(&Out{s, off, again}) {
		return
	}
	c.h.send(s.Append(nil))
}

// connect sends the SYN.
func (c *Conn) connect() {
	c.startENO()
	c.sendSYN()
	c.arm(c.cfg.RTO)
}

func (c *Conn) sendSYN() {
	s := c.h.segment(c.local, c.remote)
	s.Seq, s.Flags = c.iss, frame.SYN
	if c.state == stateSYNReceived {
		s.Ack, s.Flags = c.ackNumber(), frame.SYN|frame.ACK
	}
	s.Window = c.windowField(true)
	s.Options = binary.BigEndian.AppendUint16([]byte{frame.OptMSS, 4}, uint16(c.cfg.MSS))
	if !c.cfg.NoScale && (c.state == stateSYNSent || c.report.scaleSeen) {
		s.Options = append(s.Options, frame.OptNOP, frame.OptWScale, 3, windowShift)
	}
	s.Options = c.timestamps(s.Options)
	s.Options = append(s.Options, c.cfg.Options...)
	if c.eno.offered {
		s.Options = append(s.Options, c.report.ENOLocal...)
	}
	c.transmit(&s, -1, c.retries > 0)
}

// sendACK sends a segment without data.
func (c *Conn) sendACK() {
	c.ackDue = false
	s := c.base(c.sentOrAcked())
	s.Window = c.windowField(false)
	s.Options = c.enoACK(c.timestamps(nil))
	c.transmit(&s, c.sentOrAcked(), false)
}

func (c *Conn) sentOrAcked() int { return max(c.sent, c.una) }

func (c *Conn) ackLater() {
	if !c.ackDue {
		c.ackDue = true
		c.h.acks = append(c.h.acks, c)
	}
}

// end is the offset behind everything to be sent, FIN included.
func (c *Conn) end() int {
	if c.fin {
		return len(c.out) + 1
	}
	return len(c.out)
}

// pump sends what the windows allow.
func (c *Conn) pump() {
	for c.state == stateEstablished && !c.corked && c.next < c.end() {
		room := min(c.una+c.wnd, c.una+c.cfg.Flight) - c.next
		if room <= 0 {
			break
		}
		c.sendData(c.next, room)
	}
	if c.una < c.end() && c.state == stateEstablished && !c.armed {
		c.arm(c.rto())
	}
}

// sendData sends one segment from offset off, of at most room bytes.
func (c *Conn) sendData(off, room int) {
	s := c.base(off)
	s.Options = c.enoACK(c.timestamps(nil))
	limit := min(c.cfg.MSS, c.peerMSS) - (len(s.Options)+3)&^3
	again := off < c.sent
	n := 0
	if off < len(c.out) {
		n = min(c.segmentSize(off), limit, room, len(c.out)-off)
	}
	to := off + n
	s.Payload = c.out[off:to]
	s.Window = c.windowField(false)
	if to == len(c.out) || off < c.inits && to >= c.inits {
		s.Flags |= frame.PSH
	}
	if to == len(c.out) && c.fin && room > n {
		s.Flags |= frame.FIN
		to++
	}
	if !again {
		c.bounds = append(c.bounds, to)
	}
	c.ackDue = false
	c.next = to
	c.sent = max(c.sent, to)
	if again {
		c.report.Retransmits++
	}
	c.transmit(&s, off, again)
}

// segmentSize decides where the segment that starts at off ends.
func (c *Conn) segmentSize(off int) int {
	switch {
	case off < c.sent && c.cfg.Resegment:
		return 1 + c.rng.IntN(c.cfg.SegmentSize)
	case off < c.sent:
		i, _ := slices.BinarySearch(c.bounds, off+1)
		if i < len(c.bounds) {
			return c.bounds[i] - off
		}
	case len(c.sizes) > 0:
		n := c.sizes[0]
		c.sizes = c.sizes[1:]
		return max(n, 1)
	case off < c.inits && len(c.cfg.InitSplit) > 0:
		n := c.cfg.InitSplit[0]
		if len(c.cfg.InitSplit) > 1 {
			c.cfg.InitSplit = c.cfg.InitSplit[1:]
		}
		return max(min(n, c.inits-off), 1)
	}
	n := c.cfg.SegmentSize
	if c.cfg.SegmentRandom {
		n = 1 + c.rng.IntN(n)
	}
	if c.cfg.Align {
		if i, _ := slices.BinarySearch(c.frameTo, off+1); i < len(c.frameTo) {
			n = min(n, c.frameTo[i]-off)
		}
	}
	return n
}

func (c *Conn) rto() time.Duration { return min(c.cfg.RTO<<min(c.retries, 6), maxRTO) }

func (c *Conn) arm(d time.Duration) {
	c.armed = true
	c.timer.Reset(d)
}

func (c *Conn) disarm() {
	c.armed = false
	c.timer.Stop()
}

func (c *Conn) onTimer() {
	c.h.mu.Lock()
	defer c.h.mu.Unlock()
	c.armed = false
	if c.state == stateClosed || c.state == stateEstablished && c.una >= c.end() {
		return
	}
	if c.retries++; c.retries > maxRetries {
		c.fail(ErrTimeout)
		return
	}
	if c.state != stateEstablished {
		c.sendSYN()
		c.arm(c.rto())
		return
	}
	if c.corked {
		c.arm(c.rto())
		return
	}
	// Go back, and at a window of zero probe with one byte.
	c.next = c.una
	if c.wnd == 0 {
		c.sendData(c.next, 1)
		c.arm(c.rto())
		return
	}
	c.pump()
}

// fail ends the connection with a reason.
func (c *Conn) fail(err error) {
	if c.state == stateClosed {
		return
	}
	c.state = stateClosed
	if c.err == nil {
		c.err = err
	}
	c.disarm()
	c.notify()
}

// reset aborts the connection: RST to the other side, err for the test.
func (c *Conn) reset(err error) {
	if c.state == stateClosed {
		return
	}
	s := c.base(c.sentOrAcked())
	s.Flags |= frame.RST
	c.transmit(&s, c.sentOrAcked(), false)
	c.fail(err)
}

// receive takes a segment of the connection.
func (c *Conn) receive(x *frame.Info, b []byte) {
	if c.cfg.OnReceive != nil && !c.cfg.OnReceive(&In{x, b}) {
		return
	}
	flags := x.Flags(b)
	opts := x.Options(b)
	if d, ok := frame.FindOption(opts, frame.OptTimestamp); ok && len(d) == 8 {
		c.tsRecv = binary.BigEndian.Uint32(d)
		if flags&frame.SYN != 0 {
			c.tsOK = c.cfg.Timestamps
		}
	}
	if c.passive && c.state == stateSYNSent {
		c.acceptSYN(x, b)
		return
	}
	if flags&frame.RST != 0 {
		c.receiveRST(x, b)
		return
	}
	if flags&frame.SYN != 0 {
		c.receiveSYN(x, b)
		return
	}
	if c.state == stateSYNSent {
		return
	}
	if c.state == stateClosed {
		if x.Data < x.End || flags&frame.FIN != 0 {
			if c.err == nil {
				c.ackLater()
			}
		}
		return
	}
	if flags&frame.ACK == 0 || c.state == stateSYNReceived && x.Ack(b) != c.seq(0) {
		return
	}
	c.firstNonSYN(x, b)
	c.receiveACK(x, b)
	c.receiveData(x, b)
	c.closeIfDone()
}

// acceptSYN begins a passive connection.
func (c *Conn) acceptSYN(x *frame.Info, b []byte) {
	c.irs = x.Seq(b)
	c.state = stateSYNReceived
	c.synOptions(x, b)
	c.wnd = int(x.Window(b))
	c.answerENO(x.Options(b))
	c.checkSYNData(x)
	if c.state != stateClosed {
		c.sendSYN()
		c.arm(c.cfg.RTO)
	}
	select {
	case c.listener.accept <- c:
	default:
	}
}

func (c *Conn) synOptions(x *frame.Info, b []byte) {
	frame.EachOption(x.Options(b), func(o frame.Option) bool {
		switch {
		case o.Kind == frame.OptMSS && len(o.Data) == 2:
			c.peerMSS = int(binary.BigEndian.Uint16(o.Data))
		case o.Kind == frame.OptWScale && len(o.Data) == 1:
			c.report.scaleSeen = true
			if !c.cfg.NoScale {
				c.scale = min(o.Data[0], 14)
			}
		}
		return true
	})
	c.report.PeerMSS = c.peerMSS
}

// checkSYNData: no TEP of RFC 8548 defines data in a SYN that carries ENO (RFC
// 8547 section 4.7).
func (c *Conn) checkSYNData(x *frame.Info) {
	if x.Data < x.End && c.report.ENORemote != nil {
		c.anomaly("data_in_syn")
	}
}

// receiveSYN takes a SYN-ACK, or a copy of a SYN.
func (c *Conn) receiveSYN(x *frame.Info, b []byte) {
	flags := x.Flags(b)
	if c.state == stateSYNSent {
		if flags&frame.ACK == 0 || x.Ack(b) != c.seq(0) {
			return
		}
		c.irs = x.Seq(b)
		c.synOptions(x, b)
		c.wnd = int(x.Window(b))
		c.state = stateEstablished
		c.retries = 0
		c.disarm()
		c.finishENO(x.Options(b))
		c.checkSYNData(x)
		if c.state == stateClosed {
			return
		}
		if !c.cfg.Piggyback || len(c.out) == 0 {
			c.sendACK()
		}
		c.pump()
		c.notify()
		return
	}
	if o := enoOptions(x.Options(b)); c.report.ENORemote != nil && (len(o) != 1 || !bytes.Equal(o[0], c.report.ENORemote)) {
		c.anomaly("syn_eno_altered")
	}
	if c.state == stateSYNReceived && flags&frame.ACK == 0 {
		c.sendSYN()
		return
	}
	if c.state == stateEstablished {
		c.sendACK()
	}
}

func (c *Conn) receiveRST(x *frame.Info, b []byte) {
	if c.state == stateSYNSent {
		if x.Flags(b)&frame.ACK != 0 && x.Ack(b) == c.seq(0) {
			c.report.RST = true
			c.fail(ErrReset)
		}
		return
	}
	off := int(int32(x.Seq(b) - (c.irs + 1 + uint32(len(c.in)))))
	c.report.RSTOffset = len(c.in) + off
	if off >= 0 && off <= c.window {
		c.report.RST = true
		c.fail(ErrReset)
	} else {
		c.anomaly("rst_out_of_window")
	}
	c.notify()
}

func (c *Conn) receiveACK(x *frame.Info, b []byte) {
	ack := c.una + int(int32(x.Ack(b)-c.seq(c.una)))
	if ack > c.sent {
		c.anomaly("ack_beyond_sent")
		return
	}
	wnd := int(x.Window(b)) << c.scale
	if c.state == stateSYNReceived {
		c.state = stateEstablished
		c.retries = 0
		c.disarm()
		c.wnd = wnd
		c.notify()
		c.maybeEnable()
	}
	switch {
	case ack > c.una:
		c.una, c.wnd, c.dupACKs, c.retries = ack, wnd, 0, 0
		c.next = max(c.next, c.una)
		c.disarm()
		c.notify()
	case ack == c.una:
		if wnd == c.wnd && x.Data == x.End && c.una < c.sent && x.Flags(b)&frame.FIN == 0 {
			if c.dupACKs++; c.dupACKs == 3 {
				next := c.next
				c.sendData(c.una, c.end()-c.una)
				c.next = max(next, c.next)
			}
		}
		if wnd > 0 && c.wnd == 0 {
			// The byte of the last probe may not have been taken.
			c.next = c.una
		}
		if wnd == 0 {
			c.retries = 0
		}
		c.wnd = wnd
	}
	c.pump()
}

func (c *Conn) receiveData(x *frame.Info, b []byte) {
	data := x.Payload(b)
	off := len(c.in) + int(int32(x.Seq(b)-(c.irs+1+uint32(len(c.in)))))
	fin := x.Flags(b)&frame.FIN != 0
	if len(data) == 0 && !fin {
		// Keep-alives and window probes ask for an answer.
		if off < len(c.in) {
			c.ackLater()
		}
		return
	}
	if fin {
		at := off + len(data)
		if c.finAt >= 0 && c.finAt != at {
			c.anomaly("fin_moved")
		}
		c.finAt = at
		c.report.FIN = true
	}
	c.ackLater()
	if c.report.initIn == 0 && x.Flags(b)&frame.PSH != 0 {
		c.pushed = append(c.pushed, [2]int{off, off + len(data)})
	}
	if c.finIn && len(data) > 0 && off+len(data) > len(c.in) {
		c.anomaly("data_after_fin")
		return
	}
	if off < len(c.in) {
		// Retransmitted bytes must be the same (RFC 8548 section 3.6).
		n := min(len(data), len(c.in)-off)
		if off < 0 || !bytes.Equal(data[:n], c.in[off:off+n]) {
			c.anomaly("retransmit_different_bytes")
			return
		}
		data, off = data[n:], off+n
	}
	if off+len(data) > c.edge {
		c.anomaly("beyond_window")
		data = data[:max(c.edge-off, 0)]
	}
	if len(data) > 0 && (c.early[off] == nil || len(c.early[off]) < len(data)) {
		c.early[off] = bytes.Clone(data)
	}
	c.assemble()
	c.process()
	if c.finAt == len(c.in) && !c.finIn {
		c.finIn = true
		c.receivedFIN()
		c.notify()
	}
}

// assemble moves what is in order from early to in.
func (c *Conn) assemble() {
	for len(c.early) > 0 {
		type piece struct {
			off  int
			data []byte
		}
		var all []piece
		for off, d := range c.early {
			all = append(all, piece{off, d})
		}
		slices.SortFunc(all, func(a, b piece) int { return cmp.Compare(a.off, b.off) })
		if all[0].off > len(c.in) {
			return
		}
		p := all[0]
		delete(c.early, p.off)
		have := min(len(c.in)-p.off, len(p.data))
		if !bytes.Equal(p.data[:have], c.in[p.off:p.off+have]) {
			c.anomaly("retransmit_different_bytes")
		}
		c.in = append(c.in, p.data[have:]...)
	}
}

func (c *Conn) closeIfDone() {
	if c.state == stateEstablished && c.finIn && c.fin && c.una == c.end() {
		if c.ackDue {
			c.sendACK()
		}
		c.fail(nil)
	}
}

func (c *Conn) anomaly(name string) {
	c.report.Anomalies[name]++
	c.notify()
}
