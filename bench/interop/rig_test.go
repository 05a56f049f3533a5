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
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

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
	GenLocal   int            `json:"gen_local"`
	GenRemote  int            `json:"gen_remote"`
	TEP        byte           `json:"tep"`
	Cipher     uint16         `json:"cipher"`
	Resumed    bool           `json:"resumed"`
	SessionI   *int           `json:"session_i"`
	OrigRole   string         `json:"orig_role"`
	RemoteA    *int           `json:"remote_a"`
	PubkeyLen  string         `json:"peer_pubkey_len_mode"`
	Urgent     []int          `json:"urgent"`
}

// rig is the program on host a, and host b, whose interface has no address: the
// peer speaks TCP there on its own.
type rig struct {
	ctx          context.Context
	a, b         *lab.Iface
	ours, theirs net.IP
	d            *daemon.Daemon
	port         int // of the last connection
}

func needPeer(t *testing.T) {
	t.Helper()
	if missing != "" {
		t.Skip(missing)
	}
}

// newRig joins the two hosts by a cable and starts the program with the given
// flags.
func newRig(t *testing.T, v6 bool, flags ...string) *rig {
	t.Helper()
	needPeer(t)
	p, err := lab.Start(t).Pair(lab.Options{B: lab.EndOptions{NoAddress: true}})
	if err != nil {
		t.Fatal(err)
	}
	return newRigOn(t, p.A, p.B, v6, flags...)
}

func newRigOn(t *testing.T, a, b *lab.Iface, v6 bool, flags ...string) *rig {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	r := &rig{ctx: ctx, a: a, b: b, ours: a.Addr4().AsSlice(), theirs: b.Addr4().AsSlice(), port: 4000}
	if v6 {
		r.ours, r.theirs = a.Addr6().AsSlice(), b.Addr6().AsSlice()
	}
	var err error
	if r.d, err = daemon.Start(ctx, program, a, nil, flags...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.d.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(r.d.Logs())
		}
	})
	return r
}

// config returns the flags for a configuration file with the given text.
func config(t *testing.T, text string) []string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tcpcrypt.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"--config", path}
}

// encrypted has one connection between our kernel and the peer, n bytes each
// way, and fails the test unless it was encrypted, byte-exact and ended by
// authentic ends of file, and the peer found nothing to complain of.
func (r *rig) encrypted(t *testing.T, mode string, n int, flags ...string) report {
	t.Helper()
	return r.connection(t, mode, n, "authenticated_eof", flags, "")
}

// plain is encrypted for a connection that has to be plain TCP. allowed is what
// the peer may count as an anomaly although it is none.
func (r *rig) plain(t *testing.T, mode string, n int, flags []string, allowed string) report {
	t.Helper()
	return r.connection(t, mode, n, "plain_eof", flags, allowed)
}

// refused has the peer connect to a port on which nobody listens.
func (r *rig) refused(t *testing.T, flags ...string) {
	t.Helper()
	r.port++
	args := []string{peer, "--if", r.b.Name, "--ip", r.theirs.String(), "--peer", r.ours.String(), "--mode", "active",
		"--lport", strconv.Itoa(20000 + r.port), "--rport", strconv.Itoa(r.port), "--linger", "0.1", "--timeout", "10"}
	cmd := r.b.NS.Command(r.ctx, python, append(args, flags...)...)
	var out bytes.Buffer
	cmd.Stdout = &out
	// The exit status says less than the report does.
	_ = cmd.Run()
	var rep report
	if err := json.Unmarshal(out.Bytes(), &rep); err != nil || rep.Close != "refused" {
		t.Fatalf("%v; report %s", err, out.Bytes())
	}
}

func (r *rig) connection(t *testing.T, mode string, n int, end string, flags []string, allowed string) report {
	t.Helper()
	r.port++
	local, remote := r.port, 20000+r.port // the peer's ports
	args := []string{peer, "--if", r.b.Name, "--ip", r.theirs.String(), "--peer", r.ours.String(), "--mode", mode,
		"--app", "source", "--bytes", strconv.Itoa(n), "--seed", "1", "--linger", "0.1",
		"--expect-seed", "2", "--expect-bytes", strconv.Itoa(n), "--timeout", "60"}
	var ln net.Listener
	switch mode {
	case "active":
		local, remote = remote, local
		var err error
		if ln, err = r.a.NS.Listen("tcp", net.JoinHostPort(r.ours.String(), strconv.Itoa(remote))); err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		args = append(args, "--rport", strconv.Itoa(remote))
	case "simopen":
		args = append(args, "--rport", strconv.Itoa(remote))
	}
	args = append(args, "--lport", strconv.Itoa(local))
	cmd := r.b.NS.Command(r.ctx, python, append(args, flags...)...)
	var out, log bytes.Buffer
	cmd.Stdout = &out
	ready := newReady(&log)
	cmd.Stderr = ready
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	app := make(chan error, 1)
	go func() {
		app <- func() error {
			var c net.Conn
			var err error
			if ln != nil {
				c, err = ln.Accept()
			} else {
				select {
				case <-ready.seen:
				case <-r.ctx.Done():
					return r.ctx.Err()
				}
				to := net.JoinHostPort(r.theirs.String(), strconv.Itoa(local))
				if mode == "simopen" {
					c, err = r.a.NS.DialFrom(r.ctx, "tcp", &net.TCPAddr{IP: r.ours, Port: remote}, to)
				} else {
					c, err = r.a.NS.Dial(r.ctx, "tcp", to)
				}
			}
			if err != nil {
				return err
			}
			return talk(r.ctx, c, pattern(2, n), pattern(1, n))
		}()
	}()
	// The exit status says less than the report does.
	_ = cmd.Wait()
	if ln != nil {
		ln.Close()
	}
	var rep report
	if err := json.Unmarshal(out.Bytes(), &rep); err != nil {
		t.Fatalf("the peer's report: %v\n%s\n%s", err, out.Bytes(), log.String())
	}
	if exact := rep.RxExpected != nil && *rep.RxExpected; rep.Close != end || rep.Encrypted != (end == "authenticated_eof") || !exact {
		t.Errorf("close %q, encrypted %v, data as expected %v; errors %v, notes %v", rep.Close, rep.Encrypted, exact, rep.Errors, rep.Notes)
	}
	for name, n := range rep.Anomalies {
		if !strings.HasPrefix(name, "note_") && name != allowed {
			t.Errorf("anomaly %s: %d", name, n)
		}
	}
	select {
	case err := <-app:
		if err != nil {
			t.Errorf("our application: %v", err)
		}
	case <-r.ctx.Done():
		t.Error("our application did not end")
	}
	if t.Failed() {
		t.Logf("report: %s", out.Bytes())
		st, _ := r.d.Stats(r.ctx)
		t.Logf("reasons: %v", st.Reasons)
	}
	return rep
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
