package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"syscall"
	"time"
)

// What must never happen, whatever is done to daemons and wire.
var (
	errCorrupt   = errors.New("the stream is not the one that was sent")
	errTruncated = errors.New("the stream ended early with an end of file")
	errStalled   = errors.New("no progress")
)

const (
	bufferSize = 64 << 10
	headerSize = 16 // magic and number, by which the server finds the plan

	// patience is how long a connection may be without progress. It covers the
	// longest outage and the pause between retransmissions that it leads to.
	patience = 100 * time.Second
)

// ending says how a connection is closed.
type ending int

const (
	orderly     ending = iota // each side when it has sent everything
	clientReset               // the client resets after its bytes
	serverReset               // the server does
	clientFirst               // the server answers only after the client's end of file
	endings
)

// plan is what the two ends of a connection are going to do.
type plan struct {
	id       uint64
	v6       bool
	port     int
	up, down int64
	end      ending
	chunk    int           // bytes of a write
	pause    time.Duration // before a chunk now and then
	lazy     bool          // the receivers pause as well
	idle     time.Duration // before the end
}

func makePlan(rng *rand.Rand, id uint64, ports []int) plan {
	p := plan{
		id: id, v6: rng.IntN(3) == 0, port: ports[rng.IntN(len(ports))],
		up: size(rng), down: size(rng), chunk: 1 << rng.IntN(17), lazy: rng.IntN(8) == 0,
	}
	if rng.IntN(3) == 0 {
		p.end = ending(rng.IntN(int(endings)))
	}
	if rng.IntN(4) == 0 {
		p.pause = time.Duration(rng.IntN(50)) * time.Millisecond
	}
	if rng.IntN(6) == 0 {
		p.idle = time.Duration(rng.IntN(8000)) * time.Millisecond
	}
	p.up = max(p.up, headerSize)
	// Tiny writes of a long stream would take all the time there is.
	p.chunk = max(p.chunk, int(max(p.up, p.down)/2000), 1)
	return p
}

// size is a length in bytes: mostly short, sometimes long, seldom nothing.
func size(rng *rand.Rand) int64 {
	switch n := rng.IntN(20); {
	case n == 0:
		return 0
	case n < 12:
		return rng.Int64N(4 << 10)
	case n < 18:
		return rng.Int64N(200 << 10)
	default:
		return rng.Int64N(6 << 20)
	}
}

// end is one end of a connection.
type end struct {
	c      *net.TCPConn
	p      *plan
	server bool
	eof    chan struct{} // closed when the peer's end of file was read
}

func newEnd(c net.Conn, p *plan, server bool) *end {
	e := &end{c: c.(*net.TCPConn), p: p, server: server, eof: make(chan struct{})}
	// So that an end whose peer was forgotten by its host does not wait for ever.
	_ = e.c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 6})
	return e
}

// run carries the plan out, and closes the connection. got is what came from
// the peer, header included.
func (e *end) run(ctx context.Context, already int64) (got int64, err error) {
	stop := context.AfterFunc(ctx, func() { e.c.Close() })
	defer stop()
	defer e.c.Close()
	sent := make(chan error, 1)
	go func() { sent <- e.send() }()
	got, err = e.receive(already)
	if err == nil {
		close(e.eof)
	} else if !e.resets() {
		// Nothing more will come: do not keep the sender waiting.
		e.c.Close()
	}
	serr := <-sent
	// The kernel tells of a reset once: where the sender was told, the receiver
	// sees an end of file.
	if err == nil || errors.Is(err, errTruncated) && serr != nil && network(serr) {
		err = serr
	}
	return got, err
}

// resets reports whether this end resets the connection.
func (e *end) resets() bool {
	return e.p.end == clientReset && !e.server || e.p.end == serverReset && e.server
}

// expectsReset reports whether the peer does.
func (e *end) expectsReset() bool {
	return e.p.end == clientReset && e.server || e.p.end == serverReset && !e.server
}

func (e *end) send() error {
	total := e.p.up
	if e.server {
		total = e.p.down
	}
	if e.server && e.p.end == clientFirst {
		t := time.NewTimer(patience)
		defer t.Stop()
		select {
		case <-e.eof:
		case <-t.C:
			return fmt.Errorf("%w: the end of the client's stream did not come", errStalled)
		}
	}
	s := stream{e.p.id, e.server}
	rng := rand.New(rand.NewPCG(e.p.id, 1))
	buf := make([]byte, min(int64(e.p.chunk), max(total, 1)))
	for off := int64(0); off < total; {
		b := buf[:min(int64(len(buf)), total-off)]
		s.fill(b, off)
		if e.p.pause > 0 && rng.IntN(16) == 0 {
			time.Sleep(e.p.pause)
		}
		if err := e.c.SetWriteDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		n, err := e.c.Write(b)
		off += int64(n)
		if err != nil {
			return stalled(err, "after sending", off)
		}
	}
	time.Sleep(e.p.idle)
	if e.resets() {
		if err := e.c.SetLinger(0); err != nil {
			return err
		}
		return e.c.Close()
	}
	return e.c.CloseWrite()
}

func (e *end) receive(off int64) (int64, error) {
	total := e.p.down
	if e.server {
		total = e.p.up
	}
	s := stream{e.p.id, !e.server}
	rng := rand.New(rand.NewPCG(e.p.id, 2))
	buf, scratch := make([]byte, bufferSize), make([]byte, bufferSize)
	for {
		if e.p.lazy && rng.IntN(32) == 0 {
			time.Sleep(time.Duration(rng.IntN(100)) * time.Millisecond)
		}
		if err := e.c.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return off, err
		}
		n, err := e.c.Read(buf)
		if cerr := s.check(buf[:n], scratch, off); cerr != nil {
			return off, cerr
		}
		off += int64(n)
		switch {
		case err == io.EOF && off == total && !e.expectsReset():
			return off, nil
		case err == io.EOF:
			return off, fmt.Errorf("%w after %d of %d bytes", errTruncated, off, total)
		case off > total:
			return off, fmt.Errorf("%w: longer than %d bytes", errCorrupt, total)
		case err != nil:
			return off, stalled(err, "after receiving", off)
		}
	}
}

func stalled(err error, where string, n int64) error {
	var t net.Error
	// A time-out of the connection itself is an error of the network.
	if errors.As(err, &t) && t.Timeout() && !errors.Is(err, syscall.ETIMEDOUT) {
		return fmt.Errorf("%w within %v %s %d bytes", errStalled, patience, where, n)
	}
	return fmt.Errorf("%s %d bytes: %w", where, n, err)
}

// header reads the first bytes of a stream and returns the connection's number.
func header(c net.Conn) (id uint64, err error) {
	var b [headerSize]byte
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return 0, err
	}
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return 0, err
	}
	if binary.BigEndian.Uint64(b[:]) != magic {
		return 0, fmt.Errorf("%w at its first bytes: %x", errCorrupt, b)
	}
	return binary.BigEndian.Uint64(b[8:]), nil
}

// wrong reports whether an error is one that must never be.
func wrong(err error) bool {
	return errors.Is(err, errCorrupt) || errors.Is(err, errTruncated) || errors.Is(err, errStalled)
}

// network reports whether an error is one that TCP tells applications of when a
// connection is ended from outside.
func network(err error) bool {
	for _, e := range []error{syscall.ECONNRESET, syscall.EPIPE, syscall.ECONNREFUSED, syscall.ETIMEDOUT, syscall.ECONNABORTED, syscall.ENOTCONN,
		syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ENETDOWN} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
