package e2e

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// config returns the flags for a configuration file with the given text.
func config(t *testing.T, text string) []string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tcpcrypt.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"--config", path}
}

// meeting is what both daemons and the wire say of one connection.
type meeting struct {
	opener, other fastpath.FlowInfo
	proposed      bool // the SYN carried a resumption suboption
	accepted      bool // the SYN-ACK did
}

func (m *meeting) resumed() bool { return m.opener.Resumed && m.other.Resumed }

// meet opens a connection from A to an echo server, sends data both ways and
// closes it.
func (b *bed) meet(opener, other *daemon.Daemon, ln net.Listener) (m meeting) {
	b.t.Helper()
	_, before := b.wire.seen()
	c, err := b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String())
	if err != nil {
		b.t.Fatal(err)
	}
	defer c.Close()
	defer context.AfterFunc(b.ctx, func() { c.Close() })()
	if m.opener, err = opener.Session(b.ctx, c.LocalAddr(), c.RemoteAddr()); err != nil {
		b.t.Fatal(err)
	}
	msg := stream(3, 20000)
	b.echoed(c, msg[:10000])
	// The listening side may learn of the connection with its first data.
	if m.other, err = other.Session(b.ctx, c.RemoteAddr(), c.LocalAddr()); err != nil {
		b.t.Fatal(err)
	}
	b.echoed(c, msg[10000:])
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		b.t.Fatal(err)
	}
	if _, err := io.ReadAll(c); err != nil {
		b.t.Fatal(err)
	}
	if m.opener.SessionID == "" || m.opener.SessionID != m.other.SessionID || m.opener.Resumed != m.other.Resumed {
		b.t.Errorf("the daemons disagree: %+v and %+v", m.opener, m.other)
	}
	for _, o := range b.wire.since(before) {
		_, v := o.resumption()
		m.proposed = m.proposed || v && !o.synack
		m.accepted = m.accepted || v && o.synack
	}
	return m
}

func (b *bed) echoed(c net.Conn, msg []byte) {
	b.t.Helper()
	if _, err := c.Write(msg); err != nil {
		b.t.Fatal(err)
	}
	got := make([]byte, len(msg))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, msg) {
		b.t.Fatalf("the echo of %d bytes: %v", len(msg), err)
	}
}

// idle waits until neither daemon has a flow.
func (b *bed) idle(ds ...*daemon.Daemon) {
	b.t.Helper()
	for _, d := range ds {
		b.noFlows(d)
	}
}

// The second connection resumes the session of the first (RFC 8548 section 3.5):
// both SYNs say so, no Init message is sent, and the session ID is another one.
// Either host may open it.
func TestResumed(t *testing.T) {
	eachIP(t, func(t *testing.T, v6 bool) {
		b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
		a, z := b.both()
		there, back := b.echoAt(v6), b.turned().echoAt(v6)
		first := b.meet(a, z, there)
		if first.resumed() || first.proposed {
			t.Errorf("the first connection was resumed: %+v", first)
		}
		b.idle(a, z)
		ids := map[string]bool{first.opener.SessionID: true}
		inits := b.wire.exchanges()
		for _, s := range []struct {
			name          string
			on            *bed
			opener, other *daemon.Daemon
			ln            net.Listener
		}{
			{"again", b, a, z, there},
			{"roles swapped", b.turned(), z, a, back},
			{"roles swapped again", b.turned(), z, a, back},
			{"as in the beginning", b, a, z, there},
		} {
			m := s.on.meet(s.opener, s.other, s.ln)
			if !m.resumed() || !m.proposed || !m.accepted {
				t.Errorf("%s: not resumed: %+v", s.name, m)
			}
			if m.opener.Role != "A" || m.other.Role != "B" || m.opener.TEP != first.opener.TEP || m.opener.AEAD != first.opener.AEAD {
				t.Errorf("%s: flows %+v and %+v", s.name, m.opener, m.other)
			}
			if ids[m.opener.SessionID] {
				t.Errorf("%s: the session ID %s was there before", s.name, m.opener.SessionID)
			}
			ids[m.opener.SessionID] = true
			b.idle(a, z)
		}
		if n := b.wire.exchanges(); n != inits {
			t.Errorf("%d Init messages in resumed connections", n-inits)
		}
		b.encryptedOnly(a, z, 5)
	})
}

// Of a thousand connections one after the other the first agrees on a key; all
// others resume, each with an identifier of its own.
func TestResumedThousandTimes(t *testing.T) {
	n := 1000
	if testing.Short() {
		n = 100
	}
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	ln := b.echo()
	for range n {
		c, err := b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		b.echoed(c, canary)
		c.Close()
	}
	b.idle(a, z)
	for name, d := range map[string]*daemon.Daemon{"a": a, "b": z} {
		c := b.stats(d).Counters
		if c["slowpath_encrypted"] != uint64(n) || c["slowpath_resumed"] != uint64(n-1) {
			t.Errorf("%s encrypted %d connections and resumed %d, want %d and %d", name, c["slowpath_encrypted"], c["slowpath_resumed"], n, n-1)
		}
	}
	for _, s := range []struct {
		d    *daemon.Daemon
		peer netip.Addr
		role string
	}{{a, b.path.B.Addr4(), "A"}, {z, b.path.A.Addr4(), "B"}} {
		es, err := s.d.Cache(b.ctx)
		if err != nil || len(es) != 1 || es[0].Peer != s.peer.String() || es[0].Role != s.role || es[0].Next != uint32(n) {
			t.Errorf("cached is %+v, want one session with %v and i = %d next: %v", es, s.peer, n, err)
		}
	}
	seen := map[string]bool{}
	for _, o := range b.wire.since(0) {
		data, v := o.resumption()
		if !v {
			continue
		}
		if seen[string(data[:9])] {
			t.Fatalf("the identifier %x was used twice", data[:9])
		}
		seen[string(data[:9])] = true
	}
	if len(seen) != 2*(n-1) {
		t.Errorf("%d resumption suboptions on the wire, want %d", len(seen), 2*(n-1))
	}
	if plain, _ := b.wire.seen(); plain != 0 {
		t.Errorf("%d segments with plaintext on the wire", plain)
	}
}

// A host that has forgotten its sessions gets a fresh key exchange in the same
// handshake: nothing fails, and nobody waits for a retransmission.
func TestResumedAfterRestart(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	ln := b.echo()
	b.meet(a, z, ln)
	b.idle(a, z)
	for _, c := range []struct {
		name   string
		opener bool // is restarted
		end    func(*daemon.Daemon) error
	}{
		{"listener restarted", false, (*daemon.Daemon).Stop},
		{"listener killed", false, (*daemon.Daemon).Kill},
		{"opener restarted", true, (*daemon.Daemon).Stop},
		{"opener killed", true, (*daemon.Daemon).Kill},
	} {
		if m := b.meet(a, z, ln); !m.resumed() {
			t.Errorf("before %s: not resumed: %+v", c.name, m)
		}
		b.idle(a, z)
		gone, host := &z, b.path.B
		if c.opener {
			gone, host = &a, b.path.A
		}
		if err := c.end(*gone); err != nil {
			t.Fatal(err)
		}
		*gone = b.daemon(host)
		before := b.timeouts()
		if m := b.meet(a, z, ln); m.resumed() || m.proposed == c.opener || m.accepted {
			t.Errorf("%s: %+v", c.name, m)
		}
		b.idle(a, z)
		if m := b.meet(a, z, ln); !m.resumed() {
			t.Errorf("%s: the session of after the restart was not resumed: %+v", c.name, m)
		}
		b.idle(a, z)
		if n := b.timeouts(); n != before {
			t.Errorf("%s: %d retransmission time-outs", c.name, n-before)
		}
	}
}

// timeouts counts how often a kernel had to wait for a retransmission timer.
func (b *bed) timeouts() (n int64) {
	b.t.Helper()
	for _, host := range []*lab.Iface{b.path.A, b.path.B} {
		c, err := host.NS.TCPCounters()
		if err != nil {
			b.t.Fatal(err)
		}
		n += c["TcpExt.TCPTimeouts"]
	}
	return n
}

// Who does not want to resume, or to keep sessions, does not; the connection is
// encrypted all the same.
func TestResumptionRefused(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a := b.daemon(b.path.A, config(t, `
[[rule]]
remote-ports = "6001"
resume = false
[[rule]]
remote-ports = "6003"
cache = false
`)...)
	z := b.daemon(b.path.B, config(t, `
[[rule]]
local-ports = "6002"
resume = false
[[rule]]
local-ports = "6004"
cache = false
`)...)
	for i, c := range []struct {
		name     string
		port     string
		flush    *daemon.Daemon
		peer     []string
		flushed  int
		proposed bool
		resumed  bool
	}{
		{name: "no rule", port: "6000", proposed: true, resumed: true},
		{name: "the opener's rule", port: "6001"},
		{name: "the listener's rule", port: "6002", proposed: true},
		{name: "the opener's rule on caching", port: "6003"},
		{name: "the listener's rule on caching", port: "6004", proposed: true},
		{name: "flushed by the opener", port: "6005", flush: a, flushed: 1},
		{name: "flushed by the listener", port: "6006", flush: z, flushed: 1, proposed: true},
		{name: "flushed by address", port: "6007", flush: a, peer: []string{b.path.B.Addr4().String()}, flushed: 1},
		{name: "another address flushed", port: "6008", flush: a, peer: []string{b.path.A.Addr4().String()}, proposed: true, resumed: true},
	} {
		for _, d := range []*daemon.Daemon{a, z} {
			if _, err := d.FlushCache(b.ctx); err != nil {
				t.Fatal(err)
			}
		}
		ln := b.echoOn(c.port)
		if m := b.meet(a, z, ln); m.resumed() || m.proposed {
			t.Errorf("%s: first connection: %+v", c.name, m)
		}
		b.idle(a, z)
		if c.flush != nil {
			if n, err := c.flush.FlushCache(b.ctx, c.peer...); err != nil || n != c.flushed {
				t.Errorf("%s: %d sessions flushed, want %d: %v", c.name, n, c.flushed, err)
			}
		}
		if m := b.meet(a, z, ln); m.resumed() != c.resumed || m.accepted != c.resumed || m.proposed != c.proposed {
			t.Errorf("%s: second connection: %+v, want proposed %v and resumed %v", c.name, m, c.proposed, c.resumed)
		}
		b.idle(a, z)
		b.encryptedOnly(a, z, uint64(2*i+2))
	}
}

// The flag --no-resume does on either side what the rules do.
func TestNoResume(t *testing.T) {
	for _, opener := range []bool{true, false} {
		t.Run(map[bool]string{true: "opener", false: "listener"}[opener], func(t *testing.T) {
			b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
			var flags [2][]string
			flags[map[bool]int{true: 0, false: 1}[opener]] = []string{"--no-resume"}
			a, z := b.daemon(b.path.A, flags[0]...), b.daemon(b.path.B, flags[1]...)
			ln := b.echo()
			b.meet(a, z, ln)
			b.idle(a, z)
			if m := b.meet(a, z, ln); m.resumed() || m.accepted || m.proposed == opener {
				t.Errorf("second connection: %+v", m)
			}
			b.idle(a, z)
			b.encryptedOnly(a, z, 2)
		})
	}
}

// recorder keeps the frames of A, and keeps A's kernel out of connections that
// the test makes up in its name.
type recorder struct {
	mu     sync.Mutex
	frames [][]byte
	mine   map[uint16]bool // ports of A
}

func (r *recorder) hook(d lab.Dir, b []byte) lab.Verdict {
	x, ok := frame.Parse(b)
	if d != lab.AtoB || !ok || !x.TCP {
		return lab.Pass
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mine[x.Src(b).Port()] {
		return lab.Drop
	}
	r.frames = append(r.frames, bytes.Clone(b))
	return lab.Pass
}

// of returns the frames from a port: the SYN, and what carried data.
func (r *recorder) of(port uint16) (syn []byte, data [][]byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, b := range r.frames {
		x, ok := frame.Parse(b)
		switch {
		case !ok || x.Src(b).Port() != port:
		case x.Flags(b)&frame.SYN != 0:
			syn = b
		case x.Data < x.End:
			data = append(data, b)
		}
	}
	return syn, data
}

// Someone on the path replays the SYN of a resumed connection, and then what
// followed it. The answer does not resume: the secret has been used (RFC 8548
// section 3.5). Nothing of it reaches the application, and the next honest
// connection resumes.
func TestReplayedResumption(t *testing.T) {
	rec := &recorder{mine: map[uint16]bool{}}
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{Hook: rec.hook})
	a, z := b.both()
	ln, err := b.path.B.NS.Listen("tcp", net.JoinHostPort(b.path.B.Addr4().String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	accepted := make(chan netip.AddrPort, 100)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			accepted <- c.RemoteAddr().(*net.TCPAddr).AddrPort()
			go func() {
				_, _ = io.Copy(c, c)
				c.Close()
			}()
		}
	}()
	honest := func() netip.AddrPort {
		m := b.meet(a, z, ln)
		b.idle(a, z)
		return netip.MustParseAddrPort(m.opener.Local)
	}
	honest()
	from := honest()
	<-accepted
	<-accepted
	syn, data := rec.of(from.Port())
	if syn == nil || len(data) == 0 {
		t.Fatal("the resumed connection was not recorded")
	}
	x, _ := frame.Parse(syn)
	for i, c := range []struct {
		name string
		port uint16
		isn  uint32
	}{
		{"as it was", from.Port(), x.Seq(syn)},
		{"other ISN", from.Port(), x.Seq(syn) + 1<<20},
		{"other port", 33333, x.Seq(syn)},
		{"other port and ISN", 33334, x.Seq(syn) + 1<<30},
	} {
		rec.mu.Lock()
		rec.mine[c.port] = true
		rec.mu.Unlock()
		_, before := b.wire.seen()
		if err := b.fwd.Inject(lab.AtoB, replayed(syn, c.port, c.isn, 0)); err != nil {
			t.Fatal(err)
		}
		var answer offer
		b.eventually(c.name+": the SYN is answered with ENO", func() (string, bool) {
			for _, o := range b.wire.since(before) {
				y, _ := frame.Parse(o.frame)
				if o.synack && y.Dst(o.frame).Port() == c.port {
					answer = o
					return "", true
				}
			}
			return "", false
		})
		if data, v := answer.resumption(); v {
			t.Errorf("%s: the answer resumes: % x", c.name, data)
		}
		y, _ := frame.Parse(answer.frame)
		ack := y.Seq(answer.frame) + 1
		third := frame.Segment{
			SrcMAC: b.path.A.MAC, DstMAC: b.path.B.MAC, Src: netip.AddrPortFrom(from.Addr(), c.port), Dst: y.Src(answer.frame),
			Seq: c.isn + 1, Ack: ack, Flags: frame.ACK, Window: 65535, Options: []byte{frame.OptENO, 2},
		}
		if err := b.fwd.Inject(lab.AtoB, third.Append(nil)); err != nil {
			t.Fatal(err)
		}
		for _, d := range data {
			w, _ := frame.Parse(d)
			if err := b.fwd.Inject(lab.AtoB, replayed(d, c.port, w.Seq(d)-x.Seq(syn)+c.isn, ack)); err != nil {
				t.Fatal(err)
			}
		}
		b.eventually(c.name+": the listener ends the connection", func() (string, bool) {
			n := b.stats(z).Reasons[slowpath.ReasonBadMagic]
			return "", n == uint64(i+1)
		})
	}
	if st := b.stats(z).Counters; st["slowpath_resumed"] != 1 || st["slowpath_resume_unknown"] != 4 {
		t.Errorf("resumed %d connections and did not know %d proposals, want 1 and 4", st["slowpath_resumed"], st["slowpath_resume_unknown"])
	}
	m := b.meet(a, z, ln)
	if !m.resumed() {
		t.Errorf("the honest connection after the replays: %+v", m)
	}
	if got := <-accepted; got.String() != m.opener.Local {
		t.Errorf("the application accepted a connection from %v", got)
	}
}

// replayed is a recorded segment from another port, at another sequence number;
// ack 0 leaves the acknowledgment as it is. Options remain.
func replayed(b []byte, port uint16, seq, ack uint32) []byte {
	x, _ := frame.Parse(b)
	if ack == 0 {
		ack = x.Ack(b)
	}
	s := frame.Segment{
		DstMAC: b[0:6], SrcMAC: b[6:12], Src: netip.AddrPortFrom(x.Src(b).Addr(), port), Dst: x.Dst(b),
		Seq: seq, Ack: ack, Flags: x.Flags(b), Window: x.Window(b), Options: x.Options(b), Payload: x.Payload(b),
	}
	return s.Append(nil)
}
