// Package lab builds network topologies out of Linux network namespaces, for
// tests, the demo and the benchmarks. Nothing in it calls a program: namespaces,
// veth pairs, addresses and offload settings are made through netlink, ioctl
// and sysctl files.
//
//	l, err := lab.New()
//	defer l.Close()
//	p, err := l.Pair(lab.Options{NoOffload: true})
//	ln, err := p.B.NS.Listen("tcp", netip.AddrPortFrom(p.B.Addr4(), 80).String())
//	c, err := p.A.NS.Dial(ctx, "tcp", ln.Addr().String())
//
// A [Lab] owns everything it made and removes it in [Lab.Close]. Namespaces are
// named and appear under /run/netns, so "ip netns exec NAME ..." enters them
// while a test waits. The names carry the process id and its start time: labs
// of parallel processes do not meet, and [New] sweeps what a killed process
// left behind.
//
// Topologies are composed of [Lab.Namespace] and [Lab.Connect]; [Lab.Pair]
// (two hosts on one cable) and [Lab.Middle] (two hosts with a namespace between
// them, in which a [Forwarder] bridges and impairs) are the common ones.
//
// Everything needs root, or rather CAP_SYS_ADMIN and CAP_NET_ADMIN; without
// them [New] fails with an error that wraps [ErrPrivilege].
package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Reasons why a lab or a part of it cannot be built on this machine.
var (
	// ErrPrivilege: the process lacks CAP_SYS_ADMIN or CAP_NET_ADMIN.
	ErrPrivilege = errors.New("lab: building network namespaces needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN)")
	// ErrClosed: the lab was closed before or during the call.
	ErrClosed = errors.New("lab: closed")
)

const (
	netnsDir   = "/run/netns"
	namePrefix = "tcpcrypt-"
	// markerEnv is set in the environment of every process that a lab
	// starts, so that the processes of a dead lab can be told from those of
	// a person who looks around in its namespaces.
	markerEnv = "TCPCRYPT_LAB"
)

var labSeq atomic.Uint32

// Lab is a set of namespaces, the links between them and the processes in them.
// Its methods may be called from any goroutine.
type Lab struct {
	name string
	dir  string
	seq  uint32

	mu      sync.Mutex
	closed  bool
	spaces  []*Namespace
	subnets uint32
	cmds    map[*Cmd]struct{}
	started bool // a process was ever started
	bpffs   bool // a BPF file system is mounted in dir
	atClose []func() error

	closeOnce sync.Once
	closeErr  error
}

// New sweeps the leftovers of dead processes and returns an empty lab.
func New() (*Lab, error) {
	if err := prepareNetnsDir(); err != nil {
		return nil, err
	}
	if _, err := Sweep(); err != nil {
		return nil, err
	}
	start, err := processStart(os.Getpid())
	if err != nil {
		return nil, err
	}
	seq := labSeq.Add(1)
	l := &Lab{
		name: fmt.Sprintf("%s%d.%s.%d", namePrefix, os.Getpid(), start, seq),
		seq:  seq,
		cmds: map[*Cmd]struct{}{},
	}
	l.dir = filepath.Join(os.TempDir(), l.name)
	if err := os.Mkdir(l.dir, 0o700); err != nil {
		return nil, fmt.Errorf("lab: working directory: %w", err)
	}
	return l, nil
}

// Name returns the prefix of the lab's namespace names, unique on the machine.
func (l *Lab) Name() string { return l.name }

// Dir returns a directory for sockets, captures and logs that Close removes.
func (l *Lab) Dir() string { return l.dir }

// bpffsName is the mount point of a lab's BPF file system in its directory.
const bpffsName = "bpf"

// BPFFS returns the directory of a BPF file system, mounted by the first call.
// What the lab's processes pin there outlives them, and goes with the lab.
func (l *Lab) BPFFS() (string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	dir := filepath.Join(l.dir, bpffsName)
	if l.bpffs {
		return dir, nil
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", fmt.Errorf("lab: BPF file system: %w", err)
	}
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		return "", privilege(fmt.Errorf("lab: mount BPF file system: %w", err))
	}
	l.bpffs = true
	return dir, nil
}

// removeDir removes a lab's directory and what is pinned in it.
func removeDir(dir string) error {
	// What is pinned goes even if a process keeps the mount.
	err := os.RemoveAll(filepath.Join(dir, bpffsName, "tcpcrypt"))
	if e := unix.Unmount(filepath.Join(dir, bpffsName), unix.MNT_DETACH); e != nil && e != unix.EINVAL && e != unix.ENOENT {
		err = errors.Join(err, fmt.Errorf("lab: unmount BPF file system: %w", e))
	}
	return errors.Join(err, os.RemoveAll(dir))
}

// AtClose registers a function that Close calls before it takes anything down,
// in reverse order of registration. On a closed lab it is called at once.
func (l *Lab) AtClose(f func() error) {
	l.mu.Lock()
	if !l.closed {
		l.atClose = append(l.atClose, f)
		l.mu.Unlock()
		return
	}
	l.mu.Unlock()
	_ = f()
}

// Close stops what runs in the lab and removes all of it: registered functions
// first, then processes, links, namespaces and the directory. It goes on after
// errors and returns them joined. Further calls wait for the first and return
// its result.
func (l *Lab) Close() error {
	l.closeOnce.Do(func() { l.closeErr = l.teardown() })
	return l.closeErr
}

func (l *Lab) teardown() error {
	l.mu.Lock()
	l.closed = true
	atClose, spaces, started := l.atClose, l.spaces, l.started
	var cmds []*Cmd
	for c := range l.cmds {
		cmds = append(cmds, c)
	}
	l.mu.Unlock()

	var errs []error
	for i := len(atClose) - 1; i >= 0; i-- {
		errs = append(errs, atClose[i]())
	}
	// All die before any is waited for: one may hold the output of another open.
	for _, c := range cmds {
		_ = c.Process.Kill()
	}
	if started {
		killMarked(l.name)
		for _, ns := range spaces {
			killInside(ns)
		}
	}
	for _, c := range cmds {
		// The result of a process that is killed here interests nobody.
		_ = c.Wait()
	}
	for i := len(spaces) - 1; i >= 0; i-- {
		errs = append(errs, spaces[i].remove())
	}
	errs = append(errs, removeDir(l.dir))
	return errors.Join(errs...)
}

// Sweep removes namespaces, processes and directories of labs whose process is
// dead, and returns the names of the namespaces that it removed. New calls it.
func Sweep() ([]string, error) {
	unlock, err := lockNetnsDir()
	if err != nil {
		return nil, err
	}
	defer unlock()
	entries, err := os.ReadDir(netnsDir)
	if err != nil {
		return nil, fmt.Errorf("lab: sweep: %w", err)
	}
	var removed []string
	var errs []error
	dead := map[string]bool{}
	for _, e := range entries {
		lab, ok := labOf(e.Name())
		if !ok || labAlive(lab) {
			continue
		}
		if !dead[lab] {
			dead[lab] = true
			killMarked(lab)
		}
		if err := unmountNamed(e.Name()); err != nil {
			errs = append(errs, err)
			continue
		}
		removed = append(removed, e.Name())
	}
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), namePrefix+"*.*.*"))
	for _, d := range dirs {
		if lab, ok := labOf(filepath.Base(d)); ok && !labAlive(lab) {
			errs = append(errs, removeDir(d))
		}
	}
	return removed, errors.Join(errs...)
}

// labOf splits the lab's name off the name of one of its namespaces, or of its
// directory: tcpcrypt-PID.START.SEQ[-NAME].
func labOf(s string) (string, bool) {
	rest, ok := strings.CutPrefix(s, namePrefix)
	if !ok {
		return "", false
	}
	rest, _, _ = strings.Cut(rest, "-")
	parts := strings.Split(rest, ".")
	if len(parts) != 3 {
		return "", false
	}
	for _, p := range parts {
		if _, err := strconv.ParseUint(p, 10, 64); err != nil {
			return "", false
		}
	}
	return namePrefix + rest, true
}

// labAlive reports whether the process that made the lab still runs. The start
// time tells it from a later process with the same id.
func labAlive(lab string) bool {
	parts := strings.Split(strings.TrimPrefix(lab, namePrefix), ".")
	pid, err := strconv.Atoi(parts[0])
	if err != nil {
		return true
	}
	start, err := processStart(pid)
	return err == nil && start == parts[1]
}

// processStart returns the start time of a process in clock ticks since boot,
// field 22 of its stat file.
func processStart(pid int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", fmt.Errorf("lab: process start time: %w", err)
	}
	// The command name, field 2, may hold spaces and parentheses.
	s := string(b)
	f := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(f) < 20 {
		return "", fmt.Errorf("lab: process start time: short stat file of process %d", pid)
	}
	if f[0] == "Z" || f[0] == "X" {
		return "", fmt.Errorf("lab: process %d is dead", pid)
	}
	return f[19], nil
}

// killMarked kills the processes that carry the lab's name in their
// environment.
func killMarked(lab string) {
	want := markerEnv + "=" + lab
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		env, err := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		if err != nil {
			continue
		}
		for v := range strings.SplitSeq(string(env), "\x00") {
			if v == want {
				_ = unix.Kill(pid, unix.SIGKILL)
				break
			}
		}
	}
}

// killInside kills what runs in the namespace. A process may hide its mark: sshd
// writes a title over its environment.
func killInside(ns *Namespace) {
	var here, there unix.Stat_t
	if unix.Fstat(ns.FD(), &here) != nil {
		return
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() || unix.Stat(filepath.Join("/proc", e.Name(), "ns/net"), &there) != nil {
			continue
		}
		if here.Dev == there.Dev && here.Ino == there.Ino {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// lockNetnsDir takes the lock that ip(8) takes as well while it changes mounts
// under /run/netns.
func lockNetnsDir() (unlock func(), err error) {
	fd, err := unix.Open(netnsDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("lab: %s: %w", netnsDir, err)
	}
	for {
		err = unix.Flock(fd, unix.LOCK_EX)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("lab: lock %s: %w", netnsDir, err)
	}
	return func() { _ = unix.Close(fd) }, nil
}

// prepareNetnsDir makes /run/netns a shared mount of its own, as ip(8) does, so
// that names appear in and vanish from other mount namespaces too.
func prepareNetnsDir() error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return privilege(fmt.Errorf("lab: %w", err))
	}
	unlock, err := lockNetnsDir()
	if err != nil {
		return privilege(err)
	}
	defer unlock()
	err = unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
	if err == unix.EINVAL {
		if err = unix.Mount(netnsDir, netnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err == nil {
			err = unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
		}
	}
	if err != nil {
		return privilege(fmt.Errorf("lab: share %s: %w", netnsDir, err))
	}
	return nil
}

// unmountNamed removes a name under /run/netns. The namespace itself lives
// until its last process and socket are gone.
func unmountNamed(name string) error {
	p := filepath.Join(netnsDir, name)
	// EINVAL: a plain file on which the namespace was never mounted.
	if err := unix.Unmount(p, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("lab: unmount %s: %w", name, err)
	}
	if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("lab: remove name: %w", err)
	}
	return nil
}

// privilege adds ErrPrivilege to errors that stem from missing capabilities.
func privilege(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w: %w", ErrPrivilege, err)
	}
	return err
}
