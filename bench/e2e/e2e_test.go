// Package e2e tests the program as a user runs it: daemons as processes in
// network namespaces, applications on the kernels' own TCP, a wire between
// them that is watched and impaired.
package e2e

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// program is the binary under test: a fresh build, or what TCPCRYPT_PROGRAM
// names, for instance a build with the race detector.
var program string

func TestMain(m *testing.M) {
	if what := os.Getenv(holderEnv); what != "" {
		if err := holder(what); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	dir, err := os.MkdirTemp("", "tcpcrypt-e2e")
	if err != nil {
		panic(err)
	}
	if program = os.Getenv("TCPCRYPT_PROGRAM"); program == "" {
		if program, err = daemon.Build(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// canary is the block that every transfer is made of; it must not be seen on
// the wire of an encrypted connection.
var canary = []byte("plaintext canary of the end-to-end tests 0123456789\n")

// watch looks for the canary on the wire, and for the SYN options.
type watch struct {
	mu      sync.Mutex
	plain   int // segments that hold the canary
	enoSYN  int
	inits   int // segments that begin with an Init message
	payload int64
	offers  []offer
}

// offer is a SYN or SYN-ACK that carried an ENO option.
type offer struct {
	dir    lab.Dir
	synack bool
	frame  []byte
	option []byte // kind and length included
}

// resumption returns the first suboption that proposes or accepts a resumption.
func (o *offer) resumption() (data []byte, ok bool) {
	e, err := slowpath.ParseENO(o.option)
	if err != nil {
		return nil, false
	}
	for _, s := range e.Subs {
		if s.V {
			return s.Data, true
		}
	}
	return nil, false
}

func (w *watch) tap(l lab.Link, d lab.Dir, b []byte) {
	if l != lab.LinkA {
		return
	}
	var s packet.Segment
	if packet.Parse(b, packet.FromOuter, &s) != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.payload += int64(s.Len())
	if bytes.Contains(s.Payload(), canary[:24]) {
		w.plain++
	}
	if s.Len() >= 4 {
		if magic := binary.BigEndian.Uint32(s.Payload()); magic == crypto.Init1Magic || magic == crypto.Init2Magic {
			w.inits++
		}
	}
	if s.Flags&packet.SYN != 0 {
		_ = packet.WalkOptions(s.Options(), func(o []byte) bool {
			if o[0] == packet.OptENO {
				w.enoSYN++
				w.offers = append(w.offers, offer{d, s.Flags&packet.ACK != 0, bytes.Clone(b), bytes.Clone(o)})
			}
			return true
		})
	}
}

func (w *watch) seen() (plain, eno int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.plain, w.enoSYN
}

// since returns the offers from the n-th on.
func (w *watch) since(n int) []offer {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.offers[n:])
}

// exchanges returns how many Init messages were sent.
func (w *watch) exchanges() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.inits
}

// data returns how many bytes of payload were on the wire.
func (w *watch) data() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.payload
}

// bed is two hosts with a watched wire between them.
type bed struct {
	t    *testing.T
	ctx  context.Context
	path *lab.Path
	fwd  *lab.Forwarder
	wire *watch
	prog string // the binary, if not program
}

func newBed(t *testing.T, o lab.Options, f lab.ForwarderOptions) *bed {
	t.Helper()
	return newBedWith(t, o, f, (*lab.Path).Forward)
}

// newBedWith is newBed with a forwarder of another kind.
func newBedWith(t *testing.T, o lab.Options, f lab.ForwarderOptions, forward func(*lab.Path, lab.ForwarderOptions) (*lab.Forwarder, error)) *bed {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	t.Cleanup(cancel)
	l := lab.Start(t)
	o.Neighbours = true
	path, err := l.Middle(o)
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{t: t, ctx: ctx, path: path, wire: &watch{}}
	f.Tap = b.wire.tap
	if f.Seed == 0 {
		f.Seed = 1
	}
	if b.fwd, err = forward(path, f); err != nil {
		t.Fatal(err)
	}
	return b
}

// daemon starts the program on a host and stops it, orderly, at the test's end.
func (b *bed) daemon(host *lab.Iface, flags ...string) *daemon.Daemon {
	b.t.Helper()
	d, err := daemon.Start(b.ctx, cmp.Or(b.prog, program), host, nil, flags...)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		if b.t.Failed() {
			b.t.Logf("log of the daemon on %s:\n%s", host.NS.ShortName(), d.Logs())
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			if st, err := d.Stats(ctx); err == nil {
				maps.DeleteFunc(st.Counters, func(_ string, n uint64) bool { return n == 0 })
				b.t.Logf("ended flows: %v; counters: %v", st.Reasons, st.Counters)
			}
		}
	})
	return d
}

func (b *bed) both(flags ...string) (a, z *daemon.Daemon) {
	b.t.Helper()
	return b.daemon(b.path.A, flags...), b.daemon(b.path.B, flags...)
}

// stream is the test data number seed: the canary with numbers in between.
func stream(seed uint64, n int) []byte {
	out := make([]byte, 0, n+128)
	var num [8]byte
	for i := uint64(0); len(out) < n; i++ {
		binary.BigEndian.PutUint64(num[:], seed<<40+i)
		out = append(append(out, canary...), num[:]...)
	}
	return out[:n]
}

// result of one side of a transfer.
type result struct {
	got []byte
	err error
}

// exchange sends up from A to B and down from B to A at the same time over one
// connection, closes both directions, and returns an error unless both arrived
// byte-exact and ended with an end of file. hold runs while both are open.
func (b *bed) exchange(v6 bool, up, down []byte, hold func()) error {
	client, server, err := b.connect(v6)
	if err != nil {
		return err
	}
	defer client.Close()
	defer server.Close()
	defer context.AfterFunc(b.ctx, func() { client.Close(); server.Close() })()
	if hold != nil {
		hold()
	}
	return carry(client, server, up, down)
}

// connect opens a connection from A to B.
func (b *bed) connect(v6 bool) (client, server net.Conn, err error) {
	ip, _ := b.addr(v6)
	ln, err := b.path.B.NS.Listen("tcp", net.JoinHostPort(ip.String(), "0"))
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	return b.connectTo(ln, ln.Addr().String())
}

// connectTo connects A to an address at which it reaches a listener.
func (b *bed) connectTo(ln net.Listener, address string) (client, server net.Conn, err error) {
	accepted := make(chan net.Conn, 1)
	go func() {
		defer close(accepted)
		if c, err := ln.Accept(); err == nil {
			accepted <- c
		}
	}()
	if client, err = b.path.A.NS.Dial(b.ctx, "tcp", address); err != nil {
		return nil, nil, fmt.Errorf("connect: %w", err)
	}
	select {
	case c, ok := <-accepted:
		if ok {
			return client, c, nil
		}
		err = errors.New("accept failed")
	case <-b.ctx.Done():
		err = fmt.Errorf("accept: %w", b.ctx.Err())
	}
	client.Close()
	return nil, nil, err
}

// carry sends up from client to server and down the other way at the same time,
// closes both directions, and returns an error unless both arrived byte-exact
// and ended with an end of file.
func carry(client, server net.Conn, up, down []byte) (err error) {
	res := [2]chan result{make(chan result, 1), make(chan result, 1)}
	side := func(c net.Conn, send, want []byte, out chan result) {
		wrote := make(chan error, 1)
		go func() {
			_, err := c.Write(send)
			if err == nil {
				err = c.(*net.TCPConn).CloseWrite()
			}
			wrote <- err
		}()
		got, err := io.ReadAll(c)
		if werr := <-wrote; err == nil {
			err = werr
		}
		if err == nil && !bytes.Equal(got, want) {
			err = fmt.Errorf("got %d bytes (SHA-256 %x), want %d (%x)", len(got), sha256.Sum256(got), len(want), sha256.Sum256(want))
		}
		out <- result{got, err}
	}
	go side(client, up, down, res[0])
	go side(server, down, up, res[1])
	for i, name := range []string{"client", "server"} {
		if r := <-res[i]; r.err != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w (after %d bytes)", name, r.err, len(r.got)))
		}
	}
	return err
}

// noFlows waits until a daemon lists no encrypted or half-open flow.
func (b *bed) noFlows(d *daemon.Daemon) {
	b.t.Helper()
	b.eventually("no flow is left", func() (string, bool) {
		fs, err := d.Flows(b.ctx)
		if err != nil {
			return err.Error(), false
		}
		for _, f := range fs {
			if f.State != slowpath.StatePlain && f.State != slowpath.StateFailed {
				return fmt.Sprintf("%+v", f), false
			}
		}
		return "", true
	})
}

// eventually polls until the condition holds; the context bounds it.
func (b *bed) eventually(what string, cond func() (string, bool)) {
	b.t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	ctx, cancel := context.WithTimeout(b.ctx, 30*time.Second)
	defer cancel()
	for {
		why, ok := cond()
		if ok {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			b.t.Fatalf("%s: not within 30 s: %s", what, why)
		}
	}
}

func (b *bed) flow(d *daemon.Daemon) fastpath.FlowInfo {
	b.t.Helper()
	f, err := d.Flow(b.ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	return f
}

func (b *bed) stats(d *daemon.Daemon) fastpath.Stats {
	b.t.Helper()
	st, err := d.Stats(b.ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	return st
}

func eachIP(t *testing.T, fn func(t *testing.T, v6 bool)) {
	for _, v6 := range []bool{false, true} {
		name := "IPv4"
		if v6 {
			name = "IPv6"
		}
		t.Run(name, func(t *testing.T) { fn(t, v6) })
	}
}

// Two hosts with daemons encrypt; both know the same session ID (ENO 5.1), and
// nothing readable crosses the wire (TC 3.2).
func TestEncrypted(t *testing.T) {
	eachIP(t, func(t *testing.T, v6 bool) {
		b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
		a, z := b.both()
		var fa, fz fastpath.FlowInfo
		err := b.exchange(v6, stream(1, 20<<20), stream(2, 20<<20), func() { fa, fz = b.flow(a), b.flow(z) })
		if err != nil {
			t.Fatal(err)
		}
		if fa.SessionID == "" || fa.SessionID != fz.SessionID {
			t.Errorf("session IDs %q and %q", fa.SessionID, fz.SessionID)
		}
		if fa.Role != "A" || fz.Role != "B" {
			t.Errorf("roles %s and %s", fa.Role, fz.Role)
		}
		if plain, _ := b.wire.seen(); plain != 0 {
			t.Errorf("%d segments with plaintext on the wire", plain)
		}
		b.noFlows(a)
		b.noFlows(z)
		if err := errors.Join(a.Stop(), z.Stop()); err != nil {
			t.Error(err)
		}
	})
}

// Against a host without the daemon both directions of opening give the plain
// TCP that there always was, and its packets do not pass through the daemon.
func TestPeerWithout(t *testing.T) {
	for _, side := range []string{"active", "passive"} {
		t.Run(side, func(t *testing.T) {
			eachIP(t, func(t *testing.T, v6 bool) {
				b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
				host := b.path.A
				if side == "passive" {
					host = b.path.B
				}
				d := b.daemon(host)
				if err := b.exchange(v6, stream(1, 4<<20), stream(2, 4<<20), nil); err != nil {
					t.Fatal(err)
				}
				st, err := d.Stats(b.ctx)
				if err != nil {
					t.Fatal(err)
				}
				c := st.Counters
				if n := c["to_slow_path"] + c["outer_packets"] + c["inner_packets"]; n > 40 {
					t.Errorf("%d packets of a plain connection passed through the daemon", n)
				}
				if side == "active" && st.Reasons[slowpath.ReasonPeerNoENO] != 1 {
					t.Errorf("reasons %v, want one %s", st.Reasons, slowpath.ReasonPeerNoENO)
				}
				if err := d.Stop(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// A path that strips the option, in either direction and at any step, leaves
// plain TCP, and both sides say why.
func TestStripped(t *testing.T) {
	for _, c := range []struct {
		name        string
		dir         lab.Dir
		from        lab.Segments
		reasonA     string
		reasonB     string
		mayBeFailed bool
	}{
		{"SYN", lab.AtoB, lab.SYNs, slowpath.ReasonPeerNoENO, "", false},
		{"SYN-ACK", lab.BtoA, lab.SYNACKs, slowpath.ReasonPeerNoENO, slowpath.ReasonNoENOInAck, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			im := lab.Impair{Strip: []lab.Strip{{Kind: packet.OptENO, From: c.from}}}
			o := lab.ForwarderOptions{}
			if c.dir == lab.AtoB {
				o.AtoB = im
			} else {
				o.BtoA = im
			}
			b := newBed(t, lab.Options{}, o)
			a, z := b.both()
			if err := b.exchange(false, stream(1, 1<<20), stream(2, 1<<20), nil); err != nil {
				t.Fatal(err)
			}
			for d, want := range map[*daemon.Daemon]string{a: c.reasonA, z: c.reasonB} {
				st, err := d.Stats(b.ctx)
				if err != nil {
					t.Fatal(err)
				}
				if want != "" && st.Reasons[want] != 1 {
					t.Errorf("reasons %v, want %s", st.Reasons, want)
				}
				fs, err := d.Flows(b.ctx)
				if err != nil {
					t.Fatal(err)
				}
				if want != "" && (len(fs) != 1 || fs[0].State != slowpath.StatePlain || fs[0].Reason != want) {
					t.Errorf("flows %+v, want one plain with %s", fs, want)
				}
				if n := st.Counters["outer_packets"] + st.Counters["inner_packets"] + st.Counters["to_slow_path"]; n > 40 {
					t.Errorf("%d packets of a plain connection passed through the daemon", n)
				}
			}
		})
	}
}

// Loss, reordering and duplication in both directions: byte-exact, and it ends.
func TestImpaired(t *testing.T) {
	eachIP(t, func(t *testing.T, v6 bool) {
		im := lab.Impair{Drop: 0.01, Reorder: 0.02, Duplicate: 0.01}
		b := newBed(t, lab.Options{}, lab.ForwarderOptions{Seed: 7, AtoB: im, BtoA: im})
		a, z := b.both()
		if err := b.exchange(v6, stream(1, 50<<20), stream(2, 50<<20), nil); err != nil {
			t.Fatal(err)
		}
		if plain, _ := b.wire.seen(); plain != 0 {
			t.Errorf("%d segments with plaintext on the wire", plain)
		}
		b.noFlows(a)
		b.noFlows(z)
	})
}

// Segments cut and merged on the way change nothing.
func TestResegmented(t *testing.T) {
	im := lab.Impair{Cut: 0.3, Coalesce: 0.3, Drop: 0.002, Corrupt: 0.002}
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{Seed: 9, AtoB: im, BtoA: im})
	a, z := b.both()
	if err := b.exchange(false, stream(1, 8<<20), stream(2, 8<<20), nil); err != nil {
		t.Fatal(err)
	}
	b.noFlows(a)
	b.noFlows(z)
}

// Short connections, one after the other, leave nothing behind.
func TestShortConnections(t *testing.T) {
	n := 1000
	if testing.Short() {
		n = 100
	}
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	ln := b.echo()
	msg := stream(3, 300)
	for i := range n {
		c, err := b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String())
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		_, err = c.Write(msg)
		if err == nil {
			err = c.(*net.TCPConn).CloseWrite()
		}
		got, rerr := io.ReadAll(c)
		if err = errors.Join(err, rerr); err != nil || !bytes.Equal(got, msg) {
			t.Fatalf("connection %d: %v, echoed %d bytes", i, err, len(got))
		}
		c.Close()
	}
	b.noFlows(a)
	b.noFlows(z)
	st, err := a.Stats(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if got := st.Reasons[fastpath.ReasonClosed]; got != uint64(n) {
		t.Errorf("%d of %d connections closed as encrypted ones: %v", got, n, st.Reasons)
	}
	if plain, _ := b.wire.seen(); plain != 0 {
		t.Errorf("%d segments with plaintext on the wire", plain)
	}
}

// echo is a server that echoes, for tests of many connections.
func (b *bed) echo() net.Listener {
	b.t.Helper()
	return b.echoAt(false)
}

func (b *bed) echoAt(v6 bool) net.Listener {
	b.t.Helper()
	ip, _ := b.addr(v6)
	return b.echoServer(net.JoinHostPort(ip.String(), "0"))
}

func (b *bed) echoOn(port string) net.Listener {
	b.t.Helper()
	return b.echoServer(net.JoinHostPort(b.path.B.Addr4().String(), port))
}

func (b *bed) echoServer(addr string) net.Listener {
	b.t.Helper()
	ln, err := b.path.B.NS.Listen("tcp", addr)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(c, c)
				c.Close()
			}()
		}
	}()
	return ln
}

// A thousand connections open at the same time, each with its own data.
func TestManyFlows(t *testing.T) {
	const workers, each = 8, 125
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	ln := b.echo()
	conns := make([]net.Conn, workers*each)
	errs := make(chan error, workers)
	for w := range workers {
		go func() {
			for i := range each {
				c, err := b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String())
				if err != nil {
					errs <- err
					return
				}
				conns[w*each+i] = c
			}
			errs <- nil
		}()
	}
	for range workers {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	if st, err := a.Status(b.ctx); err != nil || st.Flows != len(conns) {
		t.Errorf("status lists %d flows of %d: %v", st.Flows, len(conns), err)
	}
	for i, c := range conns {
		if _, err := c.Write(stream(uint64(i), 200)); err != nil {
			t.Fatal(err)
		}
	}
	for i, c := range conns {
		defer context.AfterFunc(b.ctx, func() { c.Close() })()
		got := make([]byte, 200)
		if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, stream(uint64(i), 200)) {
			t.Fatalf("connection %d: %v", i, err)
		}
		c.Close()
	}
	b.noFlows(a)
	b.noFlows(z)
	b.encryptedOnly(a, z, uint64(len(conns)))
}

// The same ports again at once, after a reset and after an orderly end: each
// time a new encrypted connection, without waiting for a retransmission.
func TestPortReuse(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	ln := b.echo()
	from := &net.TCPAddr{IP: b.path.A.Addr4().AsSlice(), Port: 45678}
	for i := range 40 {
		c, err := b.path.A.NS.DialFrom(b.ctx, "tcp", from, ln.Addr().String())
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		_ = c.(*net.TCPConn).SetLinger(0)
		var x [1]byte
		if _, err := c.Write(x[:]); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, x[:]); err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	b.encryptedOnly(a, z, 40)
	n, err := b.path.A.NS.TCPCounters()
	if err != nil {
		t.Fatal(err)
	}
	if n["TcpExt.TCPSynRetrans"] > 2 {
		t.Errorf("%d SYNs were retransmitted", n["TcpExt.TCPSynRetrans"])
	}
}

// Many connections at once, with random sizes and random ways to end.
func TestChurn(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	var wg sync.WaitGroup
	errs := make(chan error, 64)
	for i := range 24 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for range 4 {
				if err := b.exchange(i%2 == 1, stream(uint64(i), rng.IntN(1<<20)), stream(uint64(i)+100, rng.IntN(1<<20)), nil); err != nil {
					errs <- err
					return
				}
			}
		}()
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	b.noFlows(a)
	b.noFlows(z)
}
