package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// The control protocol: over a unix stream socket the client sends requests
// and the daemon answers each, in order, one JSON object a line.

// request is what a client asks.
type request struct {
	Method string `json:"method"`           // status, flows, stats, session, cache, cache-flush, rekey or capture
	Local  string `json:"local,omitempty"`  // session, rekey, capture: address:port of this host
	Remote string `json:"remote,omitempty"` // session, rekey, capture: address:port of the peer
	Peer   string `json:"peer,omitempty"`   // cache-flush: address; empty: all
	Side   string `json:"side,omitempty"`   // capture: wire, inner or both
	Snap   int    `json:"snap,omitempty"`   // capture: most bytes of a packet; 0: all
}

// count is the answer to what was done to several things.
type count struct {
	Count int `json:"count"`
}

// response is the answer: Result when Error is empty.
type response struct {
	Result json.RawMessage `json:"result,omitempty"`
	Error  string          `json:"error,omitempty"`
}

const (
	maxRequest   = 4096             // bytes of a request line
	writeTimeout = 10 * time.Second // for a client to read an answer
	maxSocket    = 107              // bytes of a unix socket path
)

// acceptPause is how long the control socket waits after it could not take a client.
const acceptPause = 100 * time.Millisecond

// controlServer answers requests about one host.
type controlServer struct {
	path string
	ln   net.Listener
	lock *os.File // held while the socket is ours
	log  *slog.Logger

	done sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	closed bool
}

// listenControl takes the socket at path for this process. A socket that a
// dead daemon left behind is replaced, one of a live daemon is an error.
// Clients that connect wait until serve.
func listenControl(path string, log *slog.Logger) (*controlServer, error) {
	if len(path) > maxSocket {
		return nil, fmt.Errorf("control: %s: longer than the %d bytes that a socket path may have", path, maxSocket)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, controlError(err)
	}
	lock, err := lockSocket(path)
	if err != nil {
		return nil, err
	}
	if err := removeStale(path); err != nil {
		unlockSocket(lock)
		return nil, err
	}
	ln, err := listenPrivate(path)
	if err != nil {
		unlockSocket(lock)
		return nil, fmt.Errorf("control: %w", err)
	}
	return &controlServer{path: path, ln: ln, lock: lock, log: log, conns: map[net.Conn]struct{}{}}, nil
}

// controlError is the error of making the socket, the first thing that a daemon
// without root's rights fails at.
func controlError(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("control: %w: the daemon needs root", err)
	}
	return fmt.Errorf("control: %w", err)
}

func inUse(path string) error {
	return fmt.Errorf("control: a daemon already answers at %s: give this one (for another interface or network namespace?) a path of its own with --control", path)
}

// lockSocket takes the lock beside the socket, without which two daemons that
// start at once could each remove the socket of the other as a stale one.
func lockSocket(path string) (*os.File, error) {
	for {
		lock, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, controlError(err)
		}
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			_ = lock.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, inUse(path)
			}
			return nil, fmt.Errorf("control: %s.lock: %w", path, err)
		}
		// The holder before us may have removed the file between our open
		// and our lock; then the lock protects nothing.
		ours, err1 := lock.Stat()
		named, err2 := os.Lstat(lock.Name())
		if err1 == nil && err2 == nil && os.SameFile(ours, named) {
			return lock, nil
		}
		_ = lock.Close()
	}
}

func unlockSocket(lock *os.File) {
	_ = os.Remove(lock.Name())
	_ = lock.Close()
}

func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("control: %w", err)
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("control: %s exists and is not a socket", path)
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		_ = conn.Close()
		return inUse(path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("control: %w", err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("control: %w", err)
	}
	return nil
}

// listenPrivate binds a socket that only its owner may connect to.
func listenPrivate(path string) (*net.UnixListener, error) {
	// The mode of a unix socket before bind is the mode that its file is
	// created with: there is no moment at which others can connect.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmod error
		if err := c.Control(func(fd uintptr) { chmod = unix.Fchmod(int(fd), 0o600) }); err != nil {
			return err
		}
		return chmod
	}}
	ln, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	return ln.(*net.UnixListener), nil
}

// serve starts to answer.
func (s *controlServer) serve(h host) {
	s.done.Go(func() {
		failing := false
		for {
			conn, err := s.ln.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				// Out of descriptors or memory, which others may give back.
				if !failing {
					s.log.Error("control socket: nobody can connect for now", "err", err)
				}
				failing = true
				time.Sleep(acceptPause)
				continue
			}
			failing = false
			if !s.add(conn) {
				_ = conn.Close()
				return
			}
			s.done.Go(func() {
				defer s.remove(conn)
				answer(conn, h)
			})
		}
	})
}

func (s *controlServer) add(conn net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.conns[conn] = struct{}{}
	return true
}

func (s *controlServer) remove(conn net.Conn) {
	s.mu.Lock()
	delete(s.conns, conn)
	s.mu.Unlock()
	_ = conn.Close()
}

// close removes the socket and ends all connections. When it returns the host
// is not used any more. It may be called more than once.
func (s *controlServer) close() {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.closed = true
	_ = s.ln.Close()
	for conn := range s.conns {
		_ = conn.Close()
	}
	s.mu.Unlock()
	s.done.Wait()
	unlockSocket(s.lock)
}

// answer serves one connection until the client closes it or breaks the protocol.
func answer(conn net.Conn, h host) {
	lines := bufio.NewScanner(conn)
	lines.Buffer(make([]byte, 0, 512), maxRequest)
	for lines.Scan() {
		var req request
		if json.Unmarshal(lines.Bytes(), &req) == nil && req.Method == "capture" {
			serveCapture(conn, h, &req)
			return
		}
		if len(lines.Bytes()) > 0 && !reply(conn, handle(lines.Bytes(), h)) {
			return
		}
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		reply(conn, response{Error: fmt.Sprintf("the request is longer than %d bytes", maxRequest)})
	}
}

func reply(conn net.Conn, r any) bool {
	line, err := json.Marshal(r)
	if err != nil {
		return false
	}
	if err := conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return false
	}
	_, err = conn.Write(append(line, '\n'))
	return err == nil
}

// handle carries one request out.
func handle(line []byte, h host) response {
	var req request
	if err := json.Unmarshal(line, &req); err != nil {
		return response{Error: "the request is not JSON: " + err.Error()}
	}
	var result any
	switch req.Method {
	case "status":
		st := h.Status()
		if st.Queues == nil {
			st.Queues = []fastpath.QueueStatus{}
		}
		if st.Workers == nil {
			st.Workers = []fastpath.WorkerStatus{}
		}
		result = st
	case "flows":
		flows := h.Flows()
		if flows == nil {
			flows = []fastpath.FlowInfo{}
		}
		result = flows
	case "stats":
		stats := h.Stats()
		if stats.Counters == nil {
			stats.Counters = map[string]uint64{}
		}
		if stats.Reasons == nil {
			stats.Reasons = map[string]uint64{}
		}
		result = stats
	case "session":
		flow, err := session(h, req.Local, req.Remote)
		if err != nil {
			return response{Error: err.Error()}
		}
		result = flow
	case "cache":
		entries := h.CacheList()
		if entries == nil {
			entries = []slowpath.CacheEntry{}
		}
		result = entries
	case "cache-flush":
		peer, err := parsePeer(req.Peer)
		if err != nil {
			return response{Error: err.Error()}
		}
		result = count{h.CacheFlush(peer)}
	case "rekey":
		n, err := rekey(h, req.Local, req.Remote)
		if err != nil {
			return response{Error: err.Error()}
		}
		result = count{n}
	default:
		return response{Error: fmt.Sprintf("unknown method %q", req.Method)}
	}
	encoded, err := json.Marshal(result)
	if err != nil {
		return response{Error: err.Error()}
	}
	return response{Result: encoded}
}

// session finds the encrypted flow between two addresses.
func session(h host, localText, remoteText string) (fastpath.FlowInfo, error) {
	local, remote, err := parseEndpoints(localText, remoteText)
	if err != nil {
		return fastpath.FlowInfo{}, err
	}
	return h.Session(local, remote)
}

// rekey initiates rekeying on the flow between two addresses, or on all flows
// when both are empty.
func rekey(h host, localText, remoteText string) (int, error) {
	if localText == "" && remoteText == "" {
		return h.Rekey(netip.AddrPort{}, netip.AddrPort{})
	}
	local, remote, err := parseEndpoints(localText, remoteText)
	if err != nil {
		return 0, err
	}
	return h.Rekey(local, remote)
}

func parseEndpoints(localText, remoteText string) (local, remote netip.AddrPort, err error) {
	if local, err = parseEndpoint(localText); err != nil {
		return local, remote, fmt.Errorf("local: %w", err)
	}
	if remote, err = parseEndpoint(remoteText); err != nil {
		return local, remote, fmt.Errorf("remote: %w", err)
	}
	return local, remote, nil
}

// parsePeer reads an address; the empty text is the zero Addr.
func parsePeer(s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("peer: %q is not an address like 192.0.2.1 or 2001:db8::1", s)
	}
	return a.Unmap().WithZone(""), nil
}

// parseEndpoint reads an address and port as flows have them: without zone,
// and IPv4 as IPv4.
func parseEndpoint(s string) (netip.AddrPort, error) {
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is not an address and port like 192.0.2.1:443 or [2001:db8::1]:443", s)
	}
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port()), nil
}

var errNoControl = errors.New("control is empty: it must be the path of a socket")

// callTimeout is how long a client waits for the whole answer.
const callTimeout = 5 * time.Second

// dialControl connects to the daemon at path, for callTimeout.
func dialControl(path string) (*net.UnixConn, error) {
	if path == "" {
		return nil, errNoControl
	}
	deadline := time.Now().Add(callTimeout)
	conn, err := (&net.Dialer{Deadline: deadline}).Dial("unix", path)
	if err != nil {
		if reason := errors.Unwrap(err); reason != nil {
			err = reason
		}
		if errno := syscall.Errno(0); errors.As(err, &errno) {
			err = errno
		}
		hint := ""
		switch {
		case errors.Is(err, fs.ErrNotExist):
			hint = ": tcpcrypt run starts one, --control names the socket of another"
		case errors.Is(err, syscall.ECONNREFUSED):
			hint = ": the one that made it has ended, tcpcrypt run starts another"
		case errors.Is(err, fs.ErrPermission):
			hint = ": only root may ask it"
		}
		return nil, failuref("no daemon answers at %s: %w%s", path, err, hint)
	}
	_ = conn.SetDeadline(deadline)
	return conn.(*net.UnixConn), nil
}

// call asks the daemon at path.
func call(path string, req request) (json.RawMessage, error) {
	conn, err := dialControl(path)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := json.NewEncoder(conn).Encode(req); err != nil {
		return nil, failuref("no daemon answers at %s: %w", path, err)
	}
	var resp response
	if err := json.NewDecoder(conn).Decode(&resp); err != nil {
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			err = fmt.Errorf("no answer within %v", callTimeout)
		case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
			err = errors.New("it closed the connection")
		}
		return nil, failuref("no daemon answers at %s: %w", path, err)
	}
	if resp.Error != "" {
		return nil, failure{errors.New(resp.Error)}
	}
	return resp.Result, nil
}
