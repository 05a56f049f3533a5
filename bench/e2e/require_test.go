package e2e

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
)

// connects tries to open a connection to host, and returns the error.
func (b *bed) connects(from, to *lab.Iface, v6 bool) error {
	b.t.Helper()
	ip := to.Addr4().String()
	if v6 {
		ip = to.Addr6().String()
	}
	ln, err := to.NS.Listen("tcp", net.JoinHostPort(ip, "0"))
	if err != nil {
		b.t.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithTimeout(b.ctx, 2*time.Second)
	defer cancel()
	c, err := from.NS.Dial(ctx, "tcp", ln.Addr().String())
	if err == nil {
		c.Close()
	}
	return err
}

// What must not be plain is refused at once, and leaves nothing on the wire,
// while the daemon is there, killed, or told to keep the guard; --cleanup ends
// that.
func TestRequireWithoutDaemon(t *testing.T) {
	var syns atomic.Int32
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{Hook: func(_ lab.Dir, f []byte) lab.Verdict {
		var s packet.Segment
		if packet.Parse(f, packet.FromOuter, &s) == nil && s.Flags&packet.SYN != 0 {
			syns.Add(1)
		}
		return lab.Pass
	}})
	refused := func(when string) {
		t.Helper()
		for _, v6 := range []bool{false, true} {
			if err := b.connects(b.path.A, b.path.B, v6); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s: connect ends with %v", when, err)
			}
		}
		if err := b.connects(b.path.B, b.path.A, false); err == nil {
			t.Errorf("%s: a plain connection from outside came about", when)
		}
	}
	flags := []string{"--require", "--keep-guard"}
	a := b.daemon(b.path.A, flags...)
	refused("with the daemon")
	if err := a.Kill(); err != nil {
		t.Fatal(err)
	}
	before := syns.Load()
	for _, v6 := range []bool{false, true} {
		if err := b.connects(b.path.A, b.path.B, v6); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("without the daemon: connect ends with %v", err)
		}
	}
	if n := syns.Load() - before; n != 0 {
		t.Errorf("%d SYNs on the wire", n)
	}
	refused("after kill -9")
	a = b.daemon(b.path.A, flags...)
	if err := a.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	// The BPF programs notice after a second.
	b.eventually("a hung daemon's connections are refused", func() (string, bool) {
		err := b.connects(b.path.A, b.path.B, false)
		return errString(err), errors.Is(err, unix.ECONNREFUSED)
	})
	if err := a.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := a.Stop(); err != nil {
		t.Error(err)
	}
	refused("after SIGTERM")
	if plain, _ := b.wire.seen(); plain != 0 || b.wire.payload != 0 {
		t.Errorf("%d bytes of payload on the wire", b.wire.payload)
	}
	out, err := b.path.A.NS.Command(b.ctx, program, "run", "--interface", b.path.A.Name, "--cleanup").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "guard removed from") {
		t.Errorf("cleanup: %v %s", err, out)
	}
	if d, g := attached(t, b.path.A); len(d)+len(g) != 0 {
		t.Errorf("still attached: %v %v", d, g)
	}
	if err := b.connects(b.path.A, b.path.B, false); err != nil {
		t.Errorf("after the cleanup: %v", err)
	}
}

func errString(err error) string {
	if err == nil {
		return "connected"
	}
	return err.Error()
}

// Rules decide before the flags do, in the kernel as in the daemon.
func TestRules(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	config := writeFile(t, `
exclude-ports = 7001
[[rule]]
remote-ports = [7001, "7003-7004"]
action = "encrypt"
[[rule]]
remote = "`+b.path.B.Addr4().String()+`"
remote-ports = 7002
action = "plain"
[[rule]]
remote-ports = 7005
action = "require"
`)
	a, _ := b.daemon(b.path.A, "--config", config), b.daemon(b.path.B)
	for port, want := range map[string]string{"7001": "encrypted", "7002": "", "7004": "encrypted", "7005": "encrypted", "7006": "encrypted"} {
		ln, err := b.path.B.NS.Listen("tcp", net.JoinHostPort(b.path.B.Addr4().String(), port))
		if err != nil {
			t.Fatal(err)
		}
		c, err := b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		fs, err := a.Flows(b.ctx)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, f := range fs {
			if f.Local == c.LocalAddr().String() && f.Remote == c.RemoteAddr().String() {
				got = string(f.State)
			}
		}
		if got != want {
			t.Errorf("port %s: state %q, want %q", port, got, want)
		}
		c.Close()
		ln.Close()
	}
}

func writeFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tcpcrypt.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
