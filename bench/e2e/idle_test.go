package e2e

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// Many connections that say nothing: all of them are encrypted and work, and the
// daemons' memory for each is told. A daemon that is terminated ends them all.
func TestIdleFlows(t *testing.T) {
	n := *idleFlows
	const listeners, dialers = 4, 16
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	if want := uint64(2*n + 10000); files.Cur < want {
		raised := unix.Rlimit{Cur: want, Max: max(files.Max, want)}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &raised); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Setrlimit(unix.RLIMIT_NOFILE, &files) }()
	}
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	var cancel context.CancelFunc
	b.ctx, cancel = context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	if err := b.path.A.NS.Sysctl("net/ipv4/ip_local_port_range", "1024 65535"); err != nil {
		t.Fatal(err)
	}
	a, z := b.both("--drain-timeout", "10ms")
	b.encryptsAgain(a, false)
	before := [2]int64{b.rss(a), b.rss(z)}

	var mu sync.Mutex
	var clients, servers []net.Conn
	lns := make([]net.Listener, listeners)
	for i := range lns {
		var err error
		if lns[i], err = b.path.B.NS.Listen("tcp", net.JoinHostPort(b.path.B.Addr4().String(), "0")); err != nil {
			t.Fatal(err)
		}
		defer lns[i].Close()
		go func() {
			for {
				c, err := lns[i].Accept()
				if err != nil {
					return
				}
				mu.Lock()
				servers = append(servers, c)
				mu.Unlock()
			}
		}()
	}
	defer func() {
		mu.Lock()
		defer mu.Unlock()
		for _, c := range append(clients, servers...) {
			// The other end is on this machine, too: no TIME_WAIT.
			_ = c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
	}()
	begin := time.Now()
	var wg sync.WaitGroup
	errs := make(chan error, dialers)
	for d := range dialers {
		wg.Go(func() {
			for i := d; i < n; i += dialers {
				c, err := b.path.A.NS.Dial(b.ctx, "tcp", lns[i/dialers%listeners].Addr().String())
				if err != nil {
					errs <- err
					return
				}
				mu.Lock()
				clients = append(clients, c)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Fatal(err)
	}
	took := time.Since(begin)
	for i, d := range []*daemon.Daemon{a, z} {
		b.eventually("all connections are encrypted", func() (string, bool) {
			st, err := d.Status(b.ctx)
			return "", err == nil && st.Flows >= n
		})
		grew := b.rss(d) - before[i]
		t.Logf("daemon on %s: %d idle connections, resident memory %.1f -> %.1f MiB, %d bytes a connection",
			"ab"[i:i+1], n, float64(before[i])/(1<<20), float64(b.rss(d))/(1<<20), grew/int64(n))
		if per := grew / int64(n); per > 32<<10 {
			t.Errorf("%d bytes a connection", per)
		}
	}
	t.Logf("%d connections opened in %v", n, took.Round(time.Millisecond))
	// They are all alive.
	for i := 0; i < n; i += max(n/100, 1) {
		if _, err := clients[i].Write([]byte("x")); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
	}
	if err := b.exchange(false, stream(1, 1<<20), stream(2, 1<<20), nil); err != nil {
		t.Error(err)
	}
	begin = time.Now()
	if err := a.Stop(); err != nil {
		t.Error(err)
	}
	t.Logf("SIGTERM with all of them open took %v", time.Since(begin).Round(time.Millisecond))
	for i := 0; i < n; i += max(n/100, 1) {
		if _, err := clients[i].Read(make([]byte, 1)); err == nil {
			t.Errorf("connection %d lives on without its daemon", i)
		}
	}
	if n, _ := b.wire.seen(); n != 0 {
		t.Errorf("%d segments with plaintext on the wire", n)
	}
}
