// Command zerocopy runs the program on network cards with zero-copy AF_XDP, in
// emulated guests: `make test-zerocopy`. It prints a table of what was seen and
// ends with 1 when something was not as it must be.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/vm"
)

func main() {
	cache := flag.String("cache", ".cache/zerocopy", "`folder` for the packages of the emulator and the kernel")
	refuse := flag.Bool("refuse", false, "give the guests cards that refuse zero-copy: the test must fail")
	only := flag.String("only", "", "run one `part` of it: hosts, gateway, stacked or others")
	report := flag.String("report", "", "write what doctor said in the guests to a `file`")
	keep := flag.String("logs", "", "keep the guests' logs in a `folder`")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 15*time.Minute)
	defer cancel()
	t := &tester{start: time.Now(), refuse: *refuse, only: *only}
	err := t.run(ctx, *cache, *keep)
	t.print(os.Stdout)
	if *report != "" {
		if e := os.WriteFile(*report, []byte(t.doctor), 0o644); err == nil {
			err = e
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "zerocopy: "+err.Error())
		os.Exit(1)
	}
	fmt.Println("zerocopy: passed")
}

// build makes the program and the agent, as static binaries, and the guests'
// file system.
func build(ctx context.Context, dir string, i *vm.Image) (initrd string, err error) {
	program, err := daemon.Build(dir, "-trimpath", "-buildvcs=false", "-ldflags=-s -w")
	if err != nil {
		return "", err
	}
	agent := filepath.Join(dir, "agent")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", agent, "github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/vm/agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	initrd = filepath.Join(dir, "initrd")
	return initrd, vm.Initrd(initrd, i, agent, program)
}
