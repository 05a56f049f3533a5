package e2e

import (
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// sockets lists the connections that a host has sockets for, those in TIME_WAIT
// left out, which have nothing to send.
func sockets(t *testing.T, ns *lab.Namespace) (found []string) {
	t.Helper()
	const timeWait, listen = 6, 10
	err := ns.Do(func() error {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			all, err := netlink.SocketDiagTCP(family)
			if err != nil {
				return err
			}
			for _, s := range all {
				if s.State != timeWait && s.State != listen {
					found = append(found, fmt.Sprintf("%v:%d-%v:%d in state %d", s.ID.Source, s.ID.SourcePort, s.ID.Destination, s.ID.DestinationPort, s.State))
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// SIGTERM with connections that do not end by themselves, in every state that an
// application or a path can keep them in: nothing of them leaves in plaintext,
// then or ever, as no socket is left that could send it, and nothing stays
// diverted.
func TestTerminatedConnections(t *testing.T) {
	for _, dead := range []bool{false, true} {
		t.Run(map[bool]string{false: "peer answers", true: "path is dead"}[dead], func(t *testing.T) {
			eachIP(t, func(t *testing.T, v6 bool) {
				b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
				a, z := b.both("--drain-timeout", "100ms")
				open := func() (client, server net.Conn) {
					client, server, err := b.connect(v6)
					if err != nil {
						t.Fatal(err)
					}
					b.guarded(client, server)
					return client, server
				}
				pour := func(c net.Conn) {
					go func() {
						for {
							if _, err := c.Write(stream(1, 60000)); err != nil {
								return
							}
						}
					}()
				}
				// Busy in both directions.
				busy, busyServer := open()
				pour(busy)
				pour(busyServer)
				go func() { _, _ = io.Copy(io.Discard, busy) }()
				go func() { _, _ = io.Copy(io.Discard, busyServer) }()
				// The reader has stopped: data is queued in the socket.
				stuck, _ := open()
				pour(stuck)
				// Closed by the application, with data that is not read.
				orphan, _ := open()
				if err := orphan.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
					t.Fatal(err)
				}
				_, _ = orphan.Write(stream(2, 8<<20))
				orphan.Close()
				// Half-closed, either way, and idle.
				half, halfServer := open()
				other, otherServer := open()
				idle, _ := open()
				for _, c := range []net.Conn{half, otherServer} {
					if err := c.(*net.TCPConn).CloseWrite(); err != nil {
						t.Fatal(err)
					}
				}
				for _, c := range []net.Conn{halfServer, other} {
					if _, err := io.ReadAll(c); err != nil {
						t.Fatal(err)
					}
				}
				if dead {
					b.fwd.Set(lab.AtoB, lab.Impair{Drop: 1})
					b.fwd.Set(lab.BtoA, lab.Impair{Drop: 1})
					// Something to retransmit for each.
					for _, c := range []net.Conn{other, idle} {
						if _, err := c.Write(stream(3, 5000)); err != nil {
							t.Fatal(err)
						}
					}
				}
				if err := a.Stop(); err != nil {
					t.Error(err)
				}
				if left := sockets(t, b.path.A.NS); len(left) != 0 {
					t.Errorf("sockets that could still send: %v", left)
				}
				if d, g := attached(t, b.path.A); len(d)+len(g) != 0 {
					t.Errorf("attached: %v %v", d, g)
				}
				b.fwd.Set(lab.AtoB, lab.Impair{})
				b.fwd.Set(lab.BtoA, lab.Impair{})
				for _, c := range []net.Conn{busy, stuck, half, other, idle} {
					if _, err := c.Write(canary); err == nil {
						t.Errorf("%v can still be written to", c.LocalAddr())
					}
				}
				// What B says about them is answered by A's kernel.
				if err := b.exchange(v6, make([]byte, 100000), make([]byte, 100000), nil); err != nil {
					t.Errorf("plain connection afterwards: %v", err)
				}
				if n, _ := b.wire.seen(); n != 0 {
					t.Errorf("%d segments with plaintext on the wire", n)
				}
				if err := z.Stop(); err != nil {
					t.Error(err)
				}
				b.nothingPinned()
			})
		})
	}
}
