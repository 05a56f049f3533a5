// Package interop runs the program against an independent implementation of
// both RFCs, where that lies beside the checkout: a complete endpoint with a
// TCP of its own, which obeys the rules itself and records every rule that the
// other side breaks.
package interop

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
)

const python = "/usr/bin/python3"

var peer, program, missing string

func TestMain(m *testing.M) {
	peer, _ = filepath.Abs("../../../shared/peer/peer.py")
	if _, err := os.Stat(peer); err != nil {
		missing = "the independent peer is not beside the checkout"
	} else if err := exec.Command(python, "-c", "import cryptography").Run(); err != nil {
		missing = "the independent peer needs " + python + " and python3-cryptography"
	}
	if missing != "" {
		fmt.Println("skipped:", missing)
		os.Exit(m.Run())
	}
	dir, err := os.MkdirTemp("", "tcpcrypt-interop")
	if err != nil {
		panic(err)
	}
	if program, err = daemon.Build(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

type scenario struct {
	name  string
	bytes int
	flags []string
	plain bool
	only  string // the peer's mode, where it makes sense in one alone
}

var scenarios = []scenario{
	{name: "default", bytes: 300000},
	{name: "frame-1", bytes: 4000, flags: []string{"--frame-size", "1"}},
	{name: "frame-17", bytes: 50000, flags: []string{"--frame-size", "17"}},
	{name: "frame-1461", bytes: 300000, flags: []string{"--frame-size", "1461"}},
	{name: "frame-16000", bytes: 500000, flags: []string{"--frame-size", "16000"}},
	{name: "frame-65000", bytes: 700000, flags: []string{"--frame-size", "65000"}},
	{name: "random-frames-random-segments", bytes: 300000, flags: []string{"--frame-size", "9000", "--frame-random", "--seg-size", "1400", "--seg-random"}},
	{name: "flight-of-10-under-65000", bytes: 500000, flags: []string{"--frame-size", "65000", "--cwnd", "14600"}},
	{name: "init-split-trailing", bytes: 100000, flags: []string{"--init-split", "7", "--init-trailing", "33"}},
	{name: "init-piggyback", bytes: 100000, flags: []string{"--piggyback-init"}},
	{name: "no-sack", bytes: 200000, flags: []string{"--no-sack"}},
	{name: "timestamps", bytes: 200000, flags: []string{"--timestamps"}},
	{name: "no-wscale-small-window", bytes: 200000, flags: []string{"--wscale", "-1", "--rcv-wnd", "8000"}},
	{name: "loss-reorder", bytes: 300000, flags: []string{"--tx-drop", "0.02", "--rx-drop", "0.02", "--tx-reorder", "0.02", "--rx-reorder", "0.02"}},
	{name: "loss-no-sack", bytes: 200000, flags: []string{"--no-sack", "--tx-drop", "0.02", "--rx-drop", "0.02"}},
	{name: "other-boundaries", bytes: 300000, flags: []string{"--rexmit-resegment", "--tx-drop", "0.03", "--rx-drop", "0.02"}},
	{name: "rekey", bytes: 300000, flags: []string{"--rekey-every", "20"}},
	{name: "finp-empty", bytes: 50000, flags: []string{"--finp", "empty"}},
	{name: "syn-repeat", bytes: 50000, flags: []string{"--syn-repeat", "2"}},
	{name: "all-teps", bytes: 50000, flags: []string{"--teps", "x448,p521,p256,x25519"}},
	{name: "align", bytes: 100000, flags: []string{"--align", "--frame-size", "3000"}},
	{name: "b-all-teps", bytes: 20000, flags: []string{"--teps", "p256,x25519,x448", "--b-all-teps"}, only: "passive"},
	{name: "explicit-global-app-aware", bytes: 20000, flags: []string{"--explicit-global", "--app-aware"}},
	{name: "urgent", bytes: 60000, flags: []string{"--urgent", "10,5000,40000", "--urg-header"}},
	{name: "urgent-early", bytes: 60000, flags: []string{"--urgent", "30000", "--urgent-early"}},
	{name: "keepalive-rekeys", bytes: 60000, flags: []string{"--keepalive", "0.02", "--cwnd", "4000"}},
	{name: "rekey-often-with-loss", bytes: 200000, flags: []string{"--rekey-every", "3", "--tx-drop", "0.03", "--rx-drop", "0.03"}},
	{name: "mss-536", bytes: 60000, flags: []string{"--mss", "536"}},
	{name: "mss-88-timestamps", bytes: 10000, flags: []string{"--mss", "88", "--timestamps"}},
	{name: "window-2000", bytes: 60000, flags: []string{"--wscale", "-1", "--rcv-wnd", "2000"}},
	{name: "segments-of-1", bytes: 1000, flags: []string{"--seg-size", "1", "--frame-size", "100"}},
	{name: "heavy-loss", bytes: 30000, flags: []string{"--tx-drop", "0.15", "--rx-drop", "0.15"}},
	{name: "heavy-duplication-and-reordering", bytes: 200000, flags: []string{"--tx-dup", "0.3", "--rx-dup", "0.3", "--tx-reorder", "0.3", "--rx-reorder", "0.3"}},
	{name: "b-bit", bytes: 20000, flags: []string{"--b-bit"}, plain: true, only: "active"},
	{name: "no-eno", bytes: 200000, flags: []string{"--no-eno"}, plain: true},
}

func TestInterop(t *testing.T) {
	eachMode(t, func(t *testing.T, mode string, v6 bool) {
		r := newRig(t, v6)
		for _, s := range scenarios {
			if s.only != "" && s.only != mode {
				continue
			}
			t.Run(s.name, func(t *testing.T) {
				if s.plain {
					r.plain(t, mode, s.bytes, s.flags, "")
				} else {
					r.encrypted(t, mode, s.bytes, s.flags...)
				}
			})
		}
	})
}

// eachMode runs f for both roles of the peer in the handshake, over IPv4 and
// IPv6.
func eachMode(t *testing.T, f func(t *testing.T, mode string, v6 bool)) {
	for _, mode := range []string{"passive", "active"} {
		t.Run(mode, func(t *testing.T) {
			eachIP(t, func(t *testing.T, v6 bool) { f(t, mode, v6) })
		})
	}
}

func eachIP(t *testing.T, f func(t *testing.T, v6 bool)) {
	for _, v6 := range []bool{false, true} {
		name := "IPv4"
		if v6 {
			name = "IPv6"
		}
		t.Run(name, func(t *testing.T) { f(t, v6) })
	}
}
