package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/peer"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/packet"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// rules writes a configuration file that says nothing else.
func rules(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "rules.toml")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// Under a rule of mandatory application-aware mode a connection is encrypted
// when the peer sends a = 1, and plain TCP when it does not (RFC 8547 section
// 4.2).
func TestMandatoryAppAware(t *testing.T) {
	b := newOddBed(t, "--config", rules(t, "[[rule]]\napp-aware = \"mandatory\"\n"))
	for _, active := range []bool{true, false} {
		for _, aware := range []bool{true, false} {
			t.Run(fmt.Sprintf("the peer opens %v, a %v", active, aware), func(t *testing.T) {
				before, err := b.d.Stats(b.ctx)
				if err != nil {
					t.Fatal(err)
				}
				app, pc, err := b.pair(active, false, peer.Config{Option: globalOption(active, aware)})
				if err != nil {
					t.Fatal(err)
				}
				defer app.Close()
				defer context.AfterFunc(b.ctx, func() { app.Close() })()
				msg := stream(8, 5000)
				if _, err := pc.Write(msg); err != nil {
					t.Fatal(err)
				}
				if err := pc.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				if got, err := io.ReadAll(app); err != nil || !bytes.Equal(got, msg) {
					t.Errorf("the application got %d of %d bytes: %v", len(got), len(msg), err)
				}
				// A third ACK without ENO tells the peer, and is on its list.
				if r := pc.Report(); r.Encrypted != aware || aware && len(r.Anomalies) != 0 {
					t.Errorf("encrypted %v, anomalies %v", r.Encrypted, r.Anomalies)
				}
				if !aware {
					b.reason(t, before, slowpath.ReasonNotAppAware)
				}
			})
		}
	}
}

// The a bit that the peer sent can be learnt of every encrypted connection (RFC
// 8547 section 4.2).
func TestPeerAppAware(t *testing.T) {
	b := newOddBed(t)
	for _, active := range []bool{true, false} {
		for _, aware := range []bool{true, false} {
			t.Run(fmt.Sprintf("the peer opens %v, a %v", active, aware), func(t *testing.T) {
				app, pc, err := b.pair(active, false, peer.Config{Option: globalOption(active, aware)})
				if err != nil {
					t.Fatal(err)
				}
				defer app.Close()
				fl, err := b.d.Flow(b.ctx)
				if err != nil {
					t.Fatal(err)
				}
				if fl.PeerAware != aware || fl.SessionID == "" {
					t.Errorf("flow %+v", fl)
				}
				if err := pc.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				app.Close()
				if err := pc.WaitEnd(b.ctx); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

// globalOption offers X25519, or answers with it, and has the a bit as told.
func globalOption(offer, aware bool) []byte {
	global := byte(0)
	if !offer {
		global |= 1 // b
	}
	if aware {
		global |= 2
	}
	return []byte{packet.OptENO, 4, global, byte(crypto.TEPX25519)}
}
