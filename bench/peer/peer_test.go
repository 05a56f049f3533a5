package peer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
)

const port = 80

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func pattern(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	return b
}

// hosts returns two peers on one cable.
func hosts(t *testing.T) (a, b *Host) {
	t.Helper()
	p, err := lab.Start(t).Pair(lab.Options{A: lab.EndOptions{NoAddress: true}, B: lab.EndOptions{NoAddress: true}})
	if err != nil {
		t.Fatal(err)
	}
	if a, err = Open(p.A); err == nil {
		b, err = Open(p.B)
	}
	if err != nil {
		t.Fatal(err)
	}
	return a, b
}

// connect opens a connection between two peers, both ends of which are ready
// unless an error says otherwise.
func connect(t *testing.T, a, b *Host, v6 bool, ca, cb Config) (ac, bc *Conn, aerr, berr error) {
	t.Helper()
	ctx := testContext(t)
	ln, err := b.Listen(port, cb)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	to := netip.AddrPortFrom(b.Addr4(), port)
	if v6 {
		to = netip.AddrPortFrom(b.Addr6(), port)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		bc, berr = ln.AcceptReady(ctx)
	}()
	ac, aerr = a.Dial(ctx, to, ca)
	<-done
	if ac == nil || bc == nil {
		t.Fatalf("no connection: %v, %v", aerr, berr)
	}
	return ac, bc, aerr, berr
}

func mustConnect(t *testing.T, a, b *Host, v6 bool, ca, cb Config) (ac, bc *Conn) {
	t.Helper()
	ac, bc, aerr, berr := connect(t, a, b, v6, ca, cb)
	if aerr != nil || berr != nil {
		t.Fatalf("a: %v, b: %v", aerr, berr)
	}
	return ac, bc
}

// exchange sends data both ways and ends the connection.
func exchange(t *testing.T, ac, bc *Conn, n int) (ra, rb Report) {
	t.Helper()
	ctx := testContext(t)
	data := pattern(n)
	for _, c := range []*Conn{ac, bc} {
		if _, err := c.Write(data); err != nil {
			t.Fatal(err)
		}
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []*Conn{ac, bc} {
		if err := c.WaitClosed(ctx); err != nil {
			t.Error(err)
		}
	}
	ra, rb = ac.Report(), bc.Report()
	for _, r := range []Report{ra, rb} {
		if !bytes.Equal(r.Received, data) || !r.FIN || r.FINp != r.Encrypted || r.Err != nil {
			t.Errorf("received %d of %d bytes, FIN %v, FINp %v, %v", len(r.Received), n, r.FIN, r.FINp, r.Err)
		}
		if len(r.Anomalies) > 0 {
			t.Errorf("anomalies %v", r.Anomalies)
		}
	}
	if ra.Encrypted != rb.Encrypted || ra.SessionID != rb.SessionID || ra.TEP != rb.TEP || ra.AEAD != rb.AEAD {
		t.Errorf("the sides disagree:\n%+v\n%+v", ra, rb)
	}
	return ra, rb
}

func TestPeers(t *testing.T) {
	lossy := func(seed uint64, p float64) func(*Out) bool {
		r := rand.New(rand.NewPCG(seed, 1))
		return func(*Out) bool { return r.Float64() >= p }
	}
	for _, c := range []struct {
		name   string
		a, b   Config
		n      int
		plain  bool
		verify func(ra, rb Report) error
	}{
		{name: "default", n: 200_000},
		{name: "no data", n: 0},
		{name: "x448 aes256", a: Config{TEPs: []crypto.TEP{crypto.TEPX448}}, b: Config{TEPs: crypto.AllTEPs, AEADs: []crypto.AEAD{crypto.AES256GCM}}, n: 5000},
		{name: "p256 chacha", a: Config{TEPs: []crypto.TEP{crypto.TEPP256, crypto.TEPP521}, AEADs: []crypto.AEAD{crypto.ChaCha20Poly1305}}, b: Config{TEPs: []crypto.TEP{crypto.TEPP256}}, n: 5000,
			verify: func(ra, rb Report) error {
				if ra.TEP != crypto.TEPP256 || ra.AEAD != crypto.ChaCha20Poly1305 {
					return fmt.Errorf("negotiated %v %v", ra.TEP, ra.AEAD)
				}
				return nil
			}},
		{name: "p521", a: Config{TEPs: []crypto.TEP{crypto.TEPP521}}, b: Config{TEPs: []crypto.TEP{crypto.TEPP521}}, n: 5000},
		{name: "large frames in small segments", a: Config{FrameSize: MaxData, SegmentSize: 333}, b: Config{FrameSize: 65000, SegmentSize: 1000, SegmentRandom: true}, n: 200_000,
			verify: func(ra, rb Report) error {
				if rb.MaxFrameIn != MaxData {
					return fmt.Errorf("largest frame %d", rb.MaxFrameIn)
				}
				return nil
			}},
		{name: "tiny frames in large segments", a: Config{FrameSize: 1}, b: Config{FrameSize: 50, FrameRandom: true}, n: 3000},
		{name: "one byte segments", a: Config{FrameSize: 20, SegmentSize: 1}, b: Config{SegmentSize: 1}, n: 500},
		{name: "aligned", a: Config{FrameSize: 700, Align: true}, b: Config{FrameSize: 5000, Align: true}, n: 50_000},
		{name: "init split and trailing", a: Config{InitSplit: []int{1, 3, 5}}, b: Config{InitSplit: []int{7}}, n: 1000},
		{name: "piggyback", a: Config{Piggyback: true}, n: 1000},
		{name: "timestamps, no scale", a: Config{Timestamps: true, NoScale: true}, b: Config{Timestamps: true}, n: 100_000},
		{name: "small window", a: Config{Window: 500}, b: Config{Window: 700, FrameSize: 2000}, n: 10_000},
		{name: "loss", a: Config{OnSend: lossy(1, 0.1), RTO: 20 * time.Millisecond}, b: Config{OnSend: lossy(2, 0.1), RTO: 20 * time.Millisecond}, n: 30_000},
		{name: "loss and other boundaries", a: Config{OnSend: lossy(3, 0.1), Resegment: true, FrameSize: 3000, RTO: 20 * time.Millisecond}, b: Config{OnSend: lossy(4, 0.1), Resegment: true, RTO: 20 * time.Millisecond}, n: 30_000},
		{name: "no ENO at b", b: Config{NoENO: true}, n: 10_000, plain: true},
		{name: "no ENO at a", a: Config{NoENO: true}, n: 10_000, plain: true},
		{name: "no TEP in common", a: Config{TEPs: []crypto.TEP{crypto.TEPX448}}, n: 10_000, plain: true},
		{name: "ENO missing in third ACK", a: Config{OmitACK: true}, n: 0, plain: true},
		{name: "ill-formed", a: Config{Option: []byte{frame.OptENO, 5, 0x23, 0x85, 0xa3}}, n: 100, plain: true},
		{name: "vacuous", a: Config{Option: []byte{frame.OptENO, 2}}, n: 100, plain: true},
		{name: "same b", a: Config{ActiveB: true}, n: 100, plain: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := hosts(t)
			for _, v6 := range []bool{false, true} {
				ac, bc := mustConnect(t, a, b, v6, c.a, c.b)
				if c.name == "ENO missing in third ACK" {
					if r := bc.Report(); r.Encrypted || !errors.Is(r.PlainReason, ErrNoENOInACK) || r.Anomalies["eno_missing_third_ack"] != 1 {
						t.Errorf("report %+v", r)
					}
					continue
				}
				ra, rb := exchange(t, ac, bc, c.n)
				if ra.Encrypted == c.plain {
					t.Errorf("encrypted %v: %v", ra.Encrypted, ra.PlainReason)
				}
				if c.verify != nil {
					if err := c.verify(ra, rb); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
}

func TestTrailingBytes(t *testing.T) {
	a, b := hosts(t)
	ac, bc := mustConnect(t, a, b, false, Config{Trailing: 100}, Config{Trailing: 1})
	ctx := testContext(t)
	if _, err := ac.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := bc.WaitReceived(ctx, 1); err != nil {
		t.Fatal(err)
	}
	for _, r := range []Report{ac.Report(), bc.Report()} {
		if r.Anomalies["init_trailing_bytes"] != 1 || !r.Encrypted {
			t.Errorf("report %+v", r)
		}
	}
}

func TestResumption(t *testing.T) {
	for _, nonces := range [][2]int{{0, 0}, {-1, 0}, {5, -1}} {
		a, b := hosts(t)
		ac, bc := mustConnect(t, a, b, false, Config{}, Config{})
		first, _ := exchange(t, ac, bc, 1000)
		for i := range 3 {
			ta, tb := ac.Ticket(), bc.Ticket()
			from, to := a, b
			if i == 1 {
				// The other side opens; the original roles stay.
				from, to, ta, tb = b, a, tb, ta
			}
			ac, bc = mustConnect(t, from, to, i == 2, Config{Tickets: []*Ticket{ta}, NonceLen: nonces[0]}, Config{Tickets: []*Ticket{tb}, NonceLen: nonces[1]})
			r, _ := exchange(t, ac, bc, 1000)
			if !r.Resumed || r.SessionID[0] != 0x80|byte(crypto.TEPX25519) || r.SessionID == first.SessionID {
				t.Errorf("resumption %d: %v %x", i, r.Resumed, r.SessionID)
			}
			if i == 1 {
				ac, bc = bc, ac
			}
		}
		// A ticket that only one side has leads to a fresh exchange.
		ac, bc = mustConnect(t, a, b, false, Config{Tickets: []*Ticket{ac.Ticket()}}, Config{})
		if r, _ := exchange(t, ac, bc, 10); r.Resumed || !r.Encrypted {
			t.Errorf("resumed without a ticket: %+v", r)
		}
	}
}

func TestRekeyAndUrgent(t *testing.T) {
	a, b := hosts(t)
	ac, bc := mustConnect(t, a, b, false, Config{}, Config{})
	ctx := testContext(t)
	for i := range 5 {
		if _, err := ac.WriteFrame(Frame{Data: []byte{byte(i)}, Rekey: true}); err != nil {
			t.Fatal(err)
		}
		if err := ac.WaitRekey(ctx, uint32(i+1)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := bc.WriteFrame(Frame{Data: []byte("urgent"), Urgent: true, UrgentN: 3}); err != nil {
		t.Fatal(err)
	}
	if err := ac.WaitReceived(ctx, 6); err != nil {
		t.Fatal(err)
	}
	ra, rb := ac.Report(), bc.Report()
	if ra.GenIn != 5 || ra.GenOut != 5 || rb.GenIn != 5 || rb.GenOut != 5 || ra.EmptyIn != 5 {
		t.Errorf("generations: a %+v, b %+v", ra, rb)
	}
	if len(ra.Urgent) != 1 || ra.Urgent[0] != 3 {
		t.Errorf("urgent %v", ra.Urgent)
	}
}

// TestAttacks lets one peer misbehave and looks at what the other makes of it.
func TestAttacks(t *testing.T) {
	put := func(at int, with ...byte) func([]byte) []byte {
		return func(m []byte) []byte {
			m = bytes.Clone(m)
			copy(m[at:], with)
			return m
		}
	}
	good := []byte("good")
	frameOf := func(f Frame) func(*Conn) error {
		return func(c *Conn) error {
			if _, err := c.Write(good); err != nil {
				return err
			}
			_, err := c.WriteFrame(f)
			return err
		}
	}
	for _, c := range []struct {
		name string
		evil Config
		do   func(c *Conn) error
		want error
	}{
		{"bad magic", Config{Mutate: put(0, 1)}, nil, crypto.ErrBadMagic},
		{"oversized message_len", Config{Mutate: put(4, 0x7f, 0xff, 0xff, 0xff)}, nil, crypto.ErrInitLen},
		{"short message_len", Config{Mutate: put(4, 0, 0, 0, 9)}, nil, crypto.ErrInitLen},
		{"invalid public key", Config{TEPs: []crypto.TEP{crypto.TEPP256}, Mutate: func(m []byte) []byte {
			m = bytes.Clone(m)
			m[len(m)-33] = 4
			return m
		}}, nil, crypto.ErrBadKey},
		{"zero public key", Config{Mutate: func(m []byte) []byte {
			m = bytes.Clone(m)
			clear(m[len(m)-32:])
			return m
		}}, nil, crypto.ErrZeroShared},
		{"no known cipher", Config{AEADs: []crypto.AEAD{0x7777}}, nil, crypto.ErrNoCipher},
		{"corrupt frame", Config{}, frameOf(Frame{Data: []byte("x"), Mutate: put(5, 0)}), ErrAuth},
		{"corrupt control", Config{}, frameOf(Frame{Data: []byte("x"), Mutate: put(0, 2)}), ErrAuth},
		{"forged rekey", Config{}, frameOf(Frame{Data: []byte("x"), Mutate: put(0, 1)}), ErrAuth},
		{"truncated frame and FIN", Config{}, func(c *Conn) error {
			if err := frameOf(Frame{Data: []byte("x"), Mutate: func(b []byte) []byte { return b[:len(b)-1] }})(c); err != nil {
				return err
			}
			return c.FIN()
		}, ErrFINWithoutFINp},
		{"FIN without FINp", Config{}, func(c *Conn) error {
			if _, err := c.Write(good); err != nil {
				return err
			}
			return c.FIN()
		}, ErrFINWithoutFINp},
		{"replay", Config{}, func(c *Conn) error {
			b, err := c.WriteFrame(Frame{Data: good})
			if err != nil {
				return err
			}
			return c.WriteRaw(b)
		}, ErrAuth},
		{"bytes after FINp", Config{}, func(c *Conn) error {
			if err := frameOf(Frame{FINp: true})(c); err != nil {
				return err
			}
			return c.WriteRaw([]byte{0})
		}, ErrAfterFINp},
		{"frame after FINp", Config{}, func(c *Conn) error {
			if err := frameOf(Frame{FINp: true})(c); err != nil {
				return err
			}
			_, err := c.WriteFrame(Frame{Data: []byte("more")})
			return err
		}, ErrAfterFINp},
		{"clen below the tag", Config{}, func(c *Conn) error {
			if _, err := c.Write(good); err != nil {
				return err
			}
			return c.WriteRaw([]byte{0, 0, 5, 1, 2, 3, 4, 5})
		}, crypto.ErrFrameLen},
		{"urgent field missing", Config{}, frameOf(Frame{Flags: crypto.FlagURG}), crypto.ErrNoUrgent},
		{"exact RST", Config{}, func(c *Conn) error {
			if _, err := c.Write(good); err != nil {
				return err
			}
			c.SendRST(0)
			return nil
		}, ErrReset},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := hosts(t)
			ac, bc, _, err := connect(t, a, b, false, c.evil, Config{TEPs: crypto.AllTEPs})
			ctx := testContext(t)
			if c.do != nil {
				if err != nil {
					t.Fatal(err)
				}
				if err := c.do(ac); err != nil {
					t.Fatal(err)
				}
				_ = bc.WaitClosed(ctx)
				if got := bc.Report().Received; !bytes.Equal(got, good) {
					t.Errorf("received %q", got)
				}
				err = bc.Report().Err
			}
			if !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
		})
	}
}

func TestUnofferedCipher(t *testing.T) {
	a, b := hosts(t)
	for _, cipher := range []crypto.AEAD{crypto.AES256GCM, 0x7777} {
		_, _, err, _ := connect(t, a, b, false, Config{AEADs: []crypto.AEAD{crypto.AES128GCM}}, Config{Cipher: cipher, KeepOpen: true})
		if !errors.Is(err, crypto.ErrCipherNotOffered) {
			t.Errorf("%v: %v", cipher, err)
		}
	}
}

func TestForgedSegments(t *testing.T) {
	a, b := hosts(t)
	ac, bc := mustConnect(t, a, b, false, Config{}, Config{})
	ctx := testContext(t)
	ac.SendRST(5 << 20)
	ac.SendRST(-10)
	if err := bc.WaitAnomaly(ctx, "rst_out_of_window"); err != nil {
		t.Fatal(err)
	}
	if _, err := ac.Write([]byte("0123456789")); err != nil {
		t.Fatal(err)
	}
	if err := bc.WaitReceived(ctx, 10); err != nil {
		t.Fatal(err)
	}
	// The same bytes in other segments are no fault, other bytes are.
	if err := ac.Resend(0, ac.SentOffset(), 1, 7); err != nil {
		t.Fatal(err)
	}
	if n := bc.Report().Anomalies["retransmit_different_bytes"]; n != 0 {
		t.Errorf("%d retransmissions taken for different", n)
	}
	ac.Send(Segment{Offset: -3, Flags: frame.ACK | frame.PSH, Payload: []byte("???")})
	if err := bc.WaitAnomaly(ctx, "retransmit_different_bytes"); err != nil {
		t.Fatal(err)
	}
	if _, err := ac.Write([]byte("still alive")); err != nil {
		t.Fatal(err)
	}
	if err := bc.WaitReceived(ctx, 21); err != nil {
		t.Fatal(err)
	}
}

func TestCork(t *testing.T) {
	a, b := hosts(t)
	var sizes []int
	cfg := Config{OnSend: func(o *Out) bool {
		if len(o.Payload) > 0 && o.Offset > 0 {
			sizes = append(sizes, len(o.Payload))
		}
		return true
	}}
	ac, bc := mustConnect(t, a, b, false, cfg, Config{})
	ac.Cork()
	for _, s := range []string{"one", "two", "three"} {
		if _, err := ac.WriteFrame(Frame{Data: []byte(s)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := ac.Uncork(10, 1, 25); err != nil {
		t.Fatal(err)
	}
	if err := bc.WaitReceived(testContext(t), 11); err != nil {
		t.Fatal(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if total := 3*crypto.Overhead + 11; fmt.Sprint(sizes) != fmt.Sprint([]int{10, 1, 25, total - 36}) {
		t.Errorf("segments %v", sizes)
	}
}

// TestKernel holds the peer's TCP against the kernel's, which knows no ENO.
func TestKernel(t *testing.T) {
	p, err := lab.Start(t).Pair(lab.Options{NoOffload: true, B: lab.EndOptions{NoAddress: true}})
	if err != nil {
		t.Fatal(err)
	}
	h, err := Open(p.B)
	if err != nil {
		t.Fatal(err)
	}
	data := pattern(300_000)
	cfg := Config{Timestamps: true}
	echo := func(c net.Conn) error {
		defer c.Close()
		b, err := io.ReadAll(c)
		if err != nil {
			return err
		}
		if !bytes.Equal(b, data) {
			return fmt.Errorf("the kernel received %d bytes, or wrong ones", len(b))
		}
		_, err = c.Write(b)
		return err
	}
	for _, v6 := range []bool{false, true} {
		name := map[bool]string{false: "v4", true: "v6"}[v6]
		kernelAddr, peerAddr := p.A.Addr4(), p.B.Addr4()
		if v6 {
			kernelAddr, peerAddr = p.A.Addr6(), p.B.Addr6()
		}
		check := func(t *testing.T, c *Conn) {
			t.Helper()
			ctx := testContext(t)
			if _, err := c.Write(data); err != nil {
				t.Fatal(err)
			}
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if err := c.WaitEnd(ctx); err != nil {
				t.Fatal(err)
			}
			if r := c.Report(); !bytes.Equal(r.Received, data) || r.Encrypted || len(r.Anomalies) > 0 {
				t.Errorf("received %d bytes, %v, anomalies %v", len(r.Received), r.PlainReason, r.Anomalies)
			}
		}
		t.Run(name+"/active", func(t *testing.T) {
			ln, err := p.A.NS.Listen("tcp", netip.AddrPortFrom(kernelAddr, 0).String())
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			done := make(chan error, 1)
			go func() {
				c, err := ln.Accept()
				if err == nil {
					err = echo(c)
				}
				done <- err
			}()
			c, err := h.Dial(testContext(t), ln.Addr().(*net.TCPAddr).AddrPort(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			check(t, c)
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		t.Run(name+"/passive", func(t *testing.T) {
			ln, err := h.Listen(port, cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			done := make(chan error, 1)
			go func() {
				c, err := p.A.NS.Dial(testContext(t), "tcp", netip.AddrPortFrom(peerAddr, port).String())
				if err == nil {
					err = func() error {
						if _, err := c.Write([]byte("hello")); err != nil {
							return err
						}
						return echo(c)
					}()
				}
				done <- err
			}()
			c, err := ln.AcceptReady(testContext(t))
			if err != nil {
				t.Fatal(err)
			}
			if err := c.WaitReceived(testContext(t), 5); err != nil {
				t.Fatal(err)
			}
			c.h.mu.Lock()
			c.plain = nil
			c.h.mu.Unlock()
			check(t, c)
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	// A kernel that gets a RST for its SYN reports a refused connection.
	_, err = p.A.NS.Dial(testContext(t), "tcp", netip.AddrPortFrom(p.B.Addr4(), 9999).String())
	if err == nil {
		t.Error("connected to a port where nobody listens")
	}
}

// TestForwarded runs two peers through an impairing forwarder.
func TestForwarded(t *testing.T) {
	p, err := lab.Start(t).Middle(lab.Options{A: lab.EndOptions{NoAddress: true}, B: lab.EndOptions{NoAddress: true}})
	if err != nil {
		t.Fatal(err)
	}
	im := lab.Impair{Drop: 0.02, Duplicate: 0.05, Reorder: 0.1, ReorderTime: time.Millisecond, Corrupt: 0.01, Cut: 0.3, Coalesce: 0.3}
	f, err := p.Forward(lab.ForwarderOptions{Seed: 3, AtoB: im, BtoA: im})
	if err != nil {
		t.Fatal(err)
	}
	a, err := Open(p.A)
	if err != nil {
		t.Fatal(err)
	}
	b, err := Open(p.B)
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{RTO: 20 * time.Millisecond, FrameSize: 2000, SegmentSize: 900}
	ac, bc := mustConnect(t, a, b, false, cfg, cfg)
	exchange(t, ac, bc, 60_000)

	// Stripping ENO anywhere in the handshake gives plain TCP.
	for _, c := range []struct {
		dir  lab.Dir
		from lab.Segments
	}{{lab.AtoB, lab.SYNs}, {lab.BtoA, lab.SYNACKs}} {
		f.Set(lab.AtoB, lab.Impair{})
		f.Set(lab.BtoA, lab.Impair{})
		f.Set(c.dir, lab.Impair{Strip: []lab.Strip{{Kind: frame.OptENO, From: c.from}}})
		ac, bc := mustConnect(t, a, b, true, Config{}, Config{})
		if r := ac.Report(); r.Encrypted || !errors.Is(r.PlainReason, ErrNoENO) {
			t.Errorf("%v: %+v", c, r)
		}
		if r := bc.Report(); r.Encrypted {
			t.Errorf("%v: %+v", c, r)
		}
	}
}

func FuzzParseENO(f *testing.F) {
	f.Add([]byte{1, 0x23})
	f.Add([]byte{0x85, 0xa3, 1, 2, 3, 4, 5, 6, 0x21})
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := parseENO(b)
		if err == nil {
			_, _ = choose(&o, crypto.AllTEPs, nil, nil)
			_, _ = agree(&o, &o, nil)
		}
	})
}

func TestENORoundTrip(t *testing.T) {
	for _, subs := range [][]Suboption{
		nil,
		{{TEP: crypto.TEPX25519}},
		{{crypto.TEPP256, []byte("123456789")}, {TEP: crypto.TEPX25519}},
		{{TEP: crypto.TEPX448}, {crypto.TEPX25519, []byte("123456789abcdefgh")}},
	} {
		o, err := parseENO(BuildENO(globalB, subs...)[2:])
		if err != nil || o.global != globalB || fmt.Sprint(o.subs) != fmt.Sprint(subs) {
			t.Errorf("%v became %+v, %v", subs, o, err)
		}
	}
}
