package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/peer"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// oddBed is a host with a daemon, and the tests' own endpoint on its cable.
type oddBed struct {
	t    *testing.T
	ctx  context.Context
	host *lab.Iface
	peer *peer.Host
	d    *daemon.Daemon
}

func newOddBed(t *testing.T, flags ...string) *oddBed {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(cancel)
	l := lab.Start(t)
	p, err := l.Pair(lab.Options{B: lab.EndOptions{NoAddress: true}})
	if err != nil {
		t.Fatal(err)
	}
	return meetOdd(ctx, t, p.A, p.B, flags...)
}

// meetOdd starts a daemon on the host a and opens the peer at b.
func meetOdd(ctx context.Context, t *testing.T, a, b *lab.Iface, flags ...string) *oddBed {
	t.Helper()
	h, err := peer.Open(b)
	if err != nil {
		t.Fatal(err)
	}
	d, err := daemon.Start(ctx, program, a, nil, flags...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("daemon:\n%s", d.Logs())
		}
	})
	return &oddBed{t, ctx, a, h, d}
}

// pair opens one connection between an application on the host and the peer.
func (b *oddBed) pair(active bool, v6 bool, cfg peer.Config) (net.Conn, *peer.Conn, error) {
	c, pc, err := b.open(active, v6, cfg)
	if c != nil {
		stop := context.AfterFunc(b.ctx, func() { c.Close() })
		b.t.Cleanup(func() { stop() })
	}
	return c, pc, err
}

func (b *oddBed) open(active bool, v6 bool, cfg peer.Config) (net.Conn, *peer.Conn, error) {
	ours, theirs := b.host.Addr4(), b.peer.Addr4()
	if v6 {
		ours, theirs = b.host.Addr6(), b.peer.Addr6()
	}
	ctx, cancel := context.WithTimeout(b.ctx, 20*time.Second)
	defer cancel()
	if active { // the peer opens
		ln, err := b.host.NS.Listen("tcp", net.JoinHostPort(ours.String(), "0"))
		if err != nil {
			return nil, nil, err
		}
		defer ln.Close()
		stop := context.AfterFunc(ctx, func() { ln.Close() })
		defer stop()
		type res struct {
			c   net.Conn
			err error
		}
		got := make(chan res, 1)
		go func() { c, err := ln.Accept(); got <- res{c, err} }()
		pc, err := b.peer.Dial(ctx, netip.AddrPortFrom(ours, uint16(ln.Addr().(*net.TCPAddr).Port)), cfg)
		if err != nil {
			ln.Close()
			if r := <-got; r.c != nil {
				r.c.Close()
			}
			return nil, pc, err
		}
		r := <-got
		return r.c, pc, r.err
	}
	const port = 7000
	ln, err := b.peer.Listen(port, cfg)
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	type res struct {
		c   *peer.Conn
		err error
	}
	got := make(chan res, 1)
	go func() { c, err := ln.AcceptReady(ctx); got <- res{c, err} }()
	c, err := b.host.NS.Dial(ctx, "tcp", net.JoinHostPort(theirs.String(), fmt.Sprint(port)))
	r := <-got
	if err == nil {
		err = r.err
	}
	if err != nil && c != nil {
		c.Close()
	}
	return c, r.c, err
}

// Odd but legal peers are served, byte-exact in both directions.
func TestOddPeers(t *testing.T) {
	sizes := func(n ...int) []int { return n }
	cases := []struct {
		name  string
		cfg   peer.Config
		bytes int
	}{
		{"frames of 1 byte", peer.Config{FrameSize: 1}, 3000},
		{"frames of 1 byte, segments of 1 byte", peer.Config{FrameSize: 1, SegmentSize: 1}, 200},
		{"frames of 65000 bytes", peer.Config{FrameSize: 65000}, 400000},
		{"largest frames", peer.Config{FrameSize: peer.MaxData}, 400000},
		{"largest frames, flight of 10", peer.Config{FrameSize: peer.MaxData, Flight: 14600}, 300000},
		{"misaligned", peer.Config{FrameSize: 1000, SegmentSize: 777}, 300000},
		{"several frames per segment", peer.Config{FrameSize: 100, SegmentSize: 1400}, 100000},
		{"random frames in random segments", peer.Config{FrameSize: 8000, FrameRandom: true, SegmentSize: 1400, SegmentRandom: true}, 300000},
		{"Init in pieces of 1 byte", peer.Config{InitSplit: sizes(1)}, 20000},
		{"Init with trailing bytes, split", peer.Config{InitSplit: sizes(50, 7), Trailing: 300}, 20000},
		{"Init in the third ACK", peer.Config{Piggyback: true}, 20000},
		{"no window scale, window of 3000", peer.Config{NoScale: true, Window: 3000}, 100000},
		{"timestamps", peer.Config{Timestamps: true}, 100000},
		{"MSS of 536", peer.Config{MSS: 536}, 100000},
		{"random boundaries on resends, loss", peer.Config{Resegment: true, OnSend: everyNth(37), FrameSize: 3000}, 300000},
		{"P-256", peer.Config{TEPs: []crypto.TEP{crypto.TEPP256}}, 20000},
		{"P-521", peer.Config{TEPs: []crypto.TEP{crypto.TEPP521}}, 20000},
		{"X448", peer.Config{TEPs: []crypto.TEP{crypto.TEPX448}}, 20000},
		{"ChaCha20-Poly1305", peer.Config{AEADs: []crypto.AEAD{crypto.ChaCha20Poly1305}}, 100000},
		{"AES-256-GCM", peer.Config{AEADs: []crypto.AEAD{crypto.AES256GCM}}, 100000},
	}
	for _, active := range []bool{true, false} {
		for _, v6 := range []bool{false, true} {
			name := map[bool]string{true: "active", false: "passive"}[active] + "/" + map[bool]string{true: "IPv6", false: "IPv4"}[v6]
			t.Run(name, func(t *testing.T) {
				b := newOddBed(t, "--no-resume", "--teps", "x25519,x448,p256,p521")
				for _, c := range cases {
					t.Run(c.name, func(t *testing.T) {
						app, pc, err := b.pair(active, v6, c.cfg)
						if err != nil {
							t.Fatal(err)
						}
						defer app.Close()
						up, down := stream(1, c.bytes), stream(2, c.bytes)
						fl, err := b.d.Flow(b.ctx)
						if err != nil {
							t.Fatal(err)
						}
						done := make(chan error, 1)
						go func() {
							_, err := app.Write(up)
							if err == nil {
								err = app.(*net.TCPConn).CloseWrite()
							}
							done <- err
						}()
						_, err = pc.Write(down)
						if err == nil {
							err = pc.CloseWrite()
						}
						if err != nil {
							t.Fatal(err)
						}
						defer context.AfterFunc(b.ctx, func() { app.Close() })()
						got, err := io.ReadAll(app)
						if err := errors.Join(err, <-done); err != nil || !bytes.Equal(got, down) {
							t.Fatalf("application got %d of %d bytes: %v", len(got), len(down), err)
						}
						if err := pc.WaitEnd(b.ctx); err != nil {
							t.Fatal(err)
						}
						r := pc.Report()
						if !bytes.Equal(r.Received, up) || len(r.Anomalies) != 0 {
							t.Errorf("the peer got %d of %d bytes, anomalies %v", len(r.Received), len(up), r.Anomalies)
						}
						if want := fmt.Sprintf("%x", r.SessionID); fl.SessionID != want {
							t.Errorf("session ID %s, the peer has %s", fl.SessionID, want)
						}
					})
				}
			})
		}
	}
}

// everyNth loses every n-th segment with data.
func everyNth(n int) func(*peer.Out) bool {
	k := 0
	return func(o *peer.Out) bool {
		if len(o.Payload) == 0 {
			return true
		}
		k++
		return k%n != 0
	}
}

// A peer that breaks the rules after the keys are agreed: both sides are
// aborted, nothing that is not authentic is delivered, the reason is kept.
func TestHostileFrames(t *testing.T) {
	good := stream(3, 1000)
	flip := func(at int) func([]byte) []byte {
		return func(b []byte) []byte { b[(at+len(b))%len(b)] ^= 1; return b }
	}
	evil := stream(4, 1000)
	cases := []struct {
		name   string
		do     func(c *peer.Conn) error
		reason string
	}{
		{"forged data", func(c *peer.Conn) error {
			_, err := c.WriteFrame(peer.Frame{Data: evil, Mutate: flip(100)})
			return err
		}, fastpath.ReasonAuth},
		{"forged tag", func(c *peer.Conn) error { _, err := c.WriteFrame(peer.Frame{Data: evil, Mutate: flip(-1)}); return err }, fastpath.ReasonAuth},
		{"forged rekey bit", func(c *peer.Conn) error { _, err := c.WriteFrame(peer.Frame{Data: evil, Mutate: flip(0)}); return err }, fastpath.ReasonAuth},
		{"truncated frame, FIN", func(c *peer.Conn) error {
			_, err := c.WriteFrame(peer.Frame{Data: evil, Mutate: func(b []byte) []byte { return b[:len(b)-5] }})
			return errors.Join(err, c.FIN())
		}, fastpath.ReasonTruncated},
		{"FIN without FINp", func(c *peer.Conn) error { return c.FIN() }, fastpath.ReasonTruncated},
		{"replayed frame", func(c *peer.Conn) error {
			b, err := c.WriteFrame(peer.Frame{Data: good[:0]})
			return errors.Join(err, c.WriteRaw(b))
		}, fastpath.ReasonAuth},
		{"plaintext", func(c *peer.Conn) error { return c.WriteRaw(stream(4, 40000)) }, fastpath.ReasonAuth},
		{"clen below the tag", func(c *peer.Conn) error {
			return c.WriteRaw([]byte{0, 0, 15, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
		}, fastpath.ReasonFrameLength},
		{"frame after FINp", func(c *peer.Conn) error {
			_, err := c.WriteFrame(peer.Frame{FINp: true})
			_, err2 := c.WriteFrame(peer.Frame{Data: evil})
			return errors.Join(err, err2)
		}, fastpath.ReasonDataAfterFINp},
	}
	for _, active := range []bool{true, false} {
		t.Run(map[bool]string{true: "active", false: "passive"}[active], func(t *testing.T) {
			b := newOddBed(t)
			for _, c := range cases {
				t.Run(c.name, func(t *testing.T) {
					before, err := b.d.Stats(b.ctx)
					if err != nil {
						t.Fatal(err)
					}
					app, pc, err := b.pair(active, false, peer.Config{KeepOpen: true})
					if err != nil {
						t.Fatal(err)
					}
					defer app.Close()
					if _, err := pc.Write(good); err != nil {
						t.Fatal(err)
					}
					if err := pc.Flush(b.ctx); err != nil {
						t.Fatal(err)
					}
					got := make([]byte, len(good))
					if _, err := io.ReadFull(app, got); err != nil || !bytes.Equal(got, good) {
						t.Fatalf("good data: %v", err)
					}
					if err := c.do(pc); err != nil {
						t.Fatal(err)
					}
					rest, err := io.ReadAll(app)
					// After FINp the end of file is authentic, and may be read
					// before what follows breaks the connection.
					if len(rest) != 0 || err == nil && c.reason != fastpath.ReasonDataAfterFINp {
						t.Errorf("the application read %d more bytes, then %v; want a reset", len(rest), err)
					}
					if err := pc.WaitReset(b.ctx); err != nil {
						t.Error(err)
					}
					b.reason(t, before, c.reason)
				})
			}
			if _, err := b.d.Status(b.ctx); err != nil {
				t.Errorf("the daemon is not well: %v", err)
			}
		})
	}
}

func (b *oddBed) reason(t *testing.T, before fastpath.Stats, want string) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		after, err := b.d.Stats(b.ctx)
		if err != nil {
			t.Fatal(err)
		}
		var fresh []string
		for r, n := range after.Reasons {
			if n > before.Reasons[r] {
				fresh = append(fresh, r)
			}
		}
		if len(fresh) > 0 && (want == "" || slices.Contains(fresh, want)) {
			return
		}
		select {
		case <-tick.C:
		case <-b.ctx.Done():
			t.Fatalf("new reasons %v, want %s", fresh, want)
		}
	}
}

// A peer that breaks the rules of the key exchange: no connection, no plaintext.
func TestHostileInit(t *testing.T) {
	cases := []struct {
		name   string
		active bool
		cfg    peer.Config
		reason string
	}{
		{"wrong magic as A", true, peer.Config{Mutate: func(b []byte) []byte { b[0] ^= 1; return b }}, slowpath.ReasonBadMagic},
		{"wrong magic as B", false, peer.Config{Mutate: func(b []byte) []byte { b[0] ^= 1; return b }}, slowpath.ReasonBadMagic},
		{"cipher that was not offered", false, peer.Config{Cipher: 0x77}, slowpath.ReasonCipherUnoffered},
		{"no cipher in common", true, peer.Config{AEADs: []crypto.AEAD{0x77}}, slowpath.ReasonNoCommonCipher},
		{"message_len too large", true, peer.Config{Mutate: func(b []byte) []byte { b[4] = 0xff; return b }}, slowpath.ReasonBadInit},
		{"message_len too small", false, peer.Config{Mutate: func(b []byte) []byte { b[6], b[7] = 0, 9; return b }}, slowpath.ReasonBadInit},
		{"key of low order as A", true, peer.Config{Mutate: zeroKey}, slowpath.ReasonBadKey},
		{"key of low order as B", false, peer.Config{Mutate: zeroKey}, slowpath.ReasonBadKey},
	}
	b := newOddBed(t)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			before, err := b.d.Stats(b.ctx)
			if err != nil {
				t.Fatal(err)
			}
			c.cfg.KeepOpen = true
			app, pc, err := b.pair(c.active, false, c.cfg)
			if err == nil {
				app.Close()
				t.Error("the connection was opened")
			}
			if pc != nil {
				if err := pc.WaitReset(b.ctx); err != nil {
					t.Error(err)
				}
			}
			b.reason(t, before, c.reason)
		})
	}
}

// zeroKey makes the X25519 public key at the end of an Init message all zero.
func zeroKey(b []byte) []byte {
	clear(b[len(b)-32:])
	return b
}

// A peer whose 40 option bytes are full cannot carry ENO: plain TCP, intact, in
// either direction of opening.
func TestFullOptions(t *testing.T) {
	b := newOddBed(t)
	for _, active := range []bool{true, false} {
		t.Run(map[bool]string{true: "SYN", false: "SYN-ACK"}[active], func(t *testing.T) {
			before, err := b.d.Stats(b.ctx)
			if err != nil {
				t.Fatal(err)
			}
			// MSS and window scale take 7 bytes and padding.
			full := append([]byte{76, 32}, make([]byte, 30)...)
			app, pc, err := b.pair(active, false, peer.Config{Options: full, NoENO: true})
			if err != nil {
				t.Fatal(err)
			}
			defer app.Close()
			msg := stream(5, 50000)
			go func() {
				if _, err := app.Write(msg); err == nil {
					_ = app.(*net.TCPConn).CloseWrite()
				}
			}()
			if err := pc.WaitEnd(b.ctx); err != nil {
				t.Fatal(err)
			}
			if r := pc.Report(); r.Encrypted || !bytes.Equal(r.Received, msg) {
				t.Errorf("encrypted %v, the peer got %d of %d bytes", r.Encrypted, len(r.Received), len(msg))
			}
			if !active {
				b.reason(t, before, slowpath.ReasonPeerNoENO)
			}
			after, err := b.d.Stats(b.ctx)
			if err != nil {
				t.Fatal(err)
			}
			if n := after.Counters["to_slow_path"] - before.Counters["to_slow_path"]; n > 5 {
				t.Errorf("%d packets of a plain connection passed through the daemon", n)
			}
		})
	}
}

// A SYN of this host whose 40 option bytes are full leaves without ENO: plain
// TCP, intact, and the reason is kept. The kernel makes no such SYN, so the
// host's stack is the tests' own endpoint, behind the daemon's interface.
func TestNoOptionRoom(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	l := lab.Start(t)
	p, err := l.Pair(lab.Options{A: lab.EndOptions{NoAddress: true}})
	if err != nil {
		t.Fatal(err)
	}
	d, err := daemon.Start(ctx, program, p.A, nil)
	if err != nil {
		t.Fatal(err)
	}
	h, err := peer.Open(p.A)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := p.B.NS.Listen("tcp", net.JoinHostPort(p.B.Addr4().String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	msg := stream(6, 50000)
	served := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			served <- err
			return
		}
		defer c.Close()
		got, err := io.ReadAll(c)
		if err == nil && !bytes.Equal(got, msg) {
			err = fmt.Errorf("%d of %d bytes arrived", len(got), len(msg))
		}
		served <- err
	}()
	// MSS and window scale take 7 bytes; one is left for padding.
	full := append([]byte{76, 32}, make([]byte, 30)...)
	c, err := h.Dial(ctx, netip.AddrPortFrom(p.B.Addr4(), uint16(ln.Addr().(*net.TCPAddr).Port)), peer.Config{NoENO: true, Options: full})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(msg); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err != nil {
		t.Fatal(err)
	}
	st, err := d.Stats(ctx)
	if err != nil {
		t.Fatal(err)
	}
	fs, err := d.Flows(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if st.Reasons[slowpath.ReasonNoRoom] != 1 || len(fs) != 1 || fs[0].State != slowpath.StatePlain || fs[0].Reason != slowpath.ReasonNoRoom {
		t.Errorf("reasons %v, flows %+v, want one plain with %s", st.Reasons, fs, slowpath.ReasonNoRoom)
	}
	if n := st.Counters["to_slow_path"]; n > 5 {
		t.Errorf("%d packets of a plain connection passed through the daemon", n)
	}
}

// Segments that an off-path attacker could send change nothing.
func TestBlindSegments(t *testing.T) {
	b := newOddBed(t)
	app, pc, err := b.pair(true, false, peer.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	for _, s := range []peer.Segment{
		{Offset: 5000, Flags: frame.RST | frame.ACK},
		{Offset: -5000, Flags: frame.RST | frame.ACK},
		{Offset: 100, Flags: frame.SYN},
		{Offset: 100, Flags: frame.SYN | frame.ACK},
		{Offset: 4000, Flags: frame.FIN | frame.ACK},
		{Offset: 1 << 30, Flags: frame.ACK, Payload: stream(6, 100)},
		{Ack: 1 << 20, Flags: frame.ACK},
		{Ack: -1 << 20, Flags: frame.ACK},
		{Flags: frame.ACK, Options: []byte{5, 10, 0, 0, 0, 1, 255, 255, 255, 255, 1, 1}},
		{Flags: 0, Payload: stream(6, 100)},
	} {
		pc.Send(s)
	}
	msg := stream(7, 100000)
	go func() {
		if _, err := pc.Write(msg); err == nil {
			_ = pc.CloseWrite()
		}
	}()
	defer context.AfterFunc(b.ctx, func() { app.Close() })()
	got, err := io.ReadAll(app)
	if err != nil || !bytes.Equal(got, msg) {
		t.Errorf("got %d of %d bytes: %v", len(got), len(msg), err)
	}
}
