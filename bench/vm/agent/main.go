// Command agent is the first process of a guest of bench/vm: it prepares the
// system, then carries out what the host asks for over the second serial line.
// It runs nowhere else.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/vm"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "agent: this is the first process of a test guest, not a command")
		os.Exit(2)
	}
	// The kernel panics when its first process ends.
	defer func() { _ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) }()
	defer func() {
		if r := recover(); r != nil {
			fmt.Println("agent: panic:", r)
		}
	}()
	if err := serve(); err != nil {
		fmt.Println("agent:", err)
	}
}

func serve() error {
	for _, m := range []struct{ kind, path string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/run"}, {"tmpfs", "/tmp"},
	} {
		if err := unix.Mount(m.kind, m.path, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.path, err)
		}
	}
	// The kernel found no console to give to its first process.
	if console, err := unix.Open("/dev/console", unix.O_WRONLY, 0); err == nil {
		_, _ = unix.Dup2(console, 1), unix.Dup2(console, 2)
	}
	if err := os.MkdirAll("/sys/fs/cgroup", 0o755); err == nil {
		_ = unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, "")
	}
	_ = unix.Mount("bpf", "/sys/fs/bpf", "bpf", 0, "")
	_ = os.Setenv("PATH", "/")
	line, err := openLine("/dev/ttyS1")
	if err != nil {
		return err
	}
	a := &agent{}
	if a.failed, err = loadModules(vm.ModulesPath); err != nil {
		return err
	}
	if _, err := line.WriteString(vm.Greeting); err != nil {
		return err
	}
	lines := bufio.NewReaderSize(line, 1<<16)
	for {
		text, err := lines.ReadBytes('\n')
		if err != nil {
			return err
		}
		var req vm.Request
		resp := &vm.Response{}
		if err = json.Unmarshal(text, &req); err == nil {
			err = a.carryOut(&req, resp)
		}
		if err != nil {
			resp.Error = err.Error()
		}
		out, err := json.Marshal(resp)
		if err != nil {
			return err
		}
		if _, err := line.Write(append(out, '\n')); err != nil {
			return err
		}
		if req.Op == "poweroff" {
			return nil
		}
	}
}

// openLine opens a serial line for bytes as they are.
func openLine(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

// loadModules loads all modules of a folder, whatever their order: one that
// needs another one is tried again. It returns those that cannot be loaded.
func loadModules(dir string) (failed []string, err error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.ko*"))
	if err != nil {
		return nil, err
	}
	for len(files) > 0 {
		var again, why []string
		for _, path := range files {
			if err := loadModule(path); err != nil && !errors.Is(err, unix.EEXIST) {
				again = append(again, path)
				why = append(why, fmt.Sprintf("%s: %v", filepath.Base(path), err))
			}
		}
		if len(again) == len(files) {
			return why, nil
		}
		files = again
	}
	return nil, nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if !strings.HasSuffix(path, ".ko") {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	parameters := ""
	if strings.HasPrefix(filepath.Base(path), "bonding.") {
		parameters = "max_bonds=0" // or there would be one at once
	}
	return unix.FinitModule(int(f.Fd()), parameters, flags)
}

type agent struct {
	failed  []string // modules
	daemon  *daemon
	traffic traffic
	restore func() error // of "spread"
}

func (a *agent) carryOut(req *vm.Request, resp *vm.Response) error {
	switch req.Op {
	case "hello":
		release, err := os.ReadFile("/proc/sys/kernel/osrelease")
		if err != nil {
			return err
		}
		resp.Kernel, resp.CPUs, resp.Failed = strings.TrimSpace(string(release)), runtime.NumCPU(), a.failed
		return describeCards(req.Cards, resp)
	case "exec":
		cmd := exec.Command(req.Args[0], req.Args[1:]...)
		var stdout, stderr strings.Builder
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		err := cmd.Run()
		resp.Stdout, resp.Stderr = stdout.String(), stderr.String()
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			resp.Code, err = exit.ExitCode(), nil
		}
		return err
	case "net":
		return setUp(req)
	case "stack":
		return stack(req)
	case "unstack":
		return unstack(req)
	case "spread":
		return a.spread(req)
	case "link":
		return setLink(req.Interface, req.Up)
	case "carrier":
		return waitCarrier(req.Interface, req.Up)
	case "attached":
		return attached(req.Interface, resp)
	case "counters":
		return counters(req.Interface, resp)
	case "start":
		if a.daemon != nil {
			return errors.New("the daemon runs already")
		}
		d, err := startDaemon(req.Args)
		resp.Stderr, resp.Code = d.log(), d.code
		if err == nil {
			a.daemon = d
		}
		return err
	case "stop", "kill", "log", "sockets", "threads":
		if a.daemon == nil {
			return errors.New("no daemon runs")
		}
		return a.askDaemon(req, resp)
	case "listen":
		return a.traffic.listen(req.Address)
	case "open":
		n, err := a.traffic.open(req)
		resp.Bytes = n
		return err
	case "close":
		return a.traffic.close()
	case "abort":
		a.traffic.abort()
		return nil
	case "poweroff":
		return nil
	}
	return fmt.Errorf("unknown request %q", req.Op)
}

func (a *agent) askDaemon(req *vm.Request, resp *vm.Response) (err error) {
	d := a.daemon
	switch req.Op {
	case "stop", "kill":
		signal := unix.SIGTERM
		if req.Op == "kill" {
			signal = unix.SIGKILL
		}
		a.daemon = nil
		resp.Code, err = d.end(signal)
		resp.Stderr = d.log()
	case "log":
		resp.Stderr = d.log()
	case "sockets":
		resp.Sockets, err = d.sockets()
	case "threads":
		resp.Threads, err = d.threads()
	}
	return err
}
