package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/vm"
)

// traffic exchanges streams of bytes that both ends know over the kernel's own
// TCP. A round on a connection is a header with a seed and a length, then that
// many bytes in both directions at the same time, and at its end a byte by which
// the server says that what it got was right.
type traffic struct {
	ln    net.Listener
	conns []net.Conn
	round uint64
}

const (
	headerLen  = 16
	atOnce     = 4 // connections that are opened, or used, at the same time: an emulated guest is slow
	roundFine  = 'y'
	roundWrong = 'n'
)

func (t *traffic) listen(address string) (err error) {
	if t.ln != nil {
		_ = t.ln.Close()
	}
	if t.ln, err = net.Listen("tcp", address); err != nil {
		return err
	}
	go func(ln net.Listener) {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go answer(c)
		}
	}(t.ln)
	return nil
}

// answer serves the rounds of one connection until the client ends it.
func answer(c net.Conn) {
	defer c.Close()
	var header [headerLen]byte
	for {
		if _, err := io.ReadFull(c, header[:]); err != nil {
			return
		}
		seed, n := binary.BigEndian.Uint64(header[:]), int64(binary.BigEndian.Uint64(header[8:]))
		sent := make(chan error, 1)
		go func() { sent <- send(c, ^seed, n) }()
		verdict := byte(roundFine)
		if err := expect(c, seed, n); err != nil {
			fmt.Println("agent: server:", err)
			verdict = roundWrong
		}
		if err := <-sent; err != nil {
			fmt.Println("agent: server:", err)
			return
		}
		if _, err := c.Write([]byte{verdict}); err != nil || verdict == roundWrong {
			return
		}
	}
}

func stream(seed uint64) io.Reader {
	var key [32]byte
	binary.BigEndian.PutUint64(key[:], seed)
	return rand.NewChaCha8(key)
}

func send(c net.Conn, seed uint64, n int64) error {
	if _, err := io.CopyBuffer(onlyWriter{c}, io.LimitReader(stream(seed), n), make([]byte, 32<<10)); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	return nil
}

// onlyWriter hides ReadFrom, which has no use here.
type onlyWriter struct{ io.Writer }

func expect(c net.Conn, seed uint64, n int64) error {
	want, got := make([]byte, 32<<10), make([]byte, 32<<10)
	from := stream(seed)
	for at := int64(0); at < n; {
		k := min(n-at, int64(len(got)))
		if m, err := io.ReadFull(c, got[:k]); err != nil {
			return fmt.Errorf("receive at byte %d of %d: %w", at+int64(m), n, err)
		}
		_, _ = io.ReadFull(from, want[:k])
		if !bytes.Equal(got[:k], want[:k]) {
			return fmt.Errorf("other bytes than were sent between %d and %d of %d", at, at+k, n)
		}
		at += k
	}
	return nil
}

// open carries out a round on each of the new, or of the open, connections at
// the same time, and returns the number of bytes that arrived right.
func (t *traffic) open(req *vm.Request) (int64, error) {
	if !req.Again {
		if len(t.conns) > 0 {
			return 0, errors.New("connections are open")
		}
		t.conns = make([]net.Conn, req.Connections)
	}
	t.round++
	deadline := time.Now().Add(patience)
	next := make(chan int)
	results := make(chan error, len(t.conns))
	for range atOnce {
		go func() {
			for i := range next {
				err := t.exchange(i, req, deadline)
				if err != nil {
					err = fmt.Errorf("connection %d: %w", i, err)
				}
				results <- err
			}
		}()
	}
	for i := range t.conns {
		next <- i
	}
	close(next)
	var errs []error
	for range t.conns {
		errs = append(errs, <-results)
	}
	if err := errors.Join(errs...); err != nil {
		return 0, err
	}
	return 2 * int64(req.Bytes) * int64(len(t.conns)), nil
}

func (t *traffic) exchange(i int, req *vm.Request, deadline time.Time) (err error) {
	if !req.Again {
		if t.conns[i], err = dial(req.Address, deadline); err != nil {
			return err
		}
	}
	c := t.conns[i]
	_ = c.SetDeadline(deadline)
	seed := t.round<<32 | uint64(i)
	header := binary.BigEndian.AppendUint64(nil, seed)
	if _, err := c.Write(binary.BigEndian.AppendUint64(header, uint64(req.Bytes))); err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() { sent <- send(c, seed, int64(req.Bytes)) }()
	err = expect(c, ^seed, int64(req.Bytes))
	if err == nil {
		var verdict [1]byte
		if _, err = io.ReadFull(c, verdict[:]); err == nil && verdict[0] != roundFine {
			err = errors.New("the server got other bytes than were sent")
		}
	}
	if err != nil {
		_ = c.Close() // ends the sender, too
	}
	return errors.Join(err, <-sent)
}

// dial connects from a random port. Those that the kernel gives one after the other
// differ in few bits, and a card may spread them over a part of its queues only.
func dial(address string, deadline time.Time) (net.Conn, error) {
	const low, tries = 10000, 20
	for try := 1; ; try++ {
		d := net.Dialer{Deadline: deadline, LocalAddr: &net.TCPAddr{Port: low + rand.IntN(1<<16-low)}}
		c, err := d.Dial("tcp", address)
		if try == tries || !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return c, err
		}
	}
}

// close ends all connections and wants an end of file of each.
func (t *traffic) close() error {
	var errs []error
	for i, c := range t.conns {
		if c == nil {
			continue
		}
		_ = c.SetDeadline(time.Now().Add(patience))
		err := c.(*net.TCPConn).CloseWrite()
		if err == nil {
			var rest int64
			if rest, err = io.Copy(io.Discard, c); err == nil && rest > 0 {
				err = fmt.Errorf("%d bytes after the end", rest)
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("connection %d: %w", i, err))
		}
		_ = c.Close()
	}
	t.conns = nil
	return errors.Join(errs...)
}

// abort ends all connections without ceremony.
func (t *traffic) abort() {
	for _, c := range t.conns {
		if c != nil {
			_ = c.Close()
		}
	}
	t.conns = nil
}
