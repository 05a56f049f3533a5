package main

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/vm"
)

// patience is how long what must happen may take; an emulated guest is slow.
const patience = 90 * time.Second

// daemon is a running `tcpcrypt run`.
type daemon struct {
	cmd   *exec.Cmd
	ended chan struct{}
	code  int

	mu   sync.Mutex
	text strings.Builder
}

// startDaemon runs it and waits until it is ready. On error, too, the result
// has its log and exit code.
func startDaemon(args []string) (*daemon, error) {
	d := &daemon{cmd: exec.Command(vm.ProgramPath, append([]string{"run"}, args...)...), ended: make(chan struct{})}
	stderr, err := d.cmd.StderrPipe()
	if err != nil {
		return d, err
	}
	if err := d.cmd.Start(); err != nil {
		return d, err
	}
	ready := make(chan struct{})
	go func() {
		defer close(d.ended)
		told := false
		lines := bufio.NewScanner(stderr)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			d.mu.Lock()
			d.text.WriteString(lines.Text() + "\n")
			d.mu.Unlock()
			if !told && strings.Contains(lines.Text(), "msg=ready") {
				told = true
				close(ready)
			}
		}
		_, _ = io.Copy(io.Discard, stderr)
		_ = d.cmd.Wait()
		d.code = d.cmd.ProcessState.ExitCode()
	}()
	select {
	case <-ready:
		return d, nil
	case <-d.ended:
		return d, errors.New("the daemon ended while starting")
	case <-time.After(patience):
		_ = d.cmd.Process.Kill()
		<-d.ended
		return d, errors.New("the daemon is not ready")
	}
}

func (d *daemon) log() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.text.String()
}

func (d *daemon) end(signal os.Signal) (int, error) {
	if err := d.cmd.Process.Signal(signal); err != nil {
		return 0, err
	}
	select {
	case <-d.ended:
		return d.code, nil
	case <-time.After(patience):
		_ = d.cmd.Process.Kill()
		<-d.ended
		return d.code, errors.New("the daemon did not end")
	}
}

// sockets duplicates the AF_XDP sockets of the daemon and asks the kernel what
// they are, so that not only the daemon's word is taken.
func (d *daemon) sockets() ([]vm.SocketInfo, error) {
	pid := d.cmd.Process.Pid
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("pidfd_open: %w", err)
	}
	defer unix.Close(pidfd)
	known, err := netlink.SocketDiagXDP()
	if err != nil {
		return nil, fmt.Errorf("list AF_XDP sockets: %w", err)
	}
	queues := make(map[uint64]int)
	for _, k := range known {
		if k.XDPDiagMsg != nil && k.XDPInfo != nil {
			queues[uint64(k.XDPDiagMsg.Ino)] = int(k.XDPInfo.QueueID)
		}
	}
	dir, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return nil, err
	}
	var out []vm.SocketInfo
	for _, entry := range dir {
		n, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		fd, err := unix.PidfdGetfd(pidfd, n, 0)
		if err != nil {
			continue // closed meanwhile
		}
		info, is, err := describeSocket(fd, queues)
		_ = unix.Close(fd)
		if err != nil {
			return nil, err
		}
		if is {
			out = append(out, info)
		}
	}
	slices.SortFunc(out, func(a, b vm.SocketInfo) int { return cmp.Compare(a.Queue, b.Queue) })
	return out, nil
}

func describeSocket(fd int, queues map[uint64]int) (info vm.SocketInfo, is bool, err error) {
	if domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || domain != unix.AF_XDP {
		return info, false, nil
	}
	options, err := unix.GetsockoptInt(fd, unix.SOL_XDP, unix.XDP_OPTIONS)
	if err != nil {
		return info, false, fmt.Errorf("XDP_OPTIONS: %w", err)
	}
	info.ZeroCopy = options&unix.XDP_OPTIONS_ZEROCOPY != 0
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return info, false, err
	}
	queue, ok := queues[st.Ino]
	if !ok {
		return info, false, fmt.Errorf("AF_XDP socket %d is bound to no queue", st.Ino)
	}
	info.Queue = queue
	return info, true, nil
}

// threads lists the daemon's threads that may run on one CPU only.
func (d *daemon) threads() ([]vm.ThreadInfo, error) {
	dir, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", d.cmd.Process.Pid))
	if err != nil {
		return nil, err
	}
	var out []vm.ThreadInfo
	for _, entry := range dir {
		id, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		var set unix.CPUSet
		if err := unix.SchedGetaffinity(id, &set); err != nil || set.Count() != 1 {
			continue
		}
		for cpu := range 1024 {
			if set.IsSet(cpu) {
				out = append(out, vm.ThreadInfo{CPU: cpu})
			}
		}
	}
	slices.SortFunc(out, func(a, b vm.ThreadInfo) int { return cmp.Compare(a.CPU, b.CPU) })
	return out, nil
}
