package e2e

import (
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// The figures of docs/limits.md take larger numbers than a test should: see
// test-limits in the Makefile.
var (
	floodSYNs = flag.Int("flood.syns", 30000, "SYNs of a flood")
	floodRate = flag.Int("flood.rate", 12000, "SYNs of a flood per second")
	idleFlows = flag.Int("idle.flows", 2000, "idle connections")
)

// flooder sends SYNs out of a host's far interface.
type flooder struct {
	sock *lab.PacketSocket
	tmpl []byte
	l4   int
}

// newFlooder prepares a SYN with an ENO option to a listener of B.
func (b *bed) newFlooder(to netip.AddrPort) *flooder {
	b.t.Helper()
	sock, err := b.path.MidB.OpenPacket()
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { sock.Close() })
	opts := []byte{packet.OptMSS, 4, 5, 180, packet.OptNOP, packet.OptNOP, 4, 2}
	opts = append(opts, slowpath.AppendOffer(nil, 0, crypto.AllTEPs[:1], slowpath.Suboption{})...)
	for len(opts)%4 != 0 {
		opts = append(opts, packet.OptNOP)
	}
	f := make([]byte, packet.EthLen+packet.IPv4Len+packet.TCPLen+len(opts))
	copy(f, b.path.B.MAC)
	copy(f[6:], b.path.A.MAC)
	f[12], f[13] = 8, 0
	ip := f[packet.EthLen:]
	ip[0], ip[8], ip[9] = 0x45, 64, 6
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	dst := to.Addr().As4()
	copy(ip[16:], dst[:])
	t := ip[packet.IPv4Len:]
	binary.BigEndian.PutUint16(t[2:], to.Port())
	t[12], t[13] = byte((packet.TCPLen+len(opts))/4<<4), packet.SYN
	binary.BigEndian.PutUint16(t[14:], 64240)
	copy(t[packet.TCPLen:], opts)
	return &flooder{sock: sock, tmpl: f, l4: packet.EthLen + packet.IPv4Len}
}

// frame is SYN number i. Its source is in 198.18.0.0/15, for which there is no
// route back but the default one.
func (f *flooder) frame(i int) []byte {
	b := slices.Clone(f.tmpl)
	ip := b[packet.EthLen:]
	copy(ip[12:], []byte{198, 18 + byte(i>>16&1), byte(i >> 8), byte(i)})
	binary.BigEndian.PutUint16(ip[4:], uint16(i))
	t := b[f.l4:]
	binary.BigEndian.PutUint16(t, uint16(1024+i>>4%60000))
	binary.BigEndian.PutUint32(t[4:], uint32(i)*2654435761)
	packet.PutIPv4Checksum(ip[:packet.IPv4Len])
	packet.FullChecksum(b, packet.EthLen, f.l4, false)
	return b
}

// send sends n SYNs at a rate, and returns how many left in what time.
func (f *flooder) send(ctx context.Context, first, n, rate int) (sent int, took time.Duration) {
	begin := time.Now()
	const batch = 64
	frames := make([][]byte, 0, batch)
	for i := 0; i < n && ctx.Err() == nil; i += batch {
		frames = frames[:0]
		for k := i; k < min(i+batch, n); k++ {
			frames = append(frames, f.frame(first+k))
		}
		m, _ := f.sock.Send(frames...)
		sent += m
		if ahead := time.Duration(i+batch)*time.Second/time.Duration(rate) - time.Since(begin); ahead > 0 {
			pause := time.NewTimer(ahead)
			select {
			case <-pause.C:
			case <-ctx.Done():
			}
			pause.Stop()
		}
	}
	return sent, time.Since(begin)
}

// pump sends over a connection from A to B until the test ends, and counts what
// arrives.
func (b *bed) pump() (c net.Conn, got *atomic.Int64) {
	b.t.Helper()
	client, server := b.connected()
	got = new(atomic.Int64)
	go func() {
		data := make([]byte, 256<<10)
		for {
			if _, err := client.Write(data); err != nil {
				return
			}
		}
	}()
	go func() {
		buf := make([]byte, 256<<10)
		for {
			n, err := server.Read(buf)
			got.Add(int64(n))
			if err != nil {
				return
			}
		}
	}()
	b.eventually("data flows", func() (string, bool) { return "", got.Load() > 1<<20 })
	return client, got
}

// flooded measures the throughput of an established connection in bytes a
// second, in turn without and with a flood of SYNs against the same host.
func (b *bed) flooded(f *flooder, n, rounds int) (quiet, flood []float64, sent int) {
	b.t.Helper()
	_, got := b.pump()
	share := n / rounds
	window := min(time.Duration(share)*time.Second/time.Duration(*floodRate), 5*time.Second)
	for r := range rounds {
		before, begin := got.Load(), time.Now()
		pause := time.NewTimer(window)
		select {
		case <-pause.C:
		case <-b.ctx.Done():
			b.t.Fatal(b.ctx.Err())
		}
		quiet = append(quiet, float64(got.Load()-before)/time.Since(begin).Seconds())
		before = got.Load()
		k, took := f.send(b.ctx, r*share, share, *floodRate)
		sent += k
		flood = append(flood, float64(got.Load()-before)/took.Seconds())
		b.t.Logf("round %d: %.0f Mb/s without, %.0f Mb/s with %d SYNs a second", r, quiet[r]*8/1e6, flood[r]*8/1e6, int(float64(k)/took.Seconds()))
	}
	return quiet, flood, sent
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// fullFlood is from how many SYNs on the figures are worth a judgement.
const fullFlood = 500000

// A flood of SYNs from addresses that do not answer, all of which offer
// encryption: half-open connections and memory stay bounded, the connection that
// is there goes on, connections of this host are encrypted all the while, and
// those from outside again soon after. With as many SYNs as test-limits sends, the
// connection keeps 80 % of its throughput, or as much as a plain one does without
// the daemons.
func TestSYNFlood(t *testing.T) {
	drop := func(d lab.Dir, f []byte) lab.Verdict {
		// Answers to made-up addresses.
		if d == lab.BtoA && len(f) > packet.EthLen+packet.IPv4Len && f[12] == 8 && f[13] == 0 && f[packet.EthLen+16] == 198 {
			return lab.Drop
		}
		return lab.Pass
	}
	n, rounds, limit := *floodSYNs, 1, 512
	if n >= fullFlood {
		rounds, limit = 5, slowpath.DefaultMaxHalfOpen
	}
	prepare := func() (*bed, *flooder) {
		b := newBed(t, lab.Options{}, lab.ForwarderOptions{Hook: drop})
		var cancel context.CancelFunc
		b.ctx, cancel = context.WithTimeout(t.Context(), 10*time.Minute)
		t.Cleanup(cancel)
		if err := b.path.B.AddRoute(netip.MustParsePrefix("198.18.0.0/15"), b.path.A.Addr4()); err != nil {
			t.Fatal(err)
		}
		ln := b.echo()
		return b, b.newFlooder(netip.MustParseAddrPort(ln.Addr().String()))
	}
	plain := 0.0
	if n >= fullFlood {
		b, f := prepare()
		quiet, flood, sent := b.flooded(f, n/5, rounds)
		plain = median(flood) / median(quiet)
		t.Logf("plain, without daemons: %d SYNs, %.2f of the throughput", sent, plain)
	}
	b, f := prepare()
	a := b.daemon(b.path.A)
	z := b.daemon(b.path.B, "--max-half-open", fmt.Sprint(limit))
	b.encryptsAgain(a, false)
	before := b.rss(z)
	most, highest := 0, before
	looked := make(chan struct{})
	look, stop := context.WithCancel(b.ctx)
	go func() {
		defer close(looked)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for look.Err() == nil {
			if st, err := z.Status(look); err == nil {
				most = max(most, st.HalfOpen)
			}
			if r, err := rss(z); err == nil {
				highest = max(highest, r)
			}
			select {
			case <-tick.C:
			case <-look.Done():
			}
		}
	}()
	quiet, flood, sent := b.flooded(f, n, rounds)
	if err := b.turned().exchange(false, stream(1, 20000), stream(2, 20000), func() { b.flow(z) }); err != nil {
		t.Errorf("connection of the flooded host: %v", err)
	}
	stop()
	<-looked
	st := b.stats(z)
	t.Logf("%d SYNs: at most %d half-open, RSS %d -> %d MiB, shed in XDP %d, in the slow path %d, over the limit %d",
		sent, most, before>>20, highest>>20, st.Counters["bpf_xdp_syn_passed_shed"], st.Counters["slow_path_shed"], st.Reasons[slowpath.ReasonLimit])
	if most > limit || most == 0 {
		t.Errorf("%d half-open connections, at most %d are allowed", most, limit)
	}
	// A half-open connection, and what the memory of those that ended takes
	// until it is collected.
	if highest > before+64<<20+int64(limit)*8<<10 {
		t.Errorf("memory grew from %d to %d MiB", before>>20, highest>>20)
	}
	if st.Counters["bpf_xdp_syn_passed_shed"] == 0 {
		t.Error("no SYN was shed: this was no flood")
	}
	if n >= fullFlood {
		kept := median(flood) / median(quiet)
		t.Logf("encrypted: %.2f of the throughput, plain without daemons: %.2f", kept, plain)
		if kept < 0.8 && kept < plain-0.05 {
			t.Errorf("an encrypted connection keeps %.2f of its throughput, a plain one %.2f", kept, plain)
		}
	}
	b.eventually("connections from outside are encrypted again", func() (string, bool) {
		var err error
		if e := b.exchange(false, make([]byte, 1000), make([]byte, 1000), func() {
			fs, ferr := z.Flows(b.ctx)
			live := 0
			for _, f := range fs {
				if f.State == slowpath.StateEncrypted {
					live++
				}
			}
			if err = ferr; live < 2 {
				err = fmt.Errorf("%d encrypted", live)
			}
		}); e != nil {
			return e.Error(), false
		}
		return fmt.Sprint(err), err == nil
	})
}
