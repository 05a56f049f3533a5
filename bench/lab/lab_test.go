package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
)

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// netnsInode identifies the namespace that the calling thread is in.
func netnsInode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// transfer sends data over a connection from a to b, and reports what arrived.
func transfer(ctx context.Context, from, to *Namespace, addr netip.Addr, data []byte) ([]byte, error) {
	ln, err := to.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
	if err != nil {
		return nil, err
	}
	defer ln.Close()
	type result struct {
		b   []byte
		err error
	}
	ch := make(chan result, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			ch <- result{nil, err}
			return
		}
		defer c.Close()
		b, err := io.ReadAll(c)
		ch <- result{b, err}
	}()
	c, err := from.Dial(ctx, "tcp", ln.Addr().String())
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if d, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(d)
	}
	if _, err := c.Write(data); err != nil {
		return nil, err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return nil, err
	}
	select {
	case r := <-ch:
		return r.b, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func TestPair(t *testing.T) {
	for _, o := range []Options{
		{},
		{NoOffload: true, Neighbours: true, Queues: 2},
		{MTU: 9000, NoOffload: true},
		{MTU: 1280, A: EndOptions{NoOffload: true, Name: "wan0"}},
	} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			l := Start(t)
			p, err := l.Pair(o)
			if err != nil {
				t.Fatal(err)
			}
			data := bytes.Repeat([]byte("0123456789abcdef"), 1<<14)
			for _, addr := range []netip.Addr{p.B.Addr6(), p.B.Addr4()} {
				got, err := transfer(testContext(t), p.A.NS, p.B.NS, addr, data)
				if err != nil {
					t.Fatalf("%v: %v", addr, err)
				}
				if !bytes.Equal(got, data) {
					t.Errorf("%v: %d of %d bytes arrived", addr, len(got), len(data))
				}
			}
			want := o.MTU
			if want == 0 {
				want = 1500
			}
			for _, i := range []*Iface{p.A, p.B} {
				if i.MTU != want {
					t.Errorf("MTU %d, want %d", i.MTU, want)
				}
			}
			for _, f := range []Feature{TxChecksum, TSO, GSO, GRO} {
				on, err := p.A.HasFeature(f)
				if err != nil {
					t.Fatal(err)
				}
				// GRO is off on a veth unless asked for.
				if off := o.NoOffload || o.A.NoOffload; f != GRO && on == off {
					t.Errorf("%v: on is %v", f, on)
				}
			}
			c, err := p.A.Counters()
			if err != nil || c.TxBytes < uint64(len(data)) {
				t.Errorf("counters %+v, %v", c, err)
			}
			m, err := p.A.NS.TCPCounters()
			if err != nil || m["Tcp.ActiveOpens"] != 2 {
				t.Errorf("ActiveOpens %d, %v", m["Tcp.ActiveOpens"], err)
			}
		})
	}
}

func TestOffloadSwitch(t *testing.T) {
	p, err := Start(t).Pair(Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, on := range []bool{false, true, false} {
		if err := p.A.SetOffload(on); err != nil {
			t.Fatalf("SetOffload(%v): %v", on, err)
		}
		for _, f := range []Feature{TxChecksum, TSO, GSO, GRO} {
			if got, err := p.A.HasFeature(f); err != nil || got != on {
				t.Errorf("%v is %v after SetOffload(%v), %v", f, got, on, err)
			}
		}
	}
}

func TestVLAN(t *testing.T) {
	l := Start(t)
	p, err := l.Middle(Options{})
	if err != nil {
		t.Fatal(err)
	}
	var tagged, plain atomic.Int64
	if _, err := p.Forward(ForwarderOptions{Tap: func(_ Link, _ Dir, b []byte) {
		x, ok := frame.Parse(b)
		switch {
		case !ok || !x.TCP:
		case x.L3 == frame.EthLen+frame.VLANLen && b[15] == 7 && x.ChecksumOK(b):
			tagged.Add(1)
		default:
			plain.Add(1)
		}
	}}); err != nil {
		t.Fatal(err)
	}
	va, err := p.A.AddVLAN(7, netip.MustParsePrefix("10.200.0.1/24"), netip.MustParsePrefix("fd07::1/64"))
	if err != nil {
		t.Fatal(err)
	}
	vb, err := p.B.AddVLAN(7, netip.MustParsePrefix("10.200.0.2/24"), netip.MustParsePrefix("fd07::2/64"))
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("tagged"), 20000)
	for _, addr := range []netip.Addr{vb.Addr4(), vb.Addr6()} {
		got, err := transfer(testContext(t), va.NS, vb.NS, addr, data)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%v: got %d bytes, %v", addr, len(got), err)
		}
	}
	if tagged.Load() == 0 || plain.Load() != 0 {
		t.Errorf("%d tagged and %d other frames on the wire", tagged.Load(), plain.Load())
	}
	if _, err := p.A.AddVLAN(4095); err == nil {
		t.Error("VLAN 4095 accepted")
	}
}

func TestDo(t *testing.T) {
	l := Start(t)
	n, err := l.Namespace("x")
	if err != nil {
		t.Fatal(err)
	}
	m, err := l.Namespace("y")
	if err != nil {
		t.Fatal(err)
	}
	const self = "/proc/thread-self/ns/net"
	outside := netnsInode(t, "/proc/self/ns/net")
	inside := netnsInode(t, n.Path())
	other := netnsInode(t, m.Path())
	boom := errors.New("boom")
	err = n.Do(func() error {
		if got := netnsInode(t, self); got != inside {
			t.Errorf("inside: namespace %d, want %d", got, inside)
		}
		if err := m.Do(func() error {
			if got := netnsInode(t, self); got != other {
				t.Errorf("nested: namespace %d, want %d", got, other)
			}
			return boom
		}); err != boom {
			t.Errorf("nested error %v", err)
		}
		if got := netnsInode(t, self); got != inside {
			t.Errorf("after the nested call: namespace %d, want %d", got, inside)
		}
		return boom
	})
	if err != boom {
		t.Errorf("error %v", err)
	}
	func() {
		defer func() { _ = recover() }()
		_ = n.Do(func() error { panic(boom) })
	}()
	if got := netnsInode(t, self); got != outside {
		t.Errorf("after a panic: namespace %d, want %d", got, outside)
	}
}

func TestCommand(t *testing.T) {
	l := Start(t)
	p, err := l.Pair(Options{A: EndOptions{Name: "only-here"}})
	if err != nil {
		t.Fatal(err)
	}
	ctx := testContext(t)
	out, err := p.A.NS.Command(ctx, "ls", "/sys/class/net").Output()
	if err != nil || !strings.Contains(string(out), "only-here") {
		t.Errorf("/sys/class/net in the namespace: %q, %v", out, err)
	}
	out, err = p.A.NS.Command(ctx, "cat", "/proc/net/dev").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "only-here") {
		t.Errorf("/proc/net/dev in the namespace: %q, %v", out, err)
	}
	if _, err := os.Stat("/sys/class/net/only-here"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the command's /sys shows outside: %v", err)
	}
	for _, mount := range mountsBelow("/sys/") {
		if err := p.A.NS.Command(ctx, "mountpoint", "-q", mount).Run(); err != nil {
			t.Errorf("%s is not mounted inside: %v", mount, err)
		}
	}
	var exit *exec.ExitError
	if err := p.A.NS.Command(ctx, "sh", "-c", "exit 3").Run(); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("exit status: %v", err)
	}
	if err := p.A.NS.Command(ctx, "/nonexistent").Run(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing program: %v", err)
	}
}

func TestCloseRemovesEverything(t *testing.T) {
	l, err := New()
	if errors.Is(err, ErrPrivilege) {
		t.Skipf("skipped: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p, err := l.Middle(Options{})
	if err != nil {
		t.Fatal(err)
	}
	// A shell with a child: both have to go.
	c := p.A.NS.Command(testContext(t), "sh", "-c", "sleep 1000 & echo $!; wait")
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	var child int
	if _, err := fmt.Fscan(out, &child); err != nil {
		t.Fatal(err)
	}
	ran := false
	l.AtClose(func() error { ran = true; return nil })
	if err := l.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if !ran {
		t.Error("AtClose function not called")
	}
	if _, err := processStart(c.Process.Pid); err == nil {
		t.Errorf("process %d lives", c.Process.Pid)
	}
	// The orphan is killed, init reaps it when it likes.
	if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", child)); err == nil && bytes.Contains(env, []byte(l.Name())) {
		if st, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", child)); !bytes.Contains(st, []byte(") Z ")) {
			t.Errorf("child %d lives: %s", child, st)
		}
	}
	left, _ := filepath.Glob(filepath.Join(netnsDir, l.Name()+"*"))
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := os.Stat(l.Dir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("directory: %v", err)
	}
	if err := p.A.NS.Do(func() error { return nil }); !errors.Is(err, ErrClosed) {
		t.Errorf("Do after Close: %v", err)
	}
	if _, err := l.Namespace("late"); !errors.Is(err, ErrClosed) {
		t.Errorf("Namespace after Close: %v", err)
	}
	if err := p.A.NS.Command(context.Background(), "true").Run(); !errors.Is(err, ErrClosed) {
		t.Errorf("Command after Close: %v", err)
	}
}

// TestSweep lets another process make a lab and die by SIGKILL.
func TestSweep(t *testing.T) {
	const role = "LAB_TEST_VICTIM"
	if os.Getenv(role) != "" {
		l, err := New()
		if err != nil {
			t.Fatal(err)
		}
		p, err := l.Pair(Options{})
		if err != nil {
			t.Fatal(err)
		}
		c := p.A.NS.Command(context.Background(), "sleep", "1000")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		fmt.Println("made", l.Name(), c.Process.Pid)
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	}
	Start(t) // for the check of privileges
	victim := exec.CommandContext(testContext(t), os.Args[0], "-test.run=^TestSweep$")
	victim.Env = append(os.Environ(), role+"=1")
	out, _ := victim.Output()
	var name string
	var child int
	if _, err := fmt.Sscanf(string(out), "made %s %d", &name, &child); err != nil {
		t.Fatalf("victim said %q: %v", out, err)
	}
	// Another test process may sweep first; either way nothing may be left.
	if _, err := Sweep(); err != nil {
		t.Fatal(err)
	}
	left, _ := filepath.Glob(filepath.Join(netnsDir, name+"*"))
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), name+"*"))
	if len(left)+len(dirs) > 0 {
		t.Errorf("left behind: %v %v", left, dirs)
	}
	if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", child)); err == nil && bytes.Contains(env, []byte(name)) {
		t.Errorf("process %d of the dead lab lives", child)
	}
}

func TestLabOf(t *testing.T) {
	for _, c := range []struct {
		in, want string
		ok       bool
	}{
		{"tcpcrypt-12.345.1-a", "tcpcrypt-12.345.1", true},
		{"tcpcrypt-12.345.1", "tcpcrypt-12.345.1", true},
		{"tcpcrypt-12.345.1-a-b.c", "tcpcrypt-12.345.1", true},
		{"tcpcrypt-12.345-a", "", false},
		{"tcpcrypt-x.345.1-a", "", false},
		{"tcpcrypt-", "", false},
		{"blue", "", false},
	} {
		if got, ok := labOf(c.in); got != c.want || ok != c.ok {
			t.Errorf("labOf(%q) = %q, %v", c.in, got, ok)
		}
	}
}
