// Package interop runs the program against an independent implementation of
// both RFCs, where that lies beside the checkout: a complete endpoint with a
// TCP of its own, which obeys the rules itself and records every rule that the
// other side breaks.
package interop

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
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

// pattern is the peer's reproducible test data.
func pattern(seed uint64, n int) []byte {
	var out []byte
	for i := uint64(0); len(out) < n; i++ {
		b := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64([]byte("pattern"), seed), i)
		h := sha256.Sum256(b)
		out = append(out, h[:]...)
	}
	return out[:n]
}

type report struct {
	Encrypted  bool           `json:"encrypted"`
	Close      string         `json:"close"`
	RxExpected *bool          `json:"rx_expected"`
	SessionID  string         `json:"session_id"`
	Role       string         `json:"role"`
	Anomalies  map[string]int `json:"anomalies"`
	Errors     []string       `json:"errors"`
	Notes      []string       `json:"notes"`
	MaxFrameRx int            `json:"max_frame_rx"`
	RekeysRx   int            `json:"rekeys_rx"`
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
	{name: "chacha", bytes: 100000, flags: []string{"--aeads", "chacha"}},
	{name: "aes256", bytes: 100000, flags: []string{"--aeads", "aes256"}},
	{name: "p256-pubkey-len", bytes: 20000, flags: []string{"--teps", "p256", "--pubkey-len", "pubkey"}},
	{name: "p521-pubkey-len", bytes: 20000, flags: []string{"--teps", "p521", "--pubkey-len", "pubkey"}},
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
	{name: "resumption-proposed", bytes: 20000, flags: []string{"--state", "STATE", "--resume"}, only: "active"},
	{name: "resumption-proposed-again", bytes: 20000, flags: []string{"--state", "STATE", "--resume", "--length-byte"}, only: "active"},
	{name: "b-bit", bytes: 20000, flags: []string{"--b-bit"}, plain: true, only: "active"},
	{name: "mandatory-app-aware", bytes: 20000, flags: []string{"--mandatory-aa"}, plain: true},
	{name: "no-eno", bytes: 200000, flags: []string{"--no-eno"}, plain: true},
}

func TestInterop(t *testing.T) {
	if missing != "" {
		t.Skip(missing)
	}
	for _, mode := range []string{"passive", "active"} {
		for _, v6 := range []bool{false, true} {
			ip := "IPv4"
			if v6 {
				ip = "IPv6"
			}
			t.Run(mode+"/"+ip, func(t *testing.T) { runAll(t, mode, v6) })
		}
	}
}

func runAll(t *testing.T, mode string, v6 bool) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	l := lab.Start(t)
	p, err := l.Pair(lab.Options{B: lab.EndOptions{NoAddress: true}})
	if err != nil {
		t.Fatal(err)
	}
	d, err := daemon.Start(ctx, program, p.A, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := d.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(d.Logs())
		}
	}()
	ours, theirs := p.A.Addr4().String(), p.B.Addr4().String()
	if v6 {
		ours, theirs = p.A.Addr6().String(), p.B.Addr6().String()
	}
	state := filepath.Join(t.TempDir(), "sessions.json")
	for i, s := range scenarios {
		if s.only != "" && s.only != mode {
			continue
		}
		flags := slices.Clone(s.flags)
		if k := slices.Index(flags, "STATE"); k >= 0 {
			flags[k] = state
		}
		t.Run(s.name, func(t *testing.T) {
			port := 4000 + i
			args := append([]string{peer, "--if", p.B.Name, "--ip", theirs, "--peer", ours, "--mode", mode,
				"--app", "source", "--bytes", strconv.Itoa(s.bytes), "--seed", "1",
				"--expect-seed", "2", "--expect-bytes", strconv.Itoa(s.bytes), "--timeout", "60"}, flags...)
			var ln net.Listener
			if mode == "passive" {
				args = append(args, "--lport", strconv.Itoa(port))
			} else {
				args = append(args, "--lport", strconv.Itoa(30000+port), "--rport", strconv.Itoa(port))
				if ln, err = p.A.NS.Listen("tcp", net.JoinHostPort(ours, strconv.Itoa(port))); err != nil {
					t.Fatal(err)
				}
				defer ln.Close()
			}
			cmd := p.B.NS.Command(ctx, python, args...)
			var out, log bytes.Buffer
			cmd.Stdout = &out
			ready := newReady(&log)
			cmd.Stderr = ready
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			app := make(chan error, 1)
			go func() {
				var c net.Conn
				var err error
				if ln != nil {
					c, err = ln.Accept()
				} else {
					select {
					case <-ready.seen:
					case <-ctx.Done():
						app <- ctx.Err()
						return
					}
					c, err = p.A.NS.Dial(ctx, "tcp", net.JoinHostPort(theirs, strconv.Itoa(port)))
				}
				if err == nil {
					err = talk(ctx, c, pattern(2, s.bytes), pattern(1, s.bytes))
				}
				app <- err
			}()
			_ = cmd.Wait()
			if ln != nil {
				ln.Close()
			}
			var r report
			if err := json.Unmarshal(out.Bytes(), &r); err != nil {
				t.Fatalf("the peer's report: %v\n%s\n%s", err, out.Bytes(), log.String())
			}
			want := "authenticated_eof"
			if s.plain {
				want = "plain_eof"
			}
			if r.Close != want || r.Encrypted == s.plain || r.RxExpected == nil || !*r.RxExpected {
				t.Errorf("close %q, encrypted %v, data as expected %v; errors %v, notes %v", r.Close, r.Encrypted, r.RxExpected != nil && *r.RxExpected, r.Errors, r.Notes)
			}
			for name, n := range r.Anomalies {
				if !strings.HasPrefix(name, "note_") {
					t.Errorf("anomaly %s: %d", name, n)
				}
			}
			select {
			case err := <-app:
				if err != nil {
					t.Errorf("our application: %v", err)
				}
			case <-ctx.Done():
				t.Error("our application did not end")
			}
			if t.Failed() {
				t.Logf("report: %s", out.Bytes())
				st, _ := d.Stats(ctx)
				t.Logf("reasons: %v", st.Reasons)
			}
		})
	}
}

// talk sends and receives at the same time and ends both directions. Urgent
// bytes stay in the stream.
func talk(ctx context.Context, c net.Conn, send, want []byte) error {
	defer c.Close()
	if rc, err := c.(*net.TCPConn).SyscallConn(); err == nil {
		var serr error
		err = rc.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
		if err = errors.Join(err, serr); err != nil {
			return err
		}
	}
	defer context.AfterFunc(ctx, func() { c.Close() })()
	wrote := make(chan error, 1)
	go func() {
		_, err := c.Write(send)
		if err == nil {
			err = c.(*net.TCPConn).CloseWrite()
		}
		wrote <- err
	}()
	got, err := io.ReadAll(c)
	err = errors.Join(err, <-wrote)
	if err == nil && !bytes.Equal(got, want) {
		err = fmt.Errorf("got %d bytes that are not the %d expected", len(got), len(want))
	}
	return err
}

// readyWriter watches the peer's stderr for the line READY.
type readyWriter struct {
	log  *bytes.Buffer
	seen chan struct{}
	done bool
}

func newReady(log *bytes.Buffer) *readyWriter {
	return &readyWriter{log: log, seen: make(chan struct{})}
}

func (r *readyWriter) Write(b []byte) (int, error) {
	r.log.Write(b)
	if !r.done && bytes.Contains(r.log.Bytes(), []byte("READY")) {
		r.done = true
		close(r.seen)
	}
	return len(b), nil
}
