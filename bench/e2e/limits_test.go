package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// held opens connections that say nothing, until the server is told to close.
func (b *bed) held(ln net.Listener, n int) (cs []net.Conn) {
	b.t.Helper()
	for range n {
		c, err := b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String())
		if err != nil {
			b.t.Fatal(err)
		}
		b.guarded(c)
		cs = append(cs, c)
	}
	return cs
}

// release has the server of a held connection close it, and closes it.
func (b *bed) release(c net.Conn) {
	b.t.Helper()
	if _, err := c.Write([]byte{'s'}); err != nil {
		b.t.Error(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != "s" {
		b.t.Errorf("a held connection got %q: %v", got, err)
	}
	c.Close()
}

// A full flow table: those that are in it go on, further connections are plain,
// or refused where they must not be, and the reason is counted. With room there
// is encryption again.
func TestFlowLimit(t *testing.T) {
	for _, require := range []bool{false, true} {
		t.Run(fmt.Sprintf("require=%v", require), func(t *testing.T) {
			b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
			flags := []string{"--max-flows", "8"}
			if require {
				flags = append(flags, "--require")
			}
			a := b.daemon(b.path.A, flags...)
			b.daemon(b.path.B)
			ln := b.obedient()
			cs := b.held(ln, 8)
			st := b.stats(a)
			if n := st.Reasons[slowpath.ReasonFlows] + st.Reasons[slowpath.ReasonRequired]; n != 0 {
				t.Fatalf("reasons %v", st.Reasons)
			}
			for i := range 5 {
				c, err := b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String())
				switch {
				case require && !errors.Is(err, unix.ECONNREFUSED):
					t.Errorf("connection %d beyond the limit: %v, want a refusal", i, err)
				case !require && err != nil:
					t.Errorf("connection %d beyond the limit: %v", i, err)
				case !require:
					b.release(c)
				}
			}
			why := map[bool]string{false: slowpath.ReasonFlows, true: slowpath.ReasonRequired}[require]
			if st := b.stats(a); st.Reasons[why] != 5 {
				t.Errorf("reasons %v, want 5 %s", st.Reasons, why)
			}
			for _, c := range cs {
				b.release(c)
			}
			b.encryptsAgain(a, false)
			if n, _ := b.wire.seen(); n != 0 {
				t.Errorf("%d segments with plaintext on the wire", n)
			}
		})
	}
}

// maps returns the maps with the given name that a daemon has open.
func (b *bed) maps(d *daemon.Daemon, name string) (ms []*ebpf.Map) {
	b.t.Helper()
	infos, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", d.Process.Pid))
	if err != nil {
		b.t.Fatal(err)
	}
	seen := make(map[uint64]bool)
	for _, path := range infos {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // closed meanwhile
		}
		_, after, ok := strings.Cut(string(text), "map_id:")
		if !ok {
			continue
		}
		id, err := strconv.ParseUint(strings.Fields(after)[0], 10, 32)
		if err != nil || seen[id] {
			continue
		}
		seen[id] = true
		m, err := ebpf.NewMapFromID(ebpf.MapID(id))
		if err != nil {
			b.t.Fatal(err)
		}
		if info, err := m.Info(); err == nil && info.Name == name {
			ms = append(ms, m)
			b.t.Cleanup(func() { m.Close() })
		} else {
			m.Close()
		}
	}
	if len(ms) == 0 {
		b.t.Fatalf("the daemon has no map %s", name)
	}
	return ms
}

// cram fills a map of connections, and returns a function that empties it again.
func (b *bed) cram(m *ebpf.Map) (undo func()) {
	b.t.Helper()
	var keys []xdp.FlowKey
	key := func(i int) (k xdp.FlowKey) {
		copy(k[:], "junk junk junk junk junk junk junk")
		k[36], k[37], k[38] = byte(i), byte(i>>8), byte(i>>16)
		return k
	}
	put := func(k xdp.FlowKey) bool {
		if err := m.Put(k, uint32(0)); errors.Is(err, unix.E2BIG) {
			return false
		} else if err != nil {
			b.t.Fatal(err)
		}
		keys = append(keys, k)
		return true
	}
	for i := 0; put(key(i)); i++ {
		if i > 2*xdp.DefaultFlows {
			b.t.Fatal("the map has no end")
		}
	}
	return func() {
		for _, k := range keys {
			if err := m.Delete(k); err != nil {
				b.t.Error(err)
				return
			}
		}
	}
}

// The kernel's maps of connections are full, or it has no memory for an entry,
// although the daemon counted on room: what is established goes on, a connection
// that cannot be diverted or guarded becomes plain with the first copy of its SYN,
// the reason is counted, and with room there is encryption again.
func TestMapFull(t *testing.T) {
	for _, name := range []string{"flows", "guard_flows"} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
			a := b.daemon(b.path.A, "--max-flows", "8")
			z := b.daemon(b.path.B)
			client, server := b.connected()
			if err := swap(client, server, stream(1, 10000), stream(2, 10000)); err != nil {
				t.Fatal(err)
			}
			var undo []func()
			for _, m := range b.maps(a, name) {
				undo = append(undo, b.cram(m))
			}
			ln := b.obedient()
			c, err := b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String())
			if err != nil {
				t.Fatalf("connection without room in the map: %v", err)
			}
			b.release(c)
			st := b.stats(a)
			if st.Counters["map_full"] == 0 || st.Reasons[slowpath.ReasonFlows] == 0 {
				t.Errorf("map_full %d, reasons %v", st.Counters["map_full"], st.Reasons)
			}
			if err := swap(client, server, stream(3, 200000), stream(4, 200000)); err != nil {
				t.Errorf("the connection that was there: %v", err)
			}
			for _, f := range undo {
				f()
			}
			b.encryptsAgain(a, false)
			if n, _ := b.wire.seen(); n != 0 {
				t.Errorf("%d segments with plaintext on the wire", n)
			}
			client.Close()
			server.Close()
			b.idle(a, z)
		})
	}
}

// Little memory and few packet buffers, and many transfers at once over a path
// with a delay: all of them arrive, whether encrypted or, because there was no
// memory for one more, plain. Afterwards there is encryption again.
func TestMemoryLimit(t *testing.T) {
	im := lab.Impair{Delay: 20 * time.Millisecond}
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{AtoB: im, BtoA: im})
	a, z := b.both("--memory", "1M", "--umem-chunks", "2048")
	const n = 64
	var wg sync.WaitGroup
	errs := make(chan error, n)
	quiet := make([]byte, 300000) // what is plain holds no canary
	for i := range quiet {
		quiet[i] = byte(i>>8 ^ i)
	}
	for range n {
		wg.Go(func() { errs <- b.exchange(false, quiet, quiet, nil) })
	}
	wg.Wait()
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	for _, d := range []*daemon.Daemon{a, z} {
		st := b.stats(d)
		t.Logf("no_memory %d, over_budget %d, no_chunk %d, reasons %v", st.Counters["no_memory"], st.Counters["over_budget"], st.Counters["no_chunk"], st.Reasons)
	}
	st := b.stats(a)
	if st.Counters["no_memory"]+st.Reasons[slowpath.ReasonMemory] == 0 {
		t.Error("memory was not short: this was no test")
	}
	b.encryptsAgain(a, false)
	b.idle(a, z)
}

// rss returns the resident memory of a daemon in bytes.
func rss(d *daemon.Daemon) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(string(text), "VmRSS:")
	var kib int64
	_, err = fmt.Sscan(after, &kib)
	return kib << 10, err
}

func (b *bed) rss(d *daemon.Daemon) int64 {
	b.t.Helper()
	n, err := rss(d)
	if err != nil {
		b.t.Fatal(err)
	}
	return n
}
