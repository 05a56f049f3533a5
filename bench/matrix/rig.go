package matrix

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

const (
	vlanID      = 7
	smallBuffer = 16 << 10
	slowPiece   = 4 << 10
	slowPause   = time.Millisecond
)

// Rig is a pair of hosts with a wire between them, for cells of one MTU.
type Rig struct {
	path, vlan *lab.Path
	fwd        *lab.Forwarder
	a, b       *daemon.Daemon // nil: plain TCP
	plain      atomic.Int64   // segments with readable data that crossed the wire
}

// NewRig builds a rig in a lab of its own, which the caller closes. binary is the
// program that runs on both hosts; empty for hosts without.
func NewRig(ctx context.Context, l *lab.Lab, mtu int, binary string) (*Rig, error) {
	path, err := l.Middle(lab.Options{MTU: mtu, Neighbours: true})
	if err != nil {
		return nil, err
	}
	r := &Rig{path: path, vlan: &lab.Path{}}
	for i, host := range []*lab.Iface{path.A, path.B} {
		addrs := []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 250, vlanID, byte(i + 1)}), 24)}
		if mtu >= 1280 {
			addrs = append(addrs, netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, vlanID, 15: byte(i + 1)}), 64))
		}
		v, err := host.AddVLAN(vlanID, addrs...)
		if err != nil {
			return nil, err
		}
		*[]**lab.Iface{&r.vlan.A, &r.vlan.B}[i] = v
		// What a connection learnt of the path is not for the next.
		if err := host.NS.Sysctl("net/ipv4/tcp_no_metrics_save", "1"); err != nil {
			return nil, err
		}
	}
	r.fwd, err = path.Forward(lab.ForwarderOptions{Seed: 1, Tap: func(_ lab.Link, _ lab.Dir, b []byte) {
		if bytes.Contains(b, canary[:24]) {
			r.plain.Add(1)
		}
	}})
	if err != nil || binary == "" {
		return r, err
	}
	if r.a, err = daemon.Start(ctx, binary, path.A, nil); err != nil {
		return nil, err
	}
	r.b, err = daemon.Start(ctx, binary, path.B, nil)
	return r, err
}

// sysctls that cells change, with the value that most have.
var sysctls = map[string]string{
	"net/ipv4/tcp_sack": "1", "net/ipv4/tcp_timestamps": "1", "net/ipv4/tcp_window_scaling": "1",
	"net/ipv4/tcp_ecn": "2", "net/ipv4/tcp_ecn_fallback": "1",
}

func (r *Rig) configure(c Cell) error {
	for name, value := range sysctls {
		switch {
		case name == "net/ipv4/tcp_sack" && c.Host == NoSACK, name == "net/ipv4/tcp_timestamps" && c.Host == NoTimestamps,
			name == "net/ipv4/tcp_window_scaling" && c.Host == NoWindowScaling:
			value = "0"
		case name == "net/ipv4/tcp_ecn" && c.Host == ECN:
			value = "1"
		}
		for _, host := range []*lab.Iface{r.path.A, r.path.B} {
			if err := host.NS.Sysctl(name, value); err != nil {
				return err
			}
		}
	}
	return nil
}

// Transfer is how one connection went.
type Transfer struct {
	Bytes int
	Took  time.Duration // of the data from A to B, connecting included
	// Sender are the increments of the sending host's TCP counters.
	Sender map[string]int64
}

// Mbps returns the throughput in 10^6 bits of data per second.
func (t Transfer) Mbps() float64 { return float64(t.Bytes) * 8 / t.Took.Seconds() / 1e6 }

// Run opens a connection under the cell's conditions, sends n bytes from A to B
// and then a quarter of that back, and fails unless all arrive exactly, with
// both ends of file. On a rig with daemons it fails unless the connection was
// encrypted and nothing readable crossed the wire. Where the path loses packets it
// tries again, a few times, if both offers of encryption got lost: the third SYN is
// without (T19), at 5 % in one connection of a hundred.
func (r *Rig) Run(ctx context.Context, c Cell, im lab.Impair, n int) (t Transfer, err error) {
	for range 4 {
		if t, err = r.run(ctx, c, im, n); im.Drop == 0 || !errors.Is(err, errOffersLost) {
			break
		}
	}
	return t, err
}

var errOffersLost = errors.New("the connection is plain, as only the SYN without an offer was answered")

func (r *Rig) run(ctx context.Context, c Cell, im lab.Impair, n int) (Transfer, error) {
	if err := r.configure(c); err != nil {
		return Transfer{}, err
	}
	r.fwd.Set(lab.AtoB, im)
	r.fwd.Set(lab.BtoA, im)
	before, err := r.path.A.NS.TCPCounters()
	if err != nil {
		return Transfer{}, err
	}
	sealed, unanswered, err := r.outcomes(ctx)
	if err != nil {
		return Transfer{}, err
	}
	plain := r.plain.Load()
	t := Transfer{Bytes: n, Sender: map[string]int64{}}
	if t.Took, err = r.transfer(ctx, c, n); err != nil {
		return t, err
	}
	after, err := r.path.A.NS.TCPCounters()
	if err != nil {
		return t, err
	}
	for k, v := range after {
		if d := v - before[k]; d != 0 {
			t.Sender[k] = d
		}
	}
	if r.a == nil {
		return t, nil
	}
	switch now, without, err := r.outcomes(ctx); {
	case err != nil:
		return t, err
	case now == sealed && without == unanswered+1:
		return t, errOffersLost
	case now != sealed+1:
		return t, fmt.Errorf("%d connections were encrypted, want 1", now-sealed)
	}
	if p := r.plain.Load() - plain; p != 0 {
		return t, fmt.Errorf("%d segments with readable data on the wire", p)
	}
	return t, nil
}

// outcomes returns how many connections A has encrypted, and how many are plain
// because its offers were not answered.
func (r *Rig) outcomes(ctx context.Context) (sealed, unanswered uint64, err error) {
	if r.a == nil {
		return 0, 0, nil
	}
	st, err := r.a.Stats(ctx)
	return st.Counters["slowpath_encrypted"], st.Reasons[slowpath.ReasonSYNRetries], err
}

// control sets the socket options of a cell.
func (c Cell) control(_, _ string, rc syscall.RawConn) error {
	var err error
	cerr := rc.Control(func(fd uintptr) {
		err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, c.CC)
		if c.Host == SmallBuffers || c.Host == SlowReader {
			// The kernel doubles it.
			err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, smallBuffer/2))
		}
	})
	return errors.Join(cerr, err)
}

// connect opens a connection from A to B.
func (r *Rig) connect(ctx context.Context, c Cell) (client, server net.Conn, err error) {
	p := r.path
	if c.Net.vlan() {
		p = r.vlan
	}
	from, to := p.A.Addr4(), p.B.Addr4()
	if c.Net.v6() {
		from, to = p.A.Addr6(), p.B.Addr6()
	}
	var ln net.Listener
	err = r.path.B.NS.Do(func() (err error) {
		lc := net.ListenConfig{Control: c.control}
		lc.SetMultipathTCP(false)
		ln, err = lc.Listen(ctx, "tcp", net.JoinHostPort(to.String(), "0"))
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		defer close(accepted)
		if c, err := ln.Accept(); err == nil {
			accepted <- c
		}
	}()
	err = r.path.A.NS.Do(func() (err error) {
		d := net.Dialer{Control: c.control, LocalAddr: &net.TCPAddr{IP: from.AsSlice()}}
		d.SetMultipathTCP(false)
		client, err = d.DialContext(ctx, "tcp", ln.Addr().String())
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("connect: %w", err)
	}
	select {
	case server = <-accepted:
	case <-ctx.Done():
	}
	if server == nil {
		client.Close()
		return nil, nil, fmt.Errorf("accept: %w", ctx.Err())
	}
	return client, server, nil
}

func (r *Rig) transfer(ctx context.Context, c Cell, n int) (time.Duration, error) {
	up, down := stream(1, n), stream(2, n/4)
	begin := time.Now()
	client, server, err := r.connect(ctx, c)
	if err != nil {
		return 0, err
	}
	defer client.Close()
	defer server.Close()
	defer context.AfterFunc(ctx, func() { client.Close(); server.Close() })()
	sent := make(chan error, 1)
	go func() { sent <- send(client, up) }()
	if err := receive(server, up, c.Host == SlowReader); err != nil {
		return 0, fmt.Errorf("from A to B: %w", err)
	}
	took := time.Since(begin)
	if err := <-sent; err != nil {
		return 0, fmt.Errorf("from A to B: %w", err)
	}
	go func() { sent <- send(server, down) }()
	if err := receive(client, down, c.Host == SlowReader); err != nil {
		return 0, fmt.Errorf("from B to A: %w", err)
	}
	if err := <-sent; err != nil {
		return 0, fmt.Errorf("from B to A: %w", err)
	}
	return took, nil
}

func send(c net.Conn, b []byte) error {
	if _, err := c.Write(b); err != nil {
		return err
	}
	return c.(*net.TCPConn).CloseWrite()
}

// receive reads to the end of file; slowly in small pieces with pauses.
func receive(c net.Conn, want []byte, slowly bool) error {
	got := make([]byte, 0, len(want)+1)
	for {
		if len(got) == cap(got) {
			return errors.New("more data than was sent")
		}
		room := got[len(got):cap(got)]
		if slowly {
			room = room[:min(len(room), slowPiece)]
			time.Sleep(slowPause)
		}
		n, err := c.Read(room)
		got = got[:len(got)+n]
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("%w after %d of %d bytes", err, len(got), len(want))
		}
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("got %d bytes (SHA-256 %x), want %d (%x)", len(got), sha256.Sum256(got), len(want), sha256.Sum256(want))
	}
	return nil
}

// canary is what every stream is made of; it must not be seen on the wire of an
// encrypted connection.
var canary = []byte("plaintext canary of the matrix 0123456789 0123456789\n")

// stream returns test data number seed: the canary with numbers in between.
func stream(seed uint64, n int) []byte {
	out := make([]byte, 0, n+128)
	for i := uint64(0); len(out) < n; i++ {
		out = append(append(out, canary...), binary.BigEndian.AppendUint64(nil, seed<<40+i)...)
	}
	return out[:n]
}
