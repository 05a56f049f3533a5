package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
)

func serveFake(t *testing.T) (path string, s *controlServer) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "c.sock")
	s, err := listenControl(path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.close)
	s.serve(&fakeHost{cfg: fastpath.HostConfig{Interface: "fake0"}})
	return path, s
}

func dial(t *testing.T, path string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// scarce is a listener that fails a few times, as for want of descriptors.
type scarce struct {
	net.Listener
	failures int
}

func (l *scarce) Accept() (net.Conn, error) {
	if l.failures > 0 {
		l.failures--
		return nil, syscall.EMFILE
	}
	return l.Listener.Accept()
}

// The control socket outlives a want of descriptors.
func TestControlAcceptFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.sock")
	s, err := listenControl(path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.close)
	s.ln = &scarce{s.ln, 3}
	s.serve(&fakeHost{cfg: fastpath.HostConfig{Interface: "fake0"}})
	conn := dial(t, path)
	if _, err := io.WriteString(conn, `{"method":"status"}`+"\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || !strings.Contains(line, "fake0") {
		t.Errorf("%q, %v", line, err)
	}
}

// One connection carries any number of requests, and a bad one does not end it.
func TestControlPipelining(t *testing.T) {
	path, _ := serveFake(t)
	conn := dial(t, path)
	answers := bufio.NewReader(conn)
	for _, test := range []struct{ ask, want string }{
		{`{"method":"status"}`, `{"result":{"interface":"fake0"`},
		{`{"method":"flows"}`, `{"result":[{"local"`},
		{`{`, `{"error":"the request is not JSON`},
		{`[]`, `{"error":"the request is not JSON`},
		{`null`, `{"error":"unknown method \"\""`},
		{`{"method":"stop"}`, `{"error":"unknown method \"stop\""`},
		{`{"method":"session","local":"192.0.2.1:50000","remote":"192.0.2.2:443"}`, `"session_id":"23aabb"`},
		{`{"method":"session","local":"192.0.2.1:1","remote":"192.0.2.2:443"}`, `{"error":"no encrypted flow from 192.0.2.1:1 to 192.0.2.2:443"`},
		{`{"method":"session","local":"[::ffff:192.0.2.1]:50000","remote":"192.0.2.2:443"}`, `"session_id":"23aabb"`},
		{`{"method":"session"}`, `{"error":"local: \"\" is not an address`},
		{`{"method":"stats"}`, `"reasons":{"peer-no-eno":4}`},
	} {
		if _, err := io.WriteString(conn, test.ask+"\n"); err != nil {
			t.Fatal(err)
		}
		line, err := answers.ReadString('\n')
		if err != nil {
			t.Fatalf("%s: %v", test.ask, err)
		}
		if !strings.Contains(line, test.want) {
			t.Errorf("%s was answered %s, want %s", test.ask, line, test.want)
		}
	}
}

func TestControlLongLine(t *testing.T) {
	path, _ := serveFake(t)
	conn := dial(t, path)
	if _, err := io.WriteString(conn, strings.Repeat("x", maxRequest)); err != nil {
		t.Fatal(err)
	}
	// The server closes with our bytes unread, which may reset the connection
	// right after the answer.
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil || !strings.Contains(line, "longer than") {
		t.Errorf("got %q, %v", line, err)
	}
}

// Closing ends the connections of clients that say nothing, and leaves no file.
func TestControlClose(t *testing.T) {
	path, s := serveFake(t)
	conn := dial(t, path)
	if _, err := io.WriteString(conn, `{"method":"status"}`+"\n"); err != nil {
		t.Fatal(err)
	}
	answers := bufio.NewReader(conn)
	if _, err := answers.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	s.close()
	s.close()
	if _, err := answers.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection outlives the server: %v", err)
	}
	left, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// Of daemons that start at once on the socket of a dead one, exactly one wins.
func TestControlOneWinner(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.sock")
	for range 20 {
		dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		dead.SetUnlinkOnClose(false)
		_ = dead.Close()

		var wg sync.WaitGroup
		servers := make([]*controlServer, 8)
		errs := make([]error, len(servers))
		for i := range servers {
			wg.Go(func() { servers[i], errs[i] = listenControl(path, slog.New(slog.DiscardHandler)) })
		}
		wg.Wait()
		winners := 0
		for i, s := range servers {
			switch {
			case errs[i] == nil:
				winners++
				s.close()
			case !strings.Contains(errs[i].Error(), "already answers"):
				t.Error(errs[i])
			}
		}
		if winners != 1 {
			t.Fatalf("%d daemons took the socket", winners)
		}
	}
}

func TestControlPathErrors(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ path, want string }{
		{file, "is not a socket"},
		{filepath.Join(file, "c.sock"), "not a directory"},
		{filepath.Join(dir, strings.Repeat("x", 120)), "longer than the 107 bytes"},
		{dir, "is not a socket"},
	} {
		s, err := listenControl(test.path, slog.New(slog.DiscardHandler))
		if err == nil {
			s.close()
		}
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %s", test.path, err, test.want)
		}
	}
	if _, err := os.Stat(file); err != nil {
		t.Errorf("the file is gone: %v", err)
	}
}

func TestControlEmptyResults(t *testing.T) {
	t.Setenv("FAKE", "empty")
	path, _ := serveFake(t)
	for method, want := range map[string]string{
		"flows": `[]`,
		"stats": `{"counters":{},"reasons":{}}`,
	} {
		got, err := call(path, request{Method: method})
		if err != nil || string(got) != want {
			t.Errorf("%s: %s, %v, want %s", method, got, err, want)
		}
	}
}

func FuzzControlRequest(f *testing.F) {
	f.Add([]byte(`{"method":"session","local":"192.0.2.1:1","remote":"[2001:db8::1%eth0]:443"}`))
	f.Add([]byte(`{"method":"flows"}`))
	h := &fakeHost{}
	f.Fuzz(func(t *testing.T, line []byte) {
		r := handle(line, h)
		if (r.Error == "") == (r.Result == nil) {
			t.Errorf("neither or both of result and error: %+v", r)
		}
		if _, err := json.Marshal(r); err != nil {
			t.Error(err)
		}
	})
}

func TestByteCount(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 1536: "1.50 KiB", 20 << 10: "20.0 KiB",
		300 << 20: "300 MiB", 1 << 60: "1.00 EiB", 1<<64 - 1: "16.0 EiB",
	} {
		if got := byteCount(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}
