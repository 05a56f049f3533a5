package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// patience is how long a test waits for what must happen.
const patience = 30 * time.Second

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"tcpcrypt": func() { os.Exit(run(os.Args[1:], startFake, os.Stdout, os.Stderr)) },
	})
}

// TestScripts runs the command, with a fake host, as a process of its own.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "script"),
		Setup: func(env *testscript.Env) error {
			manager, err := listenNotify(filepath.Join(env.WorkDir, "notify"))
			if err != nil {
				return err
			}
			env.Defer(func() { _ = manager.Close() })
			env.Values["notify"] = manager
			env.Setenv("NOTIFY_SOCKET", manager.LocalAddr().String())
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits":    scriptExits,
			"notified": scriptNotified,
			"signal":   scriptSignal,
			"oneline":  scriptOneLine,
			"ask":      scriptAsk,
			"mode":     scriptMode,
			"stale":    scriptStale,
		},
	})
}

func listenNotify(path string) (*net.UnixConn, error) {
	return net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
}

// exits CODE COMMAND ARG...: the command ends with the exit code.
func scriptExits(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("%s ended with %d, want %d", strings.Join(args[1:], " "), got, want)
	}
}

// notified STATE: waits for the daemon to send STATE to the service manager.
func scriptNotified(ts *testscript.TestScript, _ bool, args []string) {
	manager := ts.Value("notify").(*net.UnixConn)
	ts.Check(manager.SetReadDeadline(time.Now().Add(patience)))
	buf := make([]byte, 256)
	n, err := manager.Read(buf)
	ts.Check(err)
	if got := string(buf[:n]); got != args[0] {
		ts.Fatalf("the service manager was told %q, want %q", got, args[0])
	}
}

// signal: sends SIGTERM to all commands in the background.
func scriptSignal(ts *testscript.TestScript, _ bool, _ []string) {
	for _, cmd := range ts.BackgroundCmds() {
		ts.Check(cmd.Process.Signal(syscall.SIGTERM))
	}
}

// oneline: the last command wrote exactly one line to stderr and nothing to stdout.
func scriptOneLine(ts *testscript.TestScript, _ bool, _ []string) {
	if text := ts.ReadFile("stderr"); strings.Count(text, "\n") != 1 || !strings.HasSuffix(text, "\n") {
		ts.Fatalf("stderr is not one line: %q", text)
	}
	if text := ts.ReadFile("stdout"); text != "" {
		ts.Fatalf("stdout is not empty: %q", text)
	}
}

// ask SOCKET LINE WANT: sends a line to a control socket; the answer contains WANT.
func scriptAsk(ts *testscript.TestScript, _ bool, args []string) {
	conn, err := net.Dial("unix", ts.MkAbs(args[0]))
	ts.Check(err)
	defer conn.Close()
	ts.Check(conn.SetDeadline(time.Now().Add(patience)))
	_, err = conn.Write([]byte(args[1] + "\n"))
	ts.Check(err)
	var answer json.RawMessage
	ts.Check(json.NewDecoder(conn).Decode(&answer))
	if !strings.Contains(string(answer), args[2]) {
		ts.Fatalf("%s was answered %s, which has no %s", args[1], answer, args[2])
	}
}

// mode PATH WANT: PATH has the type and permissions WANT.
func scriptMode(ts *testscript.TestScript, _ bool, args []string) {
	info, err := os.Lstat(ts.MkAbs(args[0]))
	ts.Check(err)
	if got := info.Mode().String(); got != args[1] {
		ts.Fatalf("%s has mode %s, want %s", args[0], got, args[1])
	}
}

// stale PATH: leaves a socket that nobody listens on.
func scriptStale(ts *testscript.TestScript, _ bool, args []string) {
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: ts.MkAbs(args[0]), Net: "unix"})
	ts.Check(err)
	ln.SetUnlinkOnClose(false)
	ts.Check(ln.Close())
}

// fakeHost stands in for fastpath.Host. FAKE_* variables choose what it does.
type fakeHost struct {
	cfg      fastpath.HostConfig
	done     chan struct{}
	mu       sync.Mutex
	draining bool
}

func startFake(ctx context.Context, cfg fastpath.HostConfig) (host, error) {
	switch os.Getenv("FAKE") {
	case "refuse":
		return nil, fmt.Errorf("interface %q: %w", cfg.Interface, errors.New("no such device\nat all"))
	case "panic":
		panic("fake panic")
	case "slow":
		notify(cfg.Log, "SLOW=1")
		<-ctx.Done()
		return nil, ctx.Err()
	}
	cfg.Log.Info("config", "mode", cfg.Mode, "queues", cfg.Queues, "cpus", cfg.CPUs, "ports", cfg.Ports,
		"exclude", cfg.Exclude, "teps", join(cfg.TEPs), "aeads", join(cfg.AEADs), "no-resume", cfg.NoResume, "require", cfg.Require)
	h := &fakeHost{cfg: cfg, done: make(chan struct{})}
	if os.Getenv("FAKE") == "die" {
		close(h.done)
	}
	return h, nil
}

func (h *fakeHost) Status() fastpath.Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	return fastpath.Status{
		Interface: h.cfg.Interface, Driver: "veth", MTU: 1500, Inner: "tcpcrypt0", Mode: "copy",
		Queues: []fastpath.QueueStatus{{Interface: "fake0", CPU: -1, Mode: "copy", Refused: "zerocopy: not supported", Checksum: "software", Received: 7, Transmitted: 8, HandedOver: 5}, {Interface: "fake0", Queue: 1, Worker: 1, CPU: 1, Mode: "copy", Checksum: "software"}},
		Workers: []fastpath.WorkerStatus{
			{CPU: -1, Queues: []int{0}, Flows: 2, HandedOver: 6}, {Worker: 1, CPU: 1, Queues: []int{1}, HalfOpen: 1, Received: 6},
		},
		Guard: "partial",
		Layers: []fastpath.GuardLayer{
			{Layer: "interface", Active: true, Persistent: true},
			{Layer: "netfilter", Active: true, Reason: "it ends with the daemon: no BPF file system is mounted"},
			{Layer: "cgroup", Reason: "the kernel cannot run it"},
		},
		Poll: "hybrid", Engine: "std", PID: 42, Uptime: 61.4, Draining: h.draining, Flows: 2, HalfOpen: 1, Ended: 3,
	}
}

func (h *fakeHost) Capture(ctx context.Context, cfg fastpath.CaptureConfig, fn func(*fastpath.Captured) error) (lost uint64, err error) {
	for i := range 3 {
		p := fastpath.Captured{At: time.Unix(1, int64(i)), Inner: cfg.Inner, Out: i == 1, Len: 60 + i, Lost: uint64(i), Frame: make([]byte, 60)}
		if err := fn(&p); err != nil {
			return 0, err
		}
	}
	<-ctx.Done()
	return 5, nil
}

func (h *fakeHost) Flows() []fastpath.FlowInfo {
	if os.Getenv("FAKE") == "empty" {
		return nil
	}
	return []fastpath.FlowInfo{
		{Local: "192.0.2.1:50000", Remote: "192.0.2.2:443", State: slowpath.StateEncrypted, Role: "A", TEP: "x25519",
			AEAD: "aes128gcm", SessionID: "23aabb", BytesIn: 1536, BytesOut: 7, FramesIn: 2, FramesOut: 1, Age: 3.2},
		{Local: "192.0.2.1:9999", Remote: "192.0.2.2:80", State: slowpath.StatePlain, Reason: "peer-no-eno"},
	}
}

func (h *fakeHost) Stats() fastpath.Stats {
	if os.Getenv("FAKE") == "empty" {
		return fastpath.Stats{}
	}
	return fastpath.Stats{
		Counters: map[string]uint64{"rx-packets": 12, "drop-no-buffer": 1},
		Reasons:  map[string]uint64{"peer-no-eno": 4},
	}
}

func (h *fakeHost) CacheList() []slowpath.CacheEntry {
	return []slowpath.CacheEntry{{Peer: "192.0.2.2", Port: 443, TEP: "x25519", AEAD: "aes128gcm", Role: "A", Next: 3, Age: 7, Expires: 60}}
}

func (h *fakeHost) CacheFlush(peer netip.Addr) int {
	if peer.IsValid() && peer != netip.MustParseAddr("192.0.2.2") {
		return 0
	}
	return 1
}

func (h *fakeHost) Rekey(local, remote netip.AddrPort) (int, error) {
	if local == remote {
		return 2, nil
	}
	if _, err := h.Session(local, remote); err != nil {
		return 0, err
	}
	return 1, nil
}

func (h *fakeHost) Session(local, remote netip.AddrPort) (fastpath.FlowInfo, error) {
	for _, f := range h.Flows() {
		if f.SessionID != "" && f.Local == local.String() && f.Remote == remote.String() {
			return f, nil
		}
	}
	return fastpath.FlowInfo{}, fmt.Errorf("no encrypted flow from %v to %v", local, remote)
}

func (h *fakeHost) Drain(ctx context.Context) {
	h.mu.Lock()
	h.draining = true
	h.mu.Unlock()
	notify(h.cfg.Log, "DRAINING=1")
	<-ctx.Done()
	h.cfg.Log.Info("drained", "why", ctx.Err().Error())
}

func (h *fakeHost) Close() error {
	h.cfg.Log.Info("closed")
	if os.Getenv("FAKE") == "stuck" {
		return errors.New("tcpcrypt0: busy")
	}
	return nil
}

func (h *fakeHost) Done() <-chan struct{} { return h.done }
func (h *fakeHost) Err() error            { return errors.New("the device is gone") }
