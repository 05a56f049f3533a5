package e2e

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab/frame"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/peer"
)

// fastOpenForAll makes the kernel take the data of every SYN, cookie or not, for
// every listener: server, no cookie required, without a socket option.
const fastOpenForAll = "1538" // 0x2 + 0x200 + 0x400

// synData adds data to the SYN of an active opener.
func synData(data []byte) func(*peer.Out) bool {
	return func(o *peer.Out) bool {
		if o.Flags&(frame.SYN|frame.ACK) == frame.SYN {
			o.Payload = data
		}
		return true
	}
}

// Data of a SYN with ENO never reaches an application, whose kernel would take
// it at once, and is not acknowledged: what the peer then sends in its place is
// delivered (RFC 8547 section 4.7).
func TestSYNData(t *testing.T) {
	eachIP(t, func(t *testing.T, v6 bool) {
		b := newOddBed(t)
		if err := b.host.NS.Sysctl("net/ipv4/tcp_fastopen", fastOpenForAll); err != nil {
			t.Fatal(err)
		}
		evil, good := []byte("SYN data that no TEP defines"), stream(1, 20000)
		app, pc, err := b.pair(true, v6, peer.Config{OnSend: synData(evil)})
		if err != nil {
			t.Fatal(err)
		}
		defer app.Close()
		defer context.AfterFunc(b.ctx, func() { app.Close() })()
		if _, err := pc.Write(good); err != nil {
			t.Fatal(err)
		}
		if err := pc.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(app); err != nil || !bytes.Equal(got, good) {
			t.Errorf("the application got %d bytes, want %d: %v", len(got), len(good), err)
		}
	})
}

// Nor does it where ENO is disabled by configuration (RFC 8547 section 4.7).
func TestSYNDataOfExcludedPort(t *testing.T) {
	b := newOddBed(t, "--exclude-ports", "7081")
	if got := b.synDataAccepted(t, "7081", peer.Config{}); len(got) != 0 {
		t.Errorf("the application got %q of a SYN with ENO", got)
	}
}

// The tests above would see the data if it came through: a kernel that is left
// alone takes that of a SYN without ENO.
func TestSYNDataOfPlainTCP(t *testing.T) {
	b := newOddBed(t)
	first := b.synDataAccepted(t, "0", peer.Config{NoENO: true})
	if string(first) != "early" {
		t.Errorf("the application got %q of the SYN", first)
	}
}

// synDataAccepted opens a connection whose SYN carries the data "early", and
// returns what the application reads first of it.
func (b *oddBed) synDataAccepted(t *testing.T, port string, cfg peer.Config) []byte {
	t.Helper()
	if err := b.host.NS.Sysctl("net/ipv4/tcp_fastopen", fastOpenForAll); err != nil {
		t.Fatal(err)
	}
	ln, err := b.host.NS.Listen("tcp", net.JoinHostPort(b.host.Addr4().String(), port))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithTimeout(b.ctx, 5*time.Second)
	defer cancel()
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	read := make(chan []byte, 1)
	go func() {
		defer close(read)
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		defer context.AfterFunc(ctx, func() { c.Close() })()
		buf := make([]byte, 64)
		n, _ := c.Read(buf)
		read <- buf[:n]
	}()
	cfg.OnSend = synData([]byte("early"))
	addr := netip.AddrPortFrom(b.host.Addr4(), uint16(ln.Addr().(*net.TCPAddr).Port))
	dialed := make(chan struct{})
	go func() {
		defer close(dialed)
		// The peer does not expect its SYN data to be acknowledged, and its
		// connection may not come about.
		if pc, err := b.peer.Dial(ctx, addr, cfg); err == nil {
			_ = pc.CloseWrite()
		}
	}()
	got := <-read
	cancel()
	<-dialed
	return got
}
