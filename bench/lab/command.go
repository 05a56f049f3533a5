package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Cmd is an exec.Cmd that starts inside a namespace. Use it like an exec.Cmd;
// the methods defined here replace those of the embedded one.
//
// As under "ip netns exec" the process has a mount namespace of its own in
// which /sys shows the network devices of its network namespace; file systems
// mounted below /sys, such as bpf and cgroup, are the same as outside.
//
// The process is killed when the lab is closed, and when the process that owns
// the lab dies in whatever way.
type Cmd struct {
	*exec.Cmd
	ns *Namespace

	waitOnce sync.Once
	waitErr  error
	waited   chan struct{}
}

// outputGrace is how long Wait waits, once the process has ended, for others that
// hold its output open: what sshd has forked for a session outlives it.
const outputGrace = 5 * time.Second

// Command returns a command that runs in the namespace; it is killed when ctx
// is done.
func (n *Namespace) Command(ctx context.Context, name string, args ...string) *Cmd {
	c := &Cmd{Cmd: exec.CommandContext(ctx, name, args...), ns: n, waited: make(chan struct{})}
	c.WaitDelay = outputGrace
	return c
}

// Start starts the process in the namespace and does not wait for it.
func (c *Cmd) Start() error {
	l := c.ns.lab
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return ErrClosed
	}
	l.started = true
	l.mu.Unlock()

	c.Env = append(c.Environ(), markerEnv+"="+l.name)
	if c.SysProcAttr == nil {
		c.SysProcAttr = &syscall.SysProcAttr{}
	}
	c.SysProcAttr.Pdeathsig = syscall.SIGKILL

	ch := make(chan error)
	go onLostThread(func() {
		err := c.startHere()
		ch <- err
		if err == nil {
			// The parent-death signal is about the thread that forked.
			<-c.waited
		}
	})
	if err := <-ch; err != nil {
		return err
	}

	l.mu.Lock()
	l.cmds[c] = struct{}{}
	closed := l.closed
	l.mu.Unlock()
	if closed {
		_ = c.Process.Kill()
		_ = c.Wait()
		return ErrClosed
	}
	return nil
}

func (c *Cmd) startHere() error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return privilege(fmt.Errorf("lab: new mount namespace: %w", err))
	}
	if err := unix.Setns(c.ns.FD(), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("lab: enter %s: %w", c.ns.short, err)
	}
	if err := remountSys(); err != nil {
		return err
	}
	return c.Cmd.Start()
}

// Wait waits for the process to end. It may be called more than once and by
// several goroutines; all get the same result.
func (c *Cmd) Wait() error {
	if c.Process == nil {
		return errors.New("lab: command not started")
	}
	c.waitOnce.Do(func() {
		c.waitErr = c.Cmd.Wait()
		close(c.waited)
		c.ns.lab.mu.Lock()
		delete(c.ns.lab.cmds, c)
		c.ns.lab.mu.Unlock()
	})
	return c.waitErr
}

// Run starts the process and waits for it.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output runs the process and returns its standard output. When Stderr is nil
// and the process fails, the error is an *exec.ExitError that holds what it
// wrote there.
func (c *Cmd) Output() ([]byte, error) {
	if c.Stdout != nil {
		return nil, errors.New("lab: Stdout already set")
	}
	var out, errOut bytes.Buffer
	c.Stdout = &out
	capture := c.Stderr == nil
	if capture {
		c.Stderr = &errOut
	}
	err := c.Run()
	var exit *exec.ExitError
	if capture && errors.As(err, &exit) {
		exit.Stderr = errOut.Bytes()
	}
	return out.Bytes(), err
}

// CombinedOutput runs the process and returns its standard output and standard
// error in one.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	if c.Stdout != nil || c.Stderr != nil {
		return nil, errors.New("lab: Stdout or Stderr already set")
	}
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	err := c.Run()
	return out.Bytes(), err
}

// remountSys mounts a sysfs of the current network namespace over /sys, in a
// mount namespace that the calling thread must have for itself, and puts back
// what was mounted below.
func remountSys() error {
	if err := unix.Mount("", "/", "none", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("lab: mount propagation: %w", err)
	}
	type tree struct {
		path string
		fd   int
	}
	var trees []tree
	defer func() {
		for _, t := range trees {
			_ = unix.Close(t.fd)
		}
	}()
	for _, p := range mountsBelow("/sys/") {
		fd, err := unix.OpenTree(unix.AT_FDCWD, p, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
		if err != nil {
			return fmt.Errorf("lab: keep mount %s: %w", p, err)
		}
		trees = append(trees, tree{p, fd})
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("lab: mount sysfs: %w", err)
	}
	for _, t := range trees {
		if err := unix.MoveMount(t.fd, "", unix.AT_FDCWD, t.path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("lab: restore mount %s: %w", t.path, err)
		}
	}
	return nil
}

// mountsBelow returns the outermost mount points below a directory, which is
// given with its trailing slash.
func mountsBelow(dir string) []string {
	b, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return nil
	}
	var all []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir) {
			all = append(all, f[4])
		}
	}
	slices.Sort(all)
	var top []string
	for _, p := range all {
		if len(top) == 0 || p != top[len(top)-1] && !strings.HasPrefix(p, top[len(top)-1]+"/") {
			top = append(top, p)
		}
	}
	return top
}
