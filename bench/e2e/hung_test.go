package e2e

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// resent returns how many SYNs of a host were retransmitted.
func (b *bed) resent(host *lab.Namespace) int64 {
	b.t.Helper()
	n, err := host.TCPCounters()
	if err != nil {
		b.t.Fatal(err)
	}
	return n["TcpExt.TCPSynRetrans"]
}

// halt stops a daemon, and returns when none of its threads runs any more.
func (b *bed) halt(d *daemon.Daemon) {
	b.t.Helper()
	if err := d.Process.Signal(unix.SIGSTOP); err != nil {
		b.t.Fatal(err)
	}
	b.eventually("the daemon is stopped", func() (string, bool) {
		stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", d.Process.Pid))
		if err != nil {
			b.t.Fatal(err)
		}
		for _, name := range stats {
			text, err := os.ReadFile(name)
			if err != nil {
				continue // a thread that ended
			}
			// The state follows the command in parentheses.
			if _, state, _ := strings.Cut(string(text), ") "); !strings.HasPrefix(state, "T") {
				return string(text), false
			}
		}
		return "", len(stats) > 0
	})
}

func (b *bed) resume(d *daemon.Daemon) {
	b.t.Helper()
	if err := d.Process.Signal(unix.SIGCONT); err != nil {
		b.t.Fatal(err)
	}
}

// taken returns how many SYNs the programs of a daemon have given to it.
func (b *bed) taken(d *daemon.Daemon) uint64 {
	b.t.Helper()
	n := b.stats(d).Counters
	return n["bpf_egress_syn_redirected"] + n["bpf_xdp_syn_redirected"]
}

// dialHung stops a daemon, connects from A to a listener on B, and has the daemon
// go on. Of that connection's SYNs at most the first one may get lost in the daemon:
// the programs notice before the first retransmission. How long the answer to that
// takes is another matter. use works with the connection while the daemon hangs.
func (b *bed) dialHung(d *daemon.Daemon, ln net.Listener, use func(net.Conn)) error {
	b.t.Helper()
	for {
		taken, before := b.taken(d), b.resent(b.path.A.NS)
		b.halt(d)
		c, err := b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String())
		late := b.resent(b.path.A.NS) == before
		if err == nil && !late {
			b.guarded(c)
			use(c)
		}
		b.resume(d)
		if n := b.taken(d) - taken; n > 1 {
			b.t.Errorf("%d SYNs got lost in the daemon, want 1", n)
		}
		if late && b.ctx.Err() == nil {
			// This test was slower than the programs.
			if err == nil {
				c.Close()
			}
			b.encryptsAgain(d, false)
			continue
		}
		return err
	}
}

// encryptsAgain waits until new connections are encrypted.
func (b *bed) encryptsAgain(d *daemon.Daemon, v6 bool) {
	b.t.Helper()
	b.eventually("new connections are encrypted", func() (string, bool) {
		var ferr error
		err := b.exchange(v6, make([]byte, 10000), make([]byte, 10000), func() { _, ferr = d.Flow(b.ctx) })
		if err = errors.Join(err, ferr); err != nil {
			return err.Error(), false
		}
		return "", true
	})
}

// A daemon that hangs is noticed before the first retransmission of a SYN, one
// second after it: that one makes a plain connection, in both directions. The
// first SYN waits where the daemon finds it when it goes on, and must not be
// taken for a new connection: the plain one lives on as such.
func TestHungConnect(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		side := map[bool]string{false: "outwards over IPv4", true: "inwards over IPv6"}[v6]
		t.Run(side, func(t *testing.T) {
			b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
			a, z := b.both()
			opener, hung := b, a
			if v6 {
				opener = b.turned()
			}
			ln := opener.echoAt(v6)
			var c net.Conn
			for b.stats(hung).Counters["stale_syns"] == 0 {
				// Again, if the SYN came when the programs had noticed.
				if err := opener.dialHung(hung, ln, func(plain net.Conn) {
					c = plain
					opener.echoed(c, stream(1, 20000))
				}); err != nil {
					t.Fatal(err)
				}
				opener.echoed(c, stream(2, 200000))
			}
			for _, d := range []*daemon.Daemon{a, z} {
				fs, err := d.Flows(b.ctx)
				if err != nil {
					t.Fatal(err)
				}
				for _, f := range fs {
					if f.State == slowpath.StateEncrypted || f.State == slowpath.StateClosing {
						t.Errorf("the plain connection is listed: %+v", f)
					}
				}
			}
			// The peer was not at fault.
			b.encryptsAgain(a, v6)
			opener.echoed(c, stream(5, 1000))
		})
	}
}

// So it is with many of them, more than are taken from a queue at once.
func TestHungConnects(t *testing.T) {
	const connections = 400
	for _, inwards := range []bool{false, true} {
		t.Run(map[bool]string{false: "outwards", true: "inwards"}[inwards], func(t *testing.T) {
			b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
			a, _ := b.both()
			opener := b
			if inwards {
				opener = b.turned()
			}
			ln := opener.echoAt(false)
			for waiting := uint64(0); waiting < connections/2; {
				// Again, if most SYNs came when the programs had noticed.
				taken, stale := b.taken(a), b.stats(a).Counters["stale_syns"]
				b.halt(a)
				var pending []<-chan dialled
				for range connections {
					pending = append(pending, opener.dialling(ln))
				}
				var cs []net.Conn
				for _, p := range pending {
					d := <-p
					if d.err != nil {
						t.Fatal(d.err)
					}
					opener.guarded(d.c)
					cs = append(cs, d.c)
				}
				b.resume(a)
				waiting = b.taken(a) - taken
				b.eventually("the SYNs are dropped", func() (string, bool) {
					n := b.stats(a).Counters["stale_syns"] - stale
					return fmt.Sprintf("%d of %d", n, waiting), n == waiting
				})
				for i, c := range cs {
					opener.echoed(c, stream(uint64(i), 100))
					c.Close()
				}
				b.encryptsAgain(a, false)
			}
		})
	}
}

// Where encryption is required the retransmission is refused instead.
func TestHungRequire(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a := b.daemon(b.path.A, "--require")
	b.daemon(b.path.B)
	for _, opener := range []*bed{b, b.turned()} {
		ln := opener.echoAt(false)
		err := opener.dialHung(a, ln, func(net.Conn) {})
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("connect while the daemon hangs: %v, want a refusal", err)
		}
		b.encryptsAgain(a, false)
	}
	if n, _ := b.wire.seen(); n != 0 {
		t.Errorf("%d segments with plaintext on the wire", n)
	}
}

type dialled struct {
	c   net.Conn
	err error
}

// dialling connects from A to a listener on B, which may take its time.
func (b *bed) dialling(ln net.Listener) <-chan dialled {
	done := make(chan dialled, 1)
	go func() {
		c, err := b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String())
		done <- dialled{c, err}
	}()
	return done
}

// dropping returns a hook that drops the TCP segments which match picks, in one
// direction, until it is told to let them pass.
func dropping(dir lab.Dir, match func(*packet.Segment) bool) (hook lab.Hook, pass func()) {
	var passes atomic.Bool
	return func(d lab.Dir, f []byte) lab.Verdict {
		var s packet.Segment
		if !passes.Load() && d == dir && packet.Parse(f, packet.FromOuter, &s) == nil && match(&s) {
			return lab.Drop
		}
		return lab.Pass
	}, func() { passes.Store(true) }
}

// A connection that is being opened when the daemon begins to hang waits for it,
// as one to a host that does not answer would.
func TestHungOpening(t *testing.T) {
	hook, pass := dropping(lab.BtoA, func(s *packet.Segment) bool { return s.Flags&packet.SYN != 0 })
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{Hook: hook})
	a, _ := b.both()
	ln := b.echo()
	done := b.dialling(ln)
	b.eventually("the offer is made", func() (string, bool) {
		st, err := a.Status(b.ctx)
		return "", err == nil && st.HalfOpen == 1
	})
	b.halt(a)
	pass()
	before := b.resent(b.path.A.NS)
	b.eventually("the SYN is sent again", func() (string, bool) { return "", b.resent(b.path.A.NS) >= before+2 })
	n, err := b.path.A.NS.TCPCounters()
	if err != nil || n["TcpExt.TCPRetransFail"] != 0 {
		t.Errorf("the kernel was told of %d drops, after ten of which it gives up: %v", n["TcpExt.TCPRetransFail"], err)
	}
	b.resume(a)
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	b.guarded(r.c)
	b.echoed(r.c, make([]byte, 20000))
}

// So does one that the local host has answered: its kernel forgets the peer's SYN when
// it is told that the answer was dropped, and would reset what the peer sends then.
func TestHungAnswered(t *testing.T) {
	hook, pass := dropping(lab.AtoB, func(s *packet.Segment) bool { return s.Flags&packet.SYN == 0 })
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{Hook: hook})
	_, z := b.both()
	ln := b.echo()
	done := b.dialling(ln)
	b.eventually("the SYN is answered", func() (string, bool) {
		return "", b.stats(z).Counters["slowpath_answered"] == 1
	})
	b.halt(z)
	before := b.resent(b.path.B.NS)
	b.eventually("the answer is sent again", func() (string, bool) { return "", b.resent(b.path.B.NS) > before })
	pass()
	b.resume(z)
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	b.guarded(r.c)
	b.echoed(r.c, make([]byte, 20000))
}

// While the daemon hangs nothing of an encrypted connection gets past it, in
// either direction: what the peer sends is dropped before the stack, what the
// stack sends before the wire. When the daemon goes on, so does the connection,
// without a byte lost.
func TestHungTransfer(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, _ := b.both()
	client, server := b.connected()
	if err := swap(client, server, stream(1, 100000), stream(2, 100000)); err != nil {
		t.Fatal(err)
	}
	b.halt(a)
	done := make(chan error, 1)
	go func() { done <- swap(client, server, stream(3, 1<<20), stream(4, 1<<20)) }()
	counters := func() map[string]uint64 { return b.stats(a).Counters }
	// A connection that becomes plain shows that the programs have noticed.
	c, err := b.path.A.NS.Dial(b.ctx, "tcp", b.echo().Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, ns := range []*lab.Namespace{b.path.A.NS, b.path.B.NS} {
		before := b.resends(ns)
		b.eventually("the hosts send again", func() (string, bool) { return "", b.resends(ns) > before })
	}
	select {
	case err := <-done:
		t.Fatalf("data passed a hung daemon: %v", err)
	default:
	}
	b.resume(a)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	n := counters()
	for _, name := range []string{"bpf_xdp_flow_dropped_stale", "bpf_egress_flow_dropped_stale"} {
		if n[name] == 0 {
			t.Errorf("counter %s is 0", name)
		}
	}
	if n, _ := b.wire.seen(); n != 0 {
		t.Errorf("%d segments with plaintext on the wire", n)
	}
}

// resends returns how many segments a host has retransmitted.
func (b *bed) resends(ns *lab.Namespace) int64 {
	b.t.Helper()
	n, err := ns.TCPCounters()
	if err != nil {
		b.t.Fatal(err)
	}
	return n["Tcp.RetransSegs"]
}
