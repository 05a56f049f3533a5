package peer

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
)

// Host is a user-space TCP host on one interface, with the interface's MAC
// address and the addresses that the lab set aside for it.
type Host struct {
	ifc  *lab.Iface
	sock *lab.PacketSocket
	done chan struct{}

	mu         sync.Mutex
	closed     bool
	err        error
	neighbours map[netip.Addr]net.HardwareAddr
	learned    chan struct{} // closed and replaced when neighbours grows
	conns      map[pairKey]*Conn
	listeners  map[uint16]*Listener
	nextPort   uint16
	rng        *rand.Rand
	acks       []*Conn // to acknowledge at the end of a batch
}

type pairKey struct{ local, remote netip.AddrPort }

// ErrClosed says that the host was closed.
var ErrClosed = errors.New("peer: host closed")

// Open starts a host on an interface that was made with
// lab.EndOptions.NoAddress. It stops at Close or when the lab is closed.
func Open(i *lab.Iface) (*Host, error) {
	s, err := i.OpenPacket()
	if err != nil {
		return nil, err
	}
	h := &Host{
		ifc: i, sock: s, done: make(chan struct{}),
		neighbours: map[netip.Addr]net.HardwareAddr{}, learned: make(chan struct{}),
		conns: map[pairKey]*Conn{}, listeners: map[uint16]*Listener{},
		nextPort: 40000, rng: rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())),
	}
	go h.run()
	i.NS.Lab().AtClose(h.Close)
	return h, nil
}

// Close ends the host; its connections fail with ErrClosed and send nothing
// more. It returns the error that stopped the host earlier, if one did.
func (h *Host) Close() error {
	h.mu.Lock()
	if !h.closed {
		h.closed = true
		for _, c := range h.conns {
			c.fail(ErrClosed)
		}
		for _, l := range h.listeners {
			close(l.accept)
		}
		clear(h.listeners)
		_ = h.sock.Close()
	}
	h.mu.Unlock()
	<-h.done
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.err
}

// Addr4 and Addr6 return the host's addresses.
func (h *Host) Addr4() netip.Addr { return h.ifc.Addr4() }

// Addr6 returns the host's IPv6 address.
func (h *Host) Addr6() netip.Addr { return h.ifc.Addr6() }

func (h *Host) run() {
	defer close(h.done)
	for {
		frames, err := h.sock.Receive(noDeadline)
		if err != nil {
			h.mu.Lock()
			if !h.closed {
				h.err = fmt.Errorf("peer: %w", err)
				for _, c := range h.conns {
					c.fail(h.err)
				}
			}
			h.mu.Unlock()
			return
		}
		h.mu.Lock()
		for _, b := range frames {
			h.receive(b)
		}
		for _, c := range h.acks {
			if c.ackDue {
				c.sendACK()
			}
		}
		h.acks = h.acks[:0]
		h.mu.Unlock()
	}
}

// send transmits a frame. Errors of the interface are what a lost frame is.
func (h *Host) send(b []byte) {
	if _, err := h.sock.Send(b); errors.Is(err, os.ErrClosed) {
		return
	}
}

func (h *Host) receive(b []byte) {
	if h.closed {
		return
	}
	n, answer := frame.AnswerNeighbour(b, h.ifc.MAC, h.Addr4(), h.Addr6())
	if n.MAC != nil && h.neighbours[n.Addr] == nil {
		h.neighbours[n.Addr] = n.MAC
		close(h.learned)
		h.learned = make(chan struct{})
	}
	if answer != nil {
		h.send(answer)
		return
	}
	x, ok := frame.Parse(b)
	if !ok || !x.TCP {
		return
	}
	local, remote := x.Dst(b), x.Src(b)
	if a := local.Addr(); a != h.Addr4() && a != h.Addr6() {
		return
	}
	if !x.ChecksumOK(b) {
		return
	}
	// Whoever sends us TCP can be answered without asking for its address.
	if h.neighbours[remote.Addr()] == nil {
		h.neighbours[remote.Addr()] = append(net.HardwareAddr(nil), b[6:12]...)
	}
	c := h.conns[pairKey{local, remote}]
	flags := x.Flags(b)
	fresh := flags&(frame.SYN|frame.ACK|frame.RST) == frame.SYN
	if fresh && (c == nil || c.state == stateClosed && x.Seq(b) != c.irs) {
		l := h.listeners[local.Port()]
		if l == nil {
			s := h.segment(local, remote)
			s.Ack, s.Flags = x.Seq(b)+1, frame.RST|frame.ACK
			h.send(s.Append(nil))
			return
		}
		c = h.newConn(local, remote, l.cfg)
		c.listener = l
		c.passive = true
	}
	if c != nil {
		c.receive(&x, b)
	}
}

func (h *Host) segment(local, remote netip.AddrPort) frame.Segment {
	return frame.Segment{SrcMAC: h.ifc.MAC, DstMAC: h.neighbours[remote.Addr()], Src: local, Dst: remote, ID: uint16(h.rng.Uint32())}
}

// resolve waits until the link-layer address of a is known.
func (h *Host) resolve(ctx context.Context, a netip.Addr) error {
	for {
		h.mu.Lock()
		mac, learned := h.neighbours[a], h.learned
		if mac == nil && !h.closed {
			if a.Is4() {
				h.send(frame.AppendARPRequest(nil, h.ifc.MAC, h.Addr4(), a))
			} else {
				h.send(frame.AppendSolicitation(nil, h.ifc.MAC, h.Addr6(), a))
			}
		}
		closed := h.closed
		h.mu.Unlock()
		if mac != nil {
			return nil
		}
		if closed {
			return ErrClosed
		}
		again, cancel := context.WithTimeout(ctx, neighbourRetry)
		select {
		case <-learned:
		case <-again.Done():
		}
		cancel()
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("peer: no link-layer address for %v: %w", a, err)
		}
	}
}

// Dial opens a connection and waits until it is encrypted, or plain TCP, or has
// failed. The Conn is not nil, so that the test can look at its Report, unless
// the host itself is the problem.
func (h *Host) Dial(ctx context.Context, remote netip.AddrPort, cfg Config) (*Conn, error) {
	if err := h.resolve(ctx, remote.Addr()); err != nil {
		return nil, err
	}
	self := h.Addr4()
	if remote.Addr().Is6() {
		self = h.Addr6()
	}
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return nil, ErrClosed
	}
	port := cfg.LocalPort
	if port == 0 {
		h.nextPort++
		port = h.nextPort
	}
	c := h.newConn(netip.AddrPortFrom(self, port), remote, cfg)
	c.connect()
	h.mu.Unlock()
	return c, c.WaitReady(ctx)
}

// Listener takes connections at one port.
type Listener struct {
	h      *Host
	port   uint16
	cfg    Config
	accept chan *Conn
}

// Listen takes connections at a port, all with the same configuration. At most
// 128 wait for Accept; further ones run unattended.
func (h *Host) Listen(port uint16, cfg Config) (*Listener, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, ErrClosed
	}
	if h.listeners[port] != nil {
		return nil, fmt.Errorf("peer: port %d is taken", port)
	}
	l := &Listener{h: h, port: port, cfg: cfg, accept: make(chan *Conn, 128)}
	h.listeners[port] = l
	return l, nil
}

// Close stops listening.
func (l *Listener) Close() {
	l.h.mu.Lock()
	defer l.h.mu.Unlock()
	if l.h.listeners[l.port] == l {
		delete(l.h.listeners, l.port)
		close(l.accept)
	}
}

// Accept returns the next connection as soon as its SYN has come in; see
// WaitReady.
func (l *Listener) Accept(ctx context.Context) (*Conn, error) {
	select {
	case c, ok := <-l.accept:
		if !ok {
			return nil, ErrClosed
		}
		return c, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("peer: no connection: %w", ctx.Err())
	}
}

// AcceptReady is Accept and WaitReady.
func (l *Listener) AcceptReady(ctx context.Context) (*Conn, error) {
	c, err := l.Accept(ctx)
	if err != nil {
		return nil, err
	}
	return c, c.WaitReady(ctx)
}
