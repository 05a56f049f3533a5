package e2e

import (
	"io"
	"net"
	"sync/atomic"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// A daemon ends, in one way or another, after its SYN-ACK offered encryption and
// before the peer, for which encryption is on with that, was heard. The kernel,
// which could complete the handshake by itself, must not give the peer's Init
// message to the application.
func TestEndedWhileAnswering(t *testing.T) {
	for _, how := range []struct {
		name string
		end  func(d *daemon.Daemon) error
	}{
		{"killed", func(d *daemon.Daemon) error { return d.Kill() }},
		{"terminated", func(d *daemon.Daemon) error { return d.Stop() }},
	} {
		t.Run(how.name, func(t *testing.T) {
			var quiet, answered atomic.Bool
			quiet.Store(true)
			b := newBed(t, lab.Options{}, lab.ForwarderOptions{Hook: func(d lab.Dir, f []byte) lab.Verdict {
				var s packet.Segment
				if packet.Parse(f, packet.FromOuter, &s) != nil {
					return lab.Pass
				}
				if d == lab.BtoA && s.Flags&packet.SYN != 0 {
					answered.Store(true)
				}
				// Only the SYN gets through to B.
				if d == lab.AtoB && s.Flags&packet.SYN == 0 && quiet.Load() {
					return lab.Drop
				}
				return lab.Pass
			}})
			a, z := b.both("--drain-timeout", "50ms")
			ln, err := b.path.B.NS.Listen("tcp", net.JoinHostPort(b.path.B.Addr4().String(), "0"))
			if err != nil {
				t.Fatal(err)
			}
			served := make(chan []byte, 4)
			go func() {
				defer close(served)
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					got, _ := io.ReadAll(c)
					c.Close()
					served <- got
				}
			}()
			failed := make(chan error, 1)
			go func() {
				c, err := b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String())
				if err == nil {
					c.Close()
				}
				failed <- err
			}()
			b.eventually("the SYN is answered", func() (string, bool) { return "", answered.Load() })
			if err := how.end(z); err != nil && how.name != "killed" {
				t.Fatal(err)
			}
			quiet.Store(false)
			if err := <-failed; err == nil {
				t.Error("the connection was opened")
			}
			b.noFlows(a)
			z = b.daemon(b.path.B)
			b.meet(a, z, b.echo())
			b.idle(a, z)
			ln.Close()
			for got := range served {
				if len(got) != 0 {
					t.Errorf("the application got %d bytes: %x", len(got), got[:min(len(got), 16)])
				}
			}
		})
	}
}
