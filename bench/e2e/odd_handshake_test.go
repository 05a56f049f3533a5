package e2e

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/peer"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

const x25519 = byte(crypto.TEPX25519)

// eno is an ENO option with the given contents.
func eno(contents ...byte) []byte {
	return append([]byte{frame.OptENO, byte(2 + len(contents))}, contents...)
}

// on changes the segments that a peer sends, for which the bits of flags in mask
// are want.
func on(mask, want uint8, change func(*frame.Segment)) func(*peer.Out) bool {
	return func(o *peer.Out) bool {
		if o.Flags&mask == want {
			change(o.Segment)
		}
		return true
	}
}

// withoutTimestamp takes the timestamp out that begins the options.
func withoutTimestamp(s *frame.Segment) {
	if len(s.Options) >= 12 && s.Options[2] == frame.OptTimestamp {
		s.Options = s.Options[12:]
	}
}

// oddHandshake is a peer whose connection is opened all the same.
type oddHandshake struct {
	name      string
	cfg       peer.Config
	encrypted bool
	reason    string // why it is plain; "": the daemon does not see that
}

// Whatever a peer's handshake looks like, the connection is opened, encrypted or
// plain as the RFCs say, and carries what the applications wrote.
func TestOddHandshakes(t *testing.T) {
	const plain, encrypted = false, true
	half := bytes.Repeat([]byte{0x55}, crypto.ResumeLen)
	past := []byte{0x77, 60} // an option that runs past the header
	syn := func(change func(*frame.Segment)) func(*peer.Out) bool { return on(frame.SYN, frame.SYN, change) }
	rest := func(change func(*frame.Segment)) func(*peer.Out) bool { return on(frame.SYN, 0, change) }
	add := func(opts ...byte) func(*frame.Segment) {
		return func(s *frame.Segment) { s.Options = append(slices.Clip(s.Options), opts...) }
	}
	early := syn(func(s *frame.Segment) { s.Payload = []byte("early") })
	// either is in a SYN or in a SYN-ACK, with the b bit that belongs there.
	either := func(b byte) []oddHandshake {
		return []oddHandshake{
			{"vacuous", peer.Config{Option: eno()}, plain, slowpath.ReasonVacuous},
			{"vacuous but for a global", peer.Config{Option: eno(b | 2)}, plain, slowpath.ReasonVacuous},
			{"two options", peer.Config{Option: slices.Concat(eno(b, x25519), eno(b, x25519))}, plain, slowpath.ReasonDuplicateENO},
			{"length byte runs past", peer.Config{Option: eno(b, 0x9f, 0x80|x25519, 1)}, plain, slowpath.ReasonIllFormed},
			{"length byte last", peer.Config{Option: eno(b, x25519, 0x80)}, plain, slowpath.ReasonIllFormed},
			{"length byte before v = 0", peer.Config{Option: eno(b, 0x80, x25519, 0)}, plain, slowpath.ReasonIllFormed},
			{"TEP twice", peer.Config{Option: eno(b, x25519, x25519)}, plain, slowpath.ReasonNoCommonTEP},
			{"unknown TEPs", peer.Config{Option: eno(b, 0x20, 0x7f)}, plain, slowpath.ReasonNoCommonTEP},
			{"18 bytes of data", peer.Config{Option: eno(slices.Concat([]byte{b, 0x80 | x25519}, half, half)...)}, plain, slowpath.ReasonNoCommonTEP},
			{"option behind ENO runs past the header", peer.Config{OnSend: syn(add(past...))}, encrypted, ""},
			{"later globals", peer.Config{Option: eno(b, b^1, 0x1e, x25519)}, encrypted, ""},
			{"z bits", peer.Config{Option: eno(b|0x1c, x25519)}, encrypted, ""},
			{"global last", peer.Config{Option: eno(x25519, b)}, encrypted, ""},
			{"unknown TEPs beside", peer.Config{Option: eno(b, 0x20, x25519, 0x30, 0xff, 1, 2)}, encrypted, ""},
			{"experimental option beside", peer.Config{Options: []byte{253, 5, 0x45, 0x4e, x25519}}, encrypted, ""},
			{"data in the SYN", peer.Config{OnSend: early}, encrypted, ""},
			{"ECN", peer.Config{OnSend: syn(func(s *frame.Segment) {
				if s.Flags |= frame.ECE; s.Flags&frame.ACK == 0 {
					s.Flags |= frame.CWR
				}
			})}, encrypted, ""},
			{"window of 0 in the SYN", peer.Config{OnSend: syn(func(s *frame.Segment) { s.Window = 0 })}, encrypted, ""},
			{"MSS of 1", peer.Config{OnSend: syn(func(s *frame.Segment) { s.Options[2], s.Options[3] = 0, 1 })}, encrypted, ""},
			{"no option but ENO", peer.Config{NoScale: true, OnSend: syn(func(s *frame.Segment) { s.Options = s.Options[4:] })}, encrypted, ""},
			{"timestamps end with the handshake", peer.Config{Timestamps: true, OnSend: rest(withoutTimestamp)}, encrypted, ""},
			{"urgent pointers", peer.Config{OnSend: rest(func(s *frame.Segment) { s.Flags, s.Urgent = s.Flags|frame.URG, 1 })}, encrypted, ""},
			{"no PSH", peer.Config{OnSend: rest(func(s *frame.Segment) { s.Flags &^= frame.PSH })}, encrypted, ""},
			{"ciphers twice, and unknown ones", peer.Config{AEADs: []crypto.AEAD{0, 0x77, 1, 1, 0xffff}}, encrypted, ""},
		}
	}
	passive := append(either(0), []oddHandshake{
		{"b = 1", peer.Config{Option: eno(1, x25519)}, plain, slowpath.ReasonRoleConflict},
		{"MPTCP beside", peer.Config{Options: []byte{30, 4, 0, 0}}, plain, slowpath.ReasonOptionConflict},
		{"Fast Open cookie and data", peer.Config{Options: []byte{34, 10, 1, 2, 3, 4, 5, 6, 7, 8}, OnSend: early}, encrypted, ""},
		{"255 ciphers", peer.Config{AEADs: append(make([]crypto.AEAD, 254), crypto.AES256GCM)}, encrypted, ""},
		{"v = 1 without data", peer.Config{Option: eno(0x80 | x25519)}, encrypted, ""},
		{"v = 1 with 8 bytes", peer.Config{Option: eno(append([]byte{0x80 | x25519}, half[1:]...)...)}, encrypted, ""},
		{"unknown secret", peer.Config{Option: eno(slices.Concat([]byte{0x80 | x25519}, half, half[1:])...)}, encrypted, ""},
		{"unknown secret behind a length byte", peer.Config{Option: eno(slices.Concat([]byte{0x88, 0x80 | x25519}, half, []byte{0x30})...)}, encrypted, ""},
		{"no ENO in the third segment", peer.Config{OmitACK: true}, plain, slowpath.ReasonNoENOInAck},
		{"ENO of the third segment runs past the header", peer.Config{OmitACK: true, OnSend: rest(func(s *frame.Segment) {
			if len(s.Payload) == 0 {
				add(frame.OptENO, 40)(s)
			}
		})}, plain, slowpath.ReasonNoENOInAck},
		{"contents in the third segment", peer.Config{OnSend: rest(func(s *frame.Segment) {
			if i := bytes.Index(s.Options, eno()); i >= 0 {
				s.Options = append(bytes.Clone(s.Options[:i]), eno(0x9f, 1)...)
			}
		})}, encrypted, ""},
	}...)
	active := append(either(1), []oddHandshake{
		{"no ENO", peer.Config{NoENO: true}, plain, slowpath.ReasonPeerNoENO},
		{"ENO runs past the header", peer.Config{NoENO: true, Options: []byte{frame.OptENO, 40, 1, x25519}}, plain, slowpath.ReasonPeerNoENO},
		{"option runs past the header", peer.Config{NoENO: true, Options: past}, plain, slowpath.ReasonPeerNoENO},
		{"no global", peer.Config{Option: eno(x25519)}, plain, slowpath.ReasonRoleConflict},
		{"b = 1 only in a later global", peer.Config{Option: eno(0, 1, x25519)}, plain, slowpath.ReasonRoleConflict},
		{"several TEPs", peer.Config{Option: eno(1, byte(crypto.TEPP256), byte(crypto.TEPX448), x25519)}, encrypted, ""},
		{"v = 1 unasked", peer.Config{Option: eno(slices.Concat([]byte{1, 0x80 | x25519}, half, half[1:])...)}, plain, slowpath.ReasonNoCommonTEP},
		{"v = 1 without data", peer.Config{Option: eno(1, 0x80|x25519)}, plain, slowpath.ReasonNoCommonTEP},
	}...)
	for name, cases := range map[string][]oddHandshake{"active": passive, "passive": active} {
		t.Run(name, func(t *testing.T) {
			b := newOddBed(t, "--no-resume", "--teps", "x25519,x448,p256,p521")
			for _, c := range cases {
				t.Run(c.name, func(t *testing.T) { b.shake(t, name == "active", &c) })
			}
		})
	}
}

// shake opens a connection and lets it carry something in both directions.
func (b *oddBed) shake(t *testing.T, active bool, c *oddHandshake) {
	before, err := b.d.Stats(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	app, pc, err := b.pair(active, false, c.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	up, down := stream(1, 5000), stream(2, 5000)
	done := make(chan error, 1)
	go func() {
		_, err := app.Write(up)
		done <- errors.Join(err, app.(*net.TCPConn).CloseWrite())
	}()
	if _, err := pc.Write(down); err != nil {
		t.Fatal(err)
	}
	if err := pc.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	defer context.AfterFunc(b.ctx, func() { app.Close() })()
	got, err := io.ReadAll(app)
	if err := errors.Join(err, <-done); err != nil || !bytes.Equal(got, down) {
		t.Fatalf("the application got %d of %d bytes: %v", len(got), len(down), err)
	}
	if err := pc.WaitEnd(b.ctx); err != nil {
		t.Fatal(err)
	}
	if r := pc.Report(); r.Encrypted != c.encrypted || !bytes.Equal(r.Received, up) {
		t.Errorf("encrypted %v, the peer got %d of %d bytes, %v", r.Encrypted, len(r.Received), len(up), r.PlainReason)
	}
	if c.reason != "" {
		b.reason(t, before, c.reason)
	}
}
