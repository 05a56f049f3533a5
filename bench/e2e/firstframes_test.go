package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/peer"
)

// newOddPath is newOddBed with a wire that impairs both directions.
func newOddPath(t *testing.T, im lab.Impair, flags ...string) *oddBed {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 120*time.Second)
	t.Cleanup(cancel)
	path, err := lab.Start(t).Middle(lab.Options{B: lab.EndOptions{NoAddress: true}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := path.Forward(lab.ForwarderOptions{Seed: 1, AtoB: im, BtoA: im}); err != nil {
		t.Fatal(err)
	}
	return meetOdd(ctx, t, path.A, path.B, flags...)
}

// firstly is what the peer sends as soon as it has keys: everything, the end of
// the stream included, in segments of the given sizes, the last of which repeats.
type firstly struct {
	name  string
	frame int   // data bytes of a frame
	sizes []int // of the first segments, behind the end of an Init message if it is not in them
	cfg   peer.Config
	bytes int
}

// meetFirst opens a connection between an application and the peer, whose first
// segments are as f says, and checks that both ends get every byte and the end.
func (b *oddBed) meetFirst(active, v6 bool, f *firstly, tickets []*peer.Ticket) (*peer.Ticket, error) {
	ctx, cancel := context.WithTimeout(b.ctx, 60*time.Second)
	defer cancel()
	ours, theirs := b.host.Addr4(), b.peer.Addr4()
	if v6 {
		ours, theirs = b.host.Addr6(), b.peer.Addr6()
	}
	up, down := stream(1, f.bytes), stream(2, f.bytes)
	cfg := f.cfg
	cfg.FrameSize, cfg.Tickets = f.frame, tickets
	if len(f.sizes) > 0 {
		cfg.SegmentSize = f.sizes[len(f.sizes)-1]
	}
	served := make(chan error, 1)
	serve := func(c net.Conn, err error) {
		if err != nil {
			served <- err
			return
		}
		defer context.AfterFunc(ctx, func() { c.Close() })()
		defer c.Close()
		wrote := make(chan error, 1)
		go func() {
			_, err := c.Write(up)
			wrote <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
		}()
		got, err := io.ReadAll(c)
		if err == nil && !bytes.Equal(got, down) {
			err = errors.New("other data")
		}
		if err = errors.Join(err, <-wrote); err != nil {
			err = fmt.Errorf("the application, after %d of %d bytes: %w", len(got), len(down), err)
		}
		served <- err
	}
	// The peer's end holds everything back until it has keys, its Init2 too.
	first := func(pc *peer.Conn) error {
		if err := pc.WaitReady(ctx); err != nil {
			return err
		}
		_, err := pc.Write(down)
		return errors.Join(err, pc.CloseWrite(), pc.Uncork(f.sizes...))
	}
	var pc *peer.Conn
	var err error
	if active {
		ln, lerr := b.host.NS.Listen("tcp", net.JoinHostPort(ours.String(), "0"))
		if lerr != nil {
			return nil, lerr
		}
		defer ln.Close()
		defer context.AfterFunc(ctx, func() { ln.Close() })()
		go func() { serve(ln.Accept()) }()
		if pc, err = b.peer.Dial(ctx, netip.AddrPortFrom(ours, uint16(ln.Addr().(*net.TCPAddr).Port)), cfg); err == nil {
			pc.Cork()
			err = first(pc)
		}
	} else {
		const port = 7000
		ln, lerr := b.peer.Listen(port, cfg)
		if lerr != nil {
			return nil, lerr
		}
		defer ln.Close()
		go func() { serve(b.host.NS.Dial(ctx, "tcp", net.JoinHostPort(theirs.String(), fmt.Sprint(port)))) }()
		if pc, err = ln.Accept(ctx); err == nil {
			pc.Cork()
			err = first(pc)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("the peer: %w", err)
	}
	if err := <-served; err != nil {
		return nil, err
	}
	if err := pc.WaitEnd(ctx); err != nil {
		return nil, err
	}
	r := pc.Report()
	if !r.Encrypted || r.Resumed != (len(tickets) > 0) || !bytes.Equal(r.Received, up) || len(r.Anomalies) != 0 {
		return nil, fmt.Errorf("encrypted %v, resumed %v, the peer got %d of %d bytes, anomalies %v", r.Encrypted, r.Resumed, len(r.Received), len(up), r.Anomalies)
	}
	return pc.Ticket(), nil
}

// What the peer sends at the moment at which the keys are there, while this host
// is still opening the connection inside: every legal form of it arrives, whether
// frames come together with the Init message, in its last segment, in pieces, out
// of order, again with other boundaries, or with the end of the stream.
func TestFirstFrames(t *testing.T) {
	forms := []firstly{
		{name: "all in one segment", frame: 50, bytes: 500},
		{name: "several frames a segment", frame: 100, sizes: []int{1400}, bytes: 6000},
		{name: "a part of a frame with the Init message", frame: 1000, sizes: []int{90, 700}, bytes: 3000},
		{name: "a header cut in two", frame: 300, sizes: []int{74 + 2, 321}, bytes: 3000},
		{name: "segments of 1 byte", frame: 20, sizes: []int{1}, bytes: 100},
		{name: "a large frame", frame: 60000, bytes: 60000},
		{name: "only the end", frame: 1, bytes: 0},
		{name: "one byte and the end", frame: 1, bytes: 1},
		{name: "resent with other boundaries", frame: 200, sizes: []int{300}, bytes: 5000, cfg: peer.Config{Resegment: true, OnSend: everyNth(3)}},
		{name: "timestamps", frame: 200, bytes: 5000, cfg: peer.Config{Timestamps: true, NonceLen: 4}},
	}
	wires := []struct {
		name string
		im   lab.Impair
	}{
		{"clean", lab.Impair{}},
		{"hostile", lab.Impair{Drop: 0.05, Reorder: 0.3, Duplicate: 0.1}},
	}
	for _, w := range wires {
		for _, v6 := range []bool{false, true} {
			for _, active := range []bool{true, false} {
				name := w.name + map[bool]string{true: "/IPv6", false: "/IPv4"}[v6] + map[bool]string{true: "/active", false: "/passive"}[active]
				t.Run(name, func(t *testing.T) {
					b := newOddPath(t, w.im)
					for _, f := range forms {
						t.Run(f.name, func(t *testing.T) {
							ticket, err := b.meetFirst(active, v6, &f, nil)
							if err != nil {
								t.Fatal(err)
							}
							f.cfg.Piggyback = active
							if _, err := b.meetFirst(active, v6, &f, []*peer.Ticket{ticket}); err != nil {
								t.Fatalf("resumed: %v", err)
							}
						})
					}
				})
			}
		}
	}
}
