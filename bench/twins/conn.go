package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// What must never be, whatever the twin does; but for errTruncated after a reset: the
// kernel tells of that once, and where the sender was told the receiver sees an end
// of file.
var (
	errCorrupt   = errors.New("the stream is not the one that was sent")
	errTruncated = errors.New("the stream ended early with an end of file")
)

// patience is how long a connection may take.
const patience = 20 * time.Second

// side is what one end of a connection does.
type side struct {
	send        int           // bytes
	write, read int           // bytes of a call, at most
	writeWait   time.Duration // at most, before one in eight calls
	readWait    time.Duration
	reset       bool // after half of its bytes, instead of an end of file
	early, late []choice
}

// connection is what a client and a server do.
type connection struct {
	number int
	v6     bool
	ends   [2]side       // client, server
	change time.Duration // when the late options are set
	seed   uint64
}

func newConnection(w *world, k int) *connection {
	rng := rand.New(rand.NewPCG(w.seed, uint64(k)+1))
	c := &connection{number: k, v6: rng.IntN(3) == 0, change: time.Duration(rng.Int64N(int64(3 * time.Millisecond))), seed: rng.Uint64()}
	family := unix.AF_INET
	if c.v6 {
		family = unix.AF_INET6
	}
	for i := range c.ends {
		e := &c.ends[i]
		e.send = rng.IntN(1 + pick(rng, 0, 1, 1000, 30000, 150000))
		e.write, e.read = pick(rng, 200, 5000, 200000), pick(rng, 100, 5000, 200000)
		e.writeWait, e.readWait = pick(rng, 0, 0, 0, 3*time.Millisecond), pick(rng, 0, 0, 0, 3*time.Millisecond)
		if w.restless {
			e.send, e.write, e.read = 10*e.send, max(e.write, 5000), max(e.read, 5000)
			e.writeWait = pick(rng, 3*time.Millisecond, 30*time.Millisecond)
		}
		if w.options {
			e.early, e.late = choose(rng, family, false), choose(rng, family, true)
		}
	}
	if rng.IntN(8) == 0 {
		c.ends[rng.IntN(2)].reset = true
	}
	return c
}

func (c *connection) String() string { return fmt.Sprintf("connection %d: %+v", c.number, *c) }

// outcome is what became of a connection.
type outcome struct {
	took time.Duration
	err  error
}

func (o outcome) String() string {
	if o.err != nil {
		return fmt.Sprintf("%v (%v)", o.took.Round(time.Millisecond), o.err)
	}
	return o.took.Round(time.Millisecond).String()
}

// carry opens the connection between the hosts of p and carries it out.
func (c *connection) carry(ctx context.Context, p *pair) (o outcome) {
	begin := time.Now()
	defer func() { o.took = time.Since(begin) }()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	client, server, err := c.open(ctx, p)
	if err != nil {
		return outcome{err: err}
	}
	defer client.Close()
	defer server.Close()
	change := time.AfterFunc(c.change, func() {
		while(c.ends[0].late, client)
		while(c.ends[1].late, server)
	})
	defer change.Stop()
	conns := [2]*net.TCPConn{client, server}
	data := [2][]byte{c.data(0), c.data(1)}
	errs := make(chan error, 4)
	for i, conn := range conns {
		if err := conn.SetDeadline(begin.Add(patience)); err != nil {
			return outcome{err: err}
		}
		e := &c.ends[i]
		go func() { errs <- e.sender(conn, data[i], rand.New(rand.NewPCG(c.seed, uint64(i)))) }()
		go func() { errs <- e.receiver(conn, data[1-i], rand.New(rand.NewPCG(c.seed, uint64(i+2)))) }()
	}
	for range 4 {
		err := <-errs
		if err != nil && (c.ends[0].reset || c.ends[1].reset) && !errors.Is(err, errCorrupt) && !timeout(err) {
			err = nil // of the reset
		}
		o.err = errors.Join(o.err, err)
	}
	return o
}

func timeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}

func (c *connection) open(ctx context.Context, p *pair) (client, server *net.TCPConn, err error) {
	a, b := p.hosts[0], p.hosts[1]
	ip := b.Addr4()
	if c.v6 {
		ip = b.Addr6()
	}
	var ln net.Listener
	err = b.NS.Do(func() (err error) {
		lc := net.ListenConfig{Control: before(c.ends[1].early)}
		lc.SetMultipathTCP(false)
		ln, err = lc.Listen(ctx, "tcp", netip.AddrPortFrom(ip, 0).String())
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		defer close(accepted)
		if s, err := ln.Accept(); err == nil {
			accepted <- s
		}
	}()
	var cc net.Conn
	err = a.NS.Do(func() (err error) {
		d := net.Dialer{Control: before(c.ends[0].early)}
		d.SetMultipathTCP(false)
		cc, err = d.DialContext(ctx, "tcp", ln.Addr().String())
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	select {
	case s := <-accepted:
		if s != nil {
			return cc.(*net.TCPConn), s.(*net.TCPConn), nil
		}
		err = errors.New("not accepted")
	case <-ctx.Done():
		err = fmt.Errorf("accept: %w", ctx.Err())
	}
	cc.Close()
	return nil, nil, err
}

// data is what end i sends.
func (c *connection) data(i int) []byte {
	var key [32]byte
	key[0], key[1] = byte(i), byte(c.number)
	b := make([]byte, c.ends[i].send)
	_, _ = rand.NewChaCha8(key).Read(b)
	return b
}

func (e *side) sender(c *net.TCPConn, b []byte, rng *rand.Rand) error {
	total := len(b)
	for len(b) > 0 {
		n := min(len(b), 1+rng.IntN(e.write))
		if _, err := c.Write(b[:n]); err != nil {
			return fmt.Errorf("write, with %d bytes left: %w", len(b), err)
		}
		b = b[n:]
		if e.reset && len(b) <= total/2 {
			break
		}
		rest(rng, e.writeWait)
	}
	if e.reset {
		return errors.Join(c.SetLinger(0), c.Close())
	}
	return c.CloseWrite()
}

func (e *side) receiver(c *net.TCPConn, want []byte, rng *rand.Rand) error {
	buf := make([]byte, e.read)
	for got := 0; ; {
		n, err := c.Read(buf[:1+rng.IntN(len(buf))])
		if got+n > len(want) || !bytes.Equal(buf[:n], want[got:got+n]) {
			return fmt.Errorf("%w, after %d bytes", errCorrupt, got)
		}
		got += n
		switch {
		case err == io.EOF && got == len(want):
			return nil
		case err == io.EOF:
			return fmt.Errorf("%w after %d of %d bytes", errTruncated, got, len(want))
		case err != nil:
			return fmt.Errorf("read, after %d of %d bytes: %w", got, len(want), err)
		}
		rest(rng, e.readWait)
	}
}

// rest pauses now and then.
func rest(rng *rand.Rand, most time.Duration) {
	if most > 0 && rng.IntN(8) == 0 {
		time.Sleep(time.Duration(rng.Int64N(int64(most))))
	}
}
