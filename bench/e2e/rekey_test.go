package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// connected opens a connection from A to B and returns both ends.
func (b *bed) connected() (client, server net.Conn) {
	b.t.Helper()
	ln, err := b.path.B.NS.Listen("tcp", net.JoinHostPort(b.path.B.Addr4().String(), "0"))
	if err != nil {
		b.t.Fatal(err)
	}
	defer ln.Close()
	defer context.AfterFunc(b.ctx, func() { ln.Close() })()
	if client, err = b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String()); err != nil {
		b.t.Fatal(err)
	}
	if server, err = ln.Accept(); err != nil {
		client.Close()
		b.t.Fatal(err)
	}
	b.guarded(client, server)
	return client, server
}

// guarded closes connections when the bed's time is over, and at the end.
func (b *bed) guarded(conns ...net.Conn) {
	stop := context.AfterFunc(b.ctx, func() {
		for _, c := range conns {
			c.Close()
		}
	})
	b.t.Cleanup(func() {
		stop()
		for _, c := range conns {
			c.Close()
		}
	})
}

// swap sends up and down at the same time and leaves the connection open.
func swap(client, server net.Conn, up, down []byte) error {
	errs := make(chan error, 4)
	send := func(c net.Conn, data []byte) {
		_, err := c.Write(data)
		errs <- err
	}
	receive := func(c net.Conn, want []byte) {
		got := make([]byte, len(want))
		n, err := io.ReadFull(c, got)
		if err == nil && !bytes.Equal(got, want) {
			err = errors.New("other data arrived")
		}
		if err != nil {
			err = fmt.Errorf("after %d of %d bytes: %w", n, len(want), err)
		}
		errs <- err
	}
	go send(client, up)
	go send(server, down)
	go receive(client, down)
	go receive(server, up)
	var err error
	for range 4 {
		err = errors.Join(err, <-errs)
	}
	return err
}

// generations waits until each daemon has seen all generations of the other's
// keys, and returns how often the keys of either direction were changed.
func (b *bed) generations(a, z *daemon.Daemon) (up, down uint64) {
	b.t.Helper()
	b.eventually("the daemons count the same generations", func() (string, bool) {
		fa, err := a.Flow(b.ctx)
		if err != nil {
			return err.Error(), false
		}
		fz, err := z.Flow(b.ctx)
		if err != nil {
			return err.Error(), false
		}
		up, down = fa.RekeysOut, fz.RekeysOut
		return fmt.Sprintf("a sent %d and received %d, b sent %d and received %d", fa.RekeysOut, fa.RekeysIn, fz.RekeysOut, fz.RekeysIn),
			fa.RekeysOut == fz.RekeysIn && fz.RekeysOut == fa.RekeysIn
	})
	return up, down
}

// Both hosts change their keys with every megabyte, while segments are lost in
// both directions (RFC 8548 section 3.8).
func TestRekeyWithLoss(t *testing.T) {
	n := 200 << 20
	if testing.Short() {
		n = 20 << 20
	}
	im := lab.Impair{Drop: 0.01}
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{Seed: 5, AtoB: im, BtoA: im})
	a, z := b.both("--rekey-bytes", "1M")
	client, server := b.connected()
	if err := swap(client, server, stream(1, n), stream(2, n)); err != nil {
		t.Fatal(err)
	}
	up, down := b.generations(a, z)
	t.Logf("the keys were changed %d and %d times", up, down)
	// At least so often; the answers to the other side's changes count as well.
	if least := uint64(n>>20) - 1; up < least || down < least {
		t.Errorf("the keys were changed %d and %d times, want at least %d", up, down, least)
	}
	client.Close()
	server.Close()
	b.idle(a, z)
	b.encryptedOnly(a, z, 1)
}

// A user has all keys changed at once; data goes on before and after.
func TestRekeyCommand(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	client, server := b.connected()
	up, down := stream(1, 100000), stream(2, 100000)
	if err := swap(client, server, up, down); err != nil {
		t.Fatal(err)
	}
	for i, d := range []*daemon.Daemon{a, z, a} {
		if n, err := d.Rekey(b.ctx); err != nil || n != 1 {
			t.Fatalf("rekeying begun on %d connections: %v", n, err)
		}
		b.eventually("both directions have new keys", func() (string, bool) {
			u, v := b.generations(a, z)
			return fmt.Sprint(u, v), u == uint64(i+1) && v == uint64(i+1)
		})
		if err := swap(client, server, up, down); err != nil {
			t.Fatal(err)
		}
	}
}
