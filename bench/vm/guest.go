package vm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Card is a network card that QEMU emulates.
type Card string

const (
	// IGB has zero-copy on all queues, as many as the guest has CPUs, up to 8.
	IGB Card = "igb"
	// Virtio has zero-copy on its one queue.
	Virtio Card = "virtio-net"
	// VirtioPlain is Virtio without an IOMMU's rules for the device, without
	// which its driver refuses zero-copy.
	VirtioPlain Card = "virtio-net-plain"
	// E1000E has no XDP in its driver.
	E1000E Card = "e1000e"
	// VMXNet3 has native XDP for small packets, no zero-copy.
	VMXNet3 Card = "vmxnet3"
)

// device is what QEMU is told of the i-th card of a guest.
func (c Card) device(i int) ([]string, error) {
	switch c {
	case IGB:
		// A PCI Express device, which wants a root port.
		return []string{"-device", fmt.Sprintf("pcie-root-port,id=root%d,chassis=%d,slot=%d", i, i+1, i+1), "-device", fmt.Sprintf("igb,bus=root%d,", i)}, nil
	case E1000E:
		return []string{"-device", fmt.Sprintf("pcie-root-port,id=root%d,chassis=%d,slot=%d", i, i+1, i+1), "-device", fmt.Sprintf("e1000e,bus=root%d,", i)}, nil
	case VMXNet3:
		return []string{"-device", "vmxnet3,"}, nil
	case Virtio:
		return []string{"-device", "virtio-net-pci,iommu_platform=on,disable-legacy=on,"}, nil
	case VirtioPlain:
		return []string{"-device", "virtio-net-pci,disable-legacy=on,"}, nil
	}
	return nil, fmt.Errorf("unknown card %q", c)
}

// NIC is a network card of a guest.
type NIC struct {
	Card Card
	MAC  string
	Wire *os.File // a connected stream socket: the other end of the cable
}

// Options say what a guest is like.
type Options struct {
	Name   string
	Initrd string
	Dir    string // for its console's log
	CPUs   int
	Memory int // MiB
	NICs   []NIC
}

// Wire returns the two ends of a cable.
func Wire() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "wire"), os.NewFile(uintptr(fds[1]), "wire"), nil
}

// Guest is a running virtual machine. Its methods may be called by one
// goroutine at a time.
type Guest struct {
	Name, Console string // Console is the path of the console's log

	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
	qmp   net.Conn
	ready bool // the agent has greeted
	lines *bufio.Reader
	ended chan struct{}
}

// Boot starts a guest; Call waits until its agent runs. It ends with ctx, and
// with this process.
func Boot(ctx context.Context, i *Image, o Options) (*Guest, error) {
	const firstWire = 4 // descriptor of the first cable, after the monitor's
	var devices []string
	var wires []*os.File
	for n, nic := range o.NICs {
		device, err := nic.Card.device(n)
		if err != nil {
			return nil, err
		}
		device[len(device)-1] += fmt.Sprintf("netdev=wire%d,romfile=,mac=%s", n, nic.MAC)
		devices = append(devices, "-netdev", fmt.Sprintf("stream,id=wire%d,server=off,addr.type=fd,addr.str=%d", n, firstWire+n))
		devices = append(devices, device...)
		wires = append(wires, nic.Wire)
	}
	g := &Guest{Name: o.Name, Console: filepath.Join(o.Dir, o.Name+".log"), ended: make(chan struct{})}
	monitor, ours, err := Wire()
	if err != nil {
		return nil, err
	}
	g.qmp, err = net.FileConn(ours)
	ours.Close()
	if err != nil {
		monitor.Close()
		return nil, err
	}
	g.lines = bufio.NewReader(g.qmp)

	lib := filepath.Join(i.root, "usr/lib/x86_64-linux-gnu")
	share := filepath.Join(i.root, "usr/share")
	// The emulator with its own loader and libraries: the machine's may be others.
	args := []string{
		"--library-path", lib, i.emulator(),
		"-L", filepath.Join(share, "qemu"), "-L", filepath.Join(share, "seabios"),
		"-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max", "-smp", strconv.Itoa(o.CPUs), "-m", strconv.Itoa(o.Memory),
		"-display", "none", "-nodefaults", "-no-user-config", "-no-reboot",
		"-kernel", i.Kernel, "-initrd", o.Initrd, "-append", "console=ttyS0 quiet panic=-1 net.ifnames=0 clocksource=hpet no_timer_check nowatchdog",
		"-serial", "file:" + g.Console, "-chardev", "stdio,id=agent,signal=off", "-serial", "chardev:agent",
		"-chardev", "socket,id=monitor,fd=3", "-mon", "chardev=monitor,mode=control",
	}
	g.cmd = exec.CommandContext(ctx, filepath.Join(i.root, "usr/lib64/ld-linux-x86-64.so.2"), append(args, devices...)...)
	g.cmd.Env = append(os.Environ(), "QEMU_MODULE_DIR="+filepath.Join(lib, "qemu"))
	g.cmd.ExtraFiles = append([]*os.File{monitor}, wires...)
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stderr strings.Builder
	g.cmd.Stderr = &stderr
	g.in, err = g.cmd.StdinPipe()
	out, err2 := g.cmd.StdoutPipe()
	if err = errors.Join(err, err2); err != nil {
		monitor.Close()
		return nil, err
	}
	g.out = bufio.NewReaderSize(out, 1<<16)
	started := make(chan error, 1)
	go func() {
		// Pdeathsig means the thread that started it: this one stays.
		runtime.LockOSThread()
		started <- g.cmd.Start()
		<-g.ended
	}()
	err = <-started
	monitor.Close() // so that its end is seen when the emulator's is closed
	if err != nil {
		close(g.ended)
		return nil, err
	}
	if _, err = g.lines.ReadString('\n'); err == nil { // the monitor's greeting
		err = g.monitor("qmp_capabilities", nil)
	}
	if err != nil {
		_ = g.Close()
		return nil, fmt.Errorf("guest %s did not start: %w: %s", o.Name, err, strings.TrimSpace(stderr.String()))
	}
	return g, nil
}

// Call has the agent carry out one request. It waits until ctx is done for the
// answer; a guest that did not answer is of no use any more.
func (g *Guest) Call(ctx context.Context, req Request) (*Response, error) {
	fail := func(err error) (*Response, error) { return nil, fmt.Errorf("guest %s: %s: %w", g.Name, req.Op, err) }
	line, err := json.Marshal(req)
	if err != nil {
		return fail(err)
	}
	kill := sync.OnceFunc(func() { _ = g.cmd.Process.Kill() })
	stop := context.AfterFunc(ctx, kill)
	defer stop()
	// Before, the line echoes what is written to it.
	for !g.ready {
		text, err := g.out.ReadString('\n')
		if err != nil {
			return fail(g.why(ctx, err))
		}
		g.ready = strings.HasSuffix(text, Greeting)
	}
	if _, err := g.in.Write(append(line, '\n')); err != nil {
		return fail(g.why(ctx, err))
	}
	text, err := g.out.ReadBytes('\n')
	if err != nil {
		return fail(g.why(ctx, err))
	}
	var resp Response
	if err := json.Unmarshal(text, &resp); err != nil {
		return fail(fmt.Errorf("%w: %q", err, text))
	}
	if resp.Error != "" {
		return &resp, fmt.Errorf("guest %s: %s: %s", g.Name, req.Op, resp.Error)
	}
	return &resp, nil
}

// Greeted reports whether the agent was ever ready.
func (g *Guest) Greeted() bool { return g.ready }

// why is err, or that time was over, with the end of the console's log.
func (g *Guest) why(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = fmt.Errorf("no answer: %w", context.Cause(ctx))
	}
	return fmt.Errorf("%w; the console's last lines:\n%s", err, g.LastLines(20))
}

// LastLines returns the end of the console's log.
func (g *Guest) LastLines(n int) string {
	b, err := os.ReadFile(g.Console)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(b), "\r", "")), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// SetCarrier plugs the cable of the first card in or out.
func (g *Guest) SetCarrier(up bool) error {
	return g.monitor("set_link", map[string]any{"name": "wire0", "up": up})
}

// monitor gives QEMU a command and waits for the answer.
func (g *Guest) monitor(command string, arguments map[string]any) error {
	m := map[string]any{"execute": command}
	if arguments != nil {
		m["arguments"] = arguments
	}
	_ = g.qmp.SetDeadline(time.Now().Add(time.Minute))
	if err := json.NewEncoder(g.qmp).Encode(m); err != nil {
		return fmt.Errorf("guest %s: monitor: %w", g.Name, err)
	}
	for {
		line, err := g.lines.ReadBytes('\n')
		if err != nil {
			return fmt.Errorf("guest %s: monitor: %w", g.Name, err)
		}
		var answer struct {
			Return json.RawMessage
			Error  *struct{ Desc string }
		}
		if err := json.Unmarshal(line, &answer); err != nil {
			return fmt.Errorf("guest %s: monitor: %w", g.Name, err)
		}
		switch {
		case answer.Error != nil:
			return fmt.Errorf("guest %s: %s: %s", g.Name, command, answer.Error.Desc)
		case answer.Return != nil:
			return nil
		}
	}
}

// Close ends the guest, without asking it.
func (g *Guest) Close() error {
	select {
	case <-g.ended:
		return nil
	default:
	}
	_ = g.cmd.Process.Kill()
	_ = g.cmd.Wait()
	close(g.ended)
	return g.qmp.Close()
}
