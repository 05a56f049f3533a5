package e2e

import (
	"errors"
	"math/rand/v2"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// churn runs connections with random sizes in both directions, n at a time, and
// returns the workers of the two daemons that had them.
func (b *bed) churn(a, z *daemon.Daemon, n, rounds, size int) (at, zt map[int]bool) {
	b.t.Helper()
	at, zt = make(map[int]bool), make(map[int]bool)
	var mu sync.Mutex
	note := func(d *daemon.Daemon, to map[int]bool) {
		fs, err := d.Flows(b.ctx)
		if err != nil {
			b.t.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		for _, f := range fs {
			if f.State == slowpath.StateEncrypted {
				to[f.Worker] = true
			}
		}
	}
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 1))
			for k := range rounds {
				hold := func() {
					if k == 0 {
						note(a, at)
						note(z, zt)
					}
				}
				if err := b.exchange(i%2 == 1, stream(uint64(i), r.IntN(size)), stream(uint64(i)+100, r.IntN(size)), hold); err != nil {
					b.t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.noFlows(a)
	b.noFlows(z)
	return at, zt
}

// Workers for several queues carry the same connections, byte-exact, however
// many there are and whatever they do without work; all commands see the
// connections of all of them.
func TestWorkers(t *testing.T) {
	for _, c := range []struct {
		name    string
		queues  int
		flags   []string
		workers int
	}{
		{name: "two", queues: 2, workers: 2},
		{name: "one for two queues", queues: 2, flags: []string{"--workers", "1"}, workers: 1},
		{name: "more than CPUs", queues: 8, flags: []string{"--workers", "8", "--poll", "sleep"}, workers: 8},
		{name: "pinned, busy", queues: 2, flags: []string{"--queues", "1,0", "--cpus", "0-1", "--poll", "busy"}, workers: 2},
		{name: "busy poll", queues: 2, flags: []string{"--busy-poll"}, workers: 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, lab.Options{Queues: c.queues}, lab.ForwarderOptions{})
			a, z := b.both(c.flags...)
			if c.name != "pinned, busy" {
				at, zt := b.churn(a, z, 16, 2, 1<<19)
				if c.workers > 1 && (len(at) < 2 || len(zt) < 2) {
					t.Errorf("only the workers %v and %v had connections", at, zt)
				}
			} else {
				b.churn(a, z, 4, 1, 1<<19)
			}
			st, err := a.Status(b.ctx)
			if err != nil {
				t.Fatal(err)
			}
			if len(st.Workers) != c.workers || len(st.Queues) != c.queues {
				t.Errorf("status %+v", st)
			}
			seen := make(map[int]int)
			for _, w := range st.Workers {
				for _, q := range w.Queues {
					seen[q] = w.Worker
				}
			}
			for _, q := range st.Queues {
				if w, ok := seen[q.Queue]; !ok || w != q.Worker || q.CPU != st.Workers[w].CPU {
					t.Errorf("queue %+v, workers %+v", q, st.Workers)
				}
			}
			var n int
			err = b.exchange(false, stream(1, 1<<16), stream(2, 1<<16), func() {
				f := b.flow(a)
				if g := b.flow(z); f.SessionID == "" || f.SessionID != g.SessionID {
					t.Errorf("session IDs %q and %q", f.SessionID, g.SessionID)
				}
				n, err = a.Rekey(b.ctx)
				if err != nil || n != 1 {
					t.Errorf("rekeying begun on %d connections: %v", n, err)
				}
			})
			if err != nil {
				t.Error(err)
			}
			if plain, _ := b.wire.seen(); plain != 0 {
				t.Errorf("%d segments with plaintext on the wire", plain)
			}
			b.noFlows(a)
			if err := errors.Join(a.Stop(), z.Stop()); err != nil {
				t.Error(err)
			}
		})
	}
}

// An active open is answered on a queue of the peer's choice: its flow goes
// there, and stays, with its packets from the local stack.
func TestWorkersFollowQueue(t *testing.T) {
	b := newBed(t, lab.Options{Queues: 2}, lab.ForwarderOptions{})
	a, z := b.both()
	b.churn(a, z, 24, 1, 1<<18)
	st := b.stats(a).Counters
	if st["half_open_moved"] == 0 {
		t.Error("no connection went to the worker of its queue")
	}
	// A few packets are on their way while a flow moves.
	if n := st["handed_over_outer"] + st["handed_over_inner"]; n > 24*20 {
		t.Errorf("%d packets were handed over", n)
	}
	if st["handed_over_dropped"] != 0 {
		t.Errorf("%d handed-over packets were dropped", st["handed_over_dropped"])
	}
}

// Packets that reach the wrong worker are handed over and counted, and nothing
// of a connection is lost that TCP does not mend.
func TestHandover(t *testing.T) {
	b := newBed(t, lab.Options{Queues: 2}, lab.ForwarderOptions{})
	a, z := b.both()
	for _, i := range []*lab.Iface{b.path.MidA, b.path.MidB} {
		stop, err := i.AlternateQueues(6)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = stop() })
	}
	b.churn(a, z, 16, 2, 1<<19)
	for _, d := range []*daemon.Daemon{a, z} {
		st := b.stats(d)
		if st.Counters["handed_over_outer"] < 1000 || st.Counters["handed_over_received"] < 1000 {
			t.Errorf("%d packets were handed over, %d received", st.Counters["handed_over_outer"], st.Counters["handed_over_received"])
		}
		for reason, n := range st.Reasons {
			if reason != "closed" && n > 0 {
				t.Errorf("%d flows ended: %s", n, reason)
			}
		}
		status, err := d.Status(b.ctx)
		if err != nil {
			t.Fatal(err)
		}
		var queues, workers uint64
		for _, q := range status.Queues {
			queues += q.HandedOver
		}
		for _, w := range status.Workers {
			workers += w.HandedOver
		}
		if queues == 0 || workers < queues {
			t.Errorf("status tells of %d handed-over packets by queue, %d by worker", queues, workers)
		}
	}
	if err := errors.Join(a.Stop(), z.Stop()); err != nil {
		t.Error(err)
	}
}

// The same with a build that detects data races and one that checks who owns
// each chunk of packet memory: either ends the daemon when it finds something.
func TestHandoverChecked(t *testing.T) {
	for _, c := range []struct {
		name  string
		extra []string
	}{
		{"race", []string{"-race"}},
		{"ownership", []string{"-tags", "xdpdebug"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := exec.LookPath("gcc"); c.name == "race" && err != nil {
				t.Skipf("skipped: the race detector needs a C compiler: %v", err)
			}
			prog, err := daemon.Build(t.TempDir(), c.extra...)
			if err != nil {
				t.Fatal(err)
			}
			b := newBed(t, lab.Options{Queues: 2}, lab.ForwarderOptions{})
			b.prog = prog
			t.Setenv("GORACE", "halt_on_error=1")
			a, z := b.both()
			for _, i := range []*lab.Iface{b.path.MidA, b.path.MidB} {
				stop, err := i.AlternateQueues(6)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = stop() })
			}
			b.churn(a, z, 8, 2, 1<<18)
			for _, d := range []*daemon.Daemon{a, z} {
				if n := b.stats(d).Counters["handed_over_received"]; n < 100 {
					t.Errorf("%d packets were handed over", n)
				}
			}
			if err := errors.Join(a.Stop(), z.Stop()); err != nil {
				t.Error(err)
			}
			if log := a.Logs() + z.Logs(); strings.Contains(log, "DATA RACE") {
				t.Errorf("a data race:\n%s", log)
			}
		})
	}
}

// What cannot be had is one line, and nothing stays attached.
func TestWorkersRefused(t *testing.T) {
	b := newBed(t, lab.Options{Queues: 2}, lab.ForwarderOptions{})
	for _, c := range []struct{ flag, want string }{
		{"--workers=3", "workers: 3 are more than the 2 receive queues of eth0"},
		{"--cpus=4000", "cpus: CPU 4000 is not one that this process may run on"},
		{"--numa=9", "numa: node 9 has no CPU"},
		{"--queues=7", "queue 7: eth0 has queues 0-1"},
		{"--poll=never", "hybrid, busy, sleep"},
	} {
		out, err := b.path.A.NS.Command(b.ctx, program, "run", "--interface", b.path.A.Name, "--control", b.path.A.NS.Lab().Dir()+"/w.sock", c.flag).CombinedOutput()
		text := strings.TrimSpace(string(out))
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 2 || strings.Contains(text, "\n") || !strings.Contains(text, c.want) {
			t.Errorf("%s: %v\n%s", c.flag, err, out)
		}
	}
	if d, g := attached(t, b.path.A); len(d)+len(g) != 0 {
		t.Errorf("still attached: %v %v", d, g)
	}
}
