package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// onFD runs f with the file descriptor of a TCP connection.
func onFD(c net.Conn, f func(fd int) error) error {
	rc, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	return errors.Join(rc.Control(func(fd uintptr) { ferr = f(int(fd)) }), ferr)
}

// sendUrgent sends data whose byte number at is urgent.
func sendUrgent(c net.Conn, data []byte, at int) error {
	if _, err := c.Write(data[:at]); err != nil {
		return err
	}
	err := onFD(c, func(fd int) error { return unix.Sendto(fd, data[at:at+1], unix.MSG_OOB, nil) })
	if err == nil {
		_, err = c.Write(data[at+1:])
	}
	return err
}

// awaitUrgent waits until the kernel knows of urgent data.
func awaitUrgent(c net.Conn, limit time.Time) error {
	return onFD(c, func(fd int) error {
		for {
			p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}
			n, err := unix.Poll(p, int(time.Until(limit).Milliseconds()))
			switch {
			case errors.Is(err, unix.EINTR):
			case err != nil:
				return err
			case n == 0:
				return errors.New("no urgent data came")
			default:
				return nil
			}
		}
	})
}

// readUrgent reads what sendUrgent sent and returns an error unless the urgent
// byte stands where it was sent: beside the stream, or marked in it.
func readUrgent(c net.Conn, want []byte, at int, inline bool, limit time.Time) error {
	if err := c.SetReadDeadline(limit); err != nil {
		return err
	}
	if err := awaitUrgent(c, limit); err != nil {
		return err
	}
	if !inline {
		b := make([]byte, 1)
		var n int
		err := onFD(c, func(fd int) (err error) {
			for {
				// The pointer may be known before the byte is there.
				n, _, err = unix.Recvfrom(fd, b, unix.MSG_OOB|unix.MSG_DONTWAIT)
				if !errors.Is(err, unix.EAGAIN) || time.Now().After(limit) {
					return err
				}
				if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}, 10); err != nil && !errors.Is(err, unix.EINTR) {
					return err
				}
			}
		})
		if err != nil || n != 1 || b[0] != want[at] {
			return fmt.Errorf("the urgent byte: %d bytes %q, want %q: %w", n, b, want[at], err)
		}
	}
	var got []byte
	marked := false
	rest := len(want)
	if !inline {
		rest--
	}
	for buf := make([]byte, 1<<16); ; {
		if !marked {
			var mark int
			if err := onFD(c, func(fd int) (err error) { mark, err = unix.IoctlGetInt(fd, unix.SIOCATMARK); return err }); err != nil {
				return err
			}
			if mark != 0 {
				if len(got) != at {
					return fmt.Errorf("the mark is at %d, want %d", len(got), at)
				}
				marked = true
			}
		}
		if len(got) == rest {
			break
		}
		n, err := c.Read(buf[:min(len(buf), rest-len(got))])
		if err != nil {
			return fmt.Errorf("after %d bytes: %w", len(got), err)
		}
		got = append(got, buf[:n]...)
	}
	if !inline {
		want = append(bytes.Clone(want[:at]), want[at+1:]...)
	}
	switch {
	case !bytes.Equal(got, want):
		return errors.New("other data arrived")
	case !marked:
		return errors.New("the stream was not marked")
	}
	return nil
}

// Urgent data stays urgent, at its place, in both directions and with loss: what
// plain TCP does, the encrypted connection does (RFC 8548 section 4.2).
func TestUrgent(t *testing.T) {
	for _, c := range []struct {
		name   string
		crypt  bool
		inline bool
		drop   float64
	}{
		{"plain TCP", false, false, 0},
		{"encrypted", true, false, 0},
		{"plain TCP, inline", false, true, 0},
		{"encrypted, inline", true, true, 0},
		{"encrypted, with loss", true, true, 0.03},
	} {
		t.Run(c.name, func(t *testing.T) {
			im := lab.Impair{Drop: c.drop}
			b := newBed(t, lab.Options{}, lab.ForwarderOptions{Seed: 3, AtoB: im, BtoA: im})
			if c.crypt {
				b.both()
			}
			client, server := b.connected()
			if c.inline {
				for _, x := range []net.Conn{client, server} {
					if err := onFD(x, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) }); err != nil {
						t.Fatal(err)
					}
				}
			}
			limit, _ := b.ctx.Deadline()
			for i, at := range []int{0, 1, 999, 5000, 29999} {
				for _, d := range []struct {
					name     string
					from, to net.Conn
				}{{"up", client, server}, {"down", server, client}} {
					data := stream(uint64(i), 30000)
					data[at] = '!'
					sent := make(chan error, 1)
					go func() { sent <- sendUrgent(d.from, data, at) }()
					if err := errors.Join(readUrgent(d.to, data, at, c.inline, limit), <-sent); err != nil {
						t.Fatalf("%s, urgent byte %d: %v", d.name, at, err)
					}
				}
			}
			if plain, _ := b.wire.seen(); c.crypt != (plain == 0) {
				t.Errorf("%d segments with plaintext on the wire", plain)
			}
		})
	}
}
