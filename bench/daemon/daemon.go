// Package daemon runs the program under test on the hosts of a lab, as a user
// would: a process in the host's namespace, asked through its own commands.
package daemon

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// Build compiles the program into dir and returns its path. The go command is
// looked up in PATH; the current directory must be inside the module. extra
// are arguments of "go build", such as "-race".
func Build(dir string, extra ...string) (string, error) {
	out := filepath.Join(dir, "tcpcrypt")
	// git tells nothing of a checkout that is another user's, as in a container.
	args := append([]string{"build", "-buildvcs=false", "-o", out}, extra...)
	cmd := exec.Command("go", append(args, "github.com/tcpcrypt-xdp/tcpcrypt-xdp/cmd/tcpcrypt")...)
	cgo := "CGO_ENABLED=0"
	if slices.Contains(extra, "-race") {
		cgo = "CGO_ENABLED=1" // which the race detector needs
	}
	cmd.Env = append(os.Environ(), cgo)
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, b)
	}
	return out, nil
}

// Daemon is a running `tcpcrypt run`.
type Daemon struct {
	Control string // its control socket
	Process *os.Process

	binary string
	host   *lab.Iface
	cmd    *lab.Cmd
	mu     sync.Mutex
	logs   strings.Builder
	ended  chan struct{}
	err    error
}

// Start runs the program on a host with the given further flags, and returns
// when it has said that it is ready. The process is killed with its lab; what it
// pins is in Lab.BPFFS and goes as well. Each log line is passed to log, which
// may be nil.
func Start(ctx context.Context, binary string, host *lab.Iface, log func(string), flags ...string) (*Daemon, error) {
	f, err := os.CreateTemp(host.NS.Lab().Dir(), host.NS.ShortName()+"-*.sock")
	if err != nil {
		return nil, err
	}
	f.Close()
	d := &Daemon{Control: f.Name(), binary: binary, host: host, ended: make(chan struct{})}
	if err := os.Remove(d.Control); err != nil {
		return nil, err
	}
	pins, err := host.NS.Lab().BPFFS()
	if err != nil {
		return nil, err
	}
	args := []string{"run", "--interface", host.Name, "--control", d.Control, "--guard-pins", pins}
	if host.NS.EmulatesVLAN() {
		// To the guard that device is a side door.
		args = append(args, "--guard", "off")
	}
	d.cmd = host.NS.Command(context.WithoutCancel(ctx), binary, append(args, flags...)...)
	logs, err := d.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	d.Process = d.cmd.Process
	ready := make(chan struct{})
	go func() {
		defer close(d.ended)
		sc := bufio.NewScanner(logs)
		sc.Buffer(nil, 1<<20)
		told := false
		for sc.Scan() {
			line := sc.Text()
			d.mu.Lock()
			d.logs.WriteString(line + "\n")
			d.mu.Unlock()
			if log != nil {
				log(line)
			}
			if !told && strings.Contains(line, "msg=ready") {
				told = true
				close(ready)
			}
		}
		_, _ = io.Copy(io.Discard, logs)
		d.err = d.cmd.Wait()
	}()
	select {
	case <-ready:
		return d, nil
	case <-d.ended:
		return nil, fmt.Errorf("daemon on %s ended while starting: %w\n%s", host.NS.ShortName(), d.err, d.Logs())
	case <-ctx.Done():
		_ = d.Process.Kill()
		return nil, fmt.Errorf("daemon on %s is not ready: %w\n%s", host.NS.ShortName(), ctx.Err(), d.Logs())
	}
}

// Cleanup runs `tcpcrypt run --cleanup` on a host and returns what it says.
func Cleanup(ctx context.Context, binary string, host *lab.Iface) (string, error) {
	pins, err := host.NS.Lab().BPFFS()
	if err != nil {
		return "", err
	}
	out, err := host.NS.Command(ctx, binary, "run", "--interface", host.Name, "--cleanup", "--guard-pins", pins).CombinedOutput()
	return string(out), err
}

// Pinned lists what daemons of the lab have pinned.
func Pinned(l *lab.Lab) (found []string, err error) {
	root, err := l.BPFFS()
	if err != nil {
		return nil, err
	}
	// The kernel has entries of its own beside these.
	err = filepath.WalkDir(filepath.Join(root, "tcpcrypt"), func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			found = append(found, path)
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return found, err
}

// Logs returns what the daemon has logged so far.
func (d *Daemon) Logs() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.logs.String()
}

func (d *Daemon) ask(ctx context.Context, into any, args ...string) error {
	out, err := d.host.NS.Command(ctx, d.binary, append(args, "--json", "--control", d.Control)...).Output()
	if err != nil {
		var e *exec.ExitError
		if errors.As(err, &e) {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(e.Stderr)))
		}
		return fmt.Errorf("tcpcrypt %s on %s: %w", args[0], d.host.NS.ShortName(), err)
	}
	return json.Unmarshal(out, into)
}

// Flows returns what `tcpcrypt flows` lists.
func (d *Daemon) Flows(ctx context.Context) (fs []fastpath.FlowInfo, err error) {
	err = d.ask(ctx, &fs, "flows")
	return fs, err
}

// Status returns `tcpcrypt status`.
func (d *Daemon) Status(ctx context.Context) (s fastpath.Status, err error) {
	err = d.ask(ctx, &s, "status")
	return s, err
}

// Stats returns `tcpcrypt stats`.
func (d *Daemon) Stats(ctx context.Context) (s fastpath.Stats, err error) {
	err = d.ask(ctx, &s, "stats")
	return s, err
}

// Session returns `tcpcrypt session` of the connection between two endpoints.
func (d *Daemon) Session(ctx context.Context, local, remote net.Addr) (f fastpath.FlowInfo, err error) {
	err = d.ask(ctx, &f, "session", local.String(), remote.String())
	return f, err
}

// Cache returns what `tcpcrypt cache list` lists.
func (d *Daemon) Cache(ctx context.Context) (es []slowpath.CacheEntry, err error) {
	err = d.ask(ctx, &es, "cache", "list")
	return es, err
}

// FlushCache runs `tcpcrypt cache flush`, for the peers given or for all of
// them, and returns how many sessions it erased.
func (d *Daemon) FlushCache(ctx context.Context, peer ...string) (int, error) {
	return d.count(ctx, append([]string{"cache", "flush"}, peer...)...)
}

// Rekey runs `tcpcrypt rekey` for all connections, and returns on how many
// rekeying has begun.
func (d *Daemon) Rekey(ctx context.Context) (int, error) { return d.count(ctx, "rekey") }

func (d *Daemon) count(ctx context.Context, args ...string) (int, error) {
	var n struct{ Count int }
	err := d.ask(ctx, &n, args...)
	return n.Count, err
}

// Flow returns the one flow that is encrypted or closing.
func (d *Daemon) Flow(ctx context.Context) (fastpath.FlowInfo, error) {
	fs, err := d.Flows(ctx)
	if err != nil {
		return fastpath.FlowInfo{}, err
	}
	for _, f := range fs {
		if f.State == "encrypted" || f.State == "closing" {
			return f, nil
		}
	}
	return fastpath.FlowInfo{}, fmt.Errorf("daemon on %s has no encrypted flow: %+v", d.host.NS.ShortName(), fs)
}

// Stop ends the daemon with SIGTERM and returns how it ended.
func (d *Daemon) Stop() error {
	if err := d.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-d.ended:
		return d.err
	case <-time.After(30 * time.Second):
		_ = d.Process.Kill()
		<-d.ended
		return errors.New("the daemon did not end within 30 s of SIGTERM")
	}
}

// Wait waits until the daemon has ended by itself, and returns how.
func (d *Daemon) Wait(ctx context.Context) error {
	select {
	case <-d.ended:
		return d.err
	case <-ctx.Done():
		return fmt.Errorf("the daemon on %s goes on: %w", d.host.NS.ShortName(), ctx.Err())
	}
}

// Kill ends the daemon with SIGKILL and waits until it is gone.
func (d *Daemon) Kill() error {
	err := d.Process.Kill()
	<-d.ended
	return err
}
