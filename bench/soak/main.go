// Command soak lets two hosts with daemons open connections to each other for
// hours, over a wire that loses, delays, reorders and damages, while the daemons
// rekey, resume, hang, restart and are killed. Every stream must arrive byte for
// byte, or be reset with a reason; nothing of an encrypted one may be read on the
// wire; and what the daemons use must not grow. It needs root, and leaves nothing
// behind.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	cfg := config{log: logger()}
	flag.DurationVar(&cfg.duration, "duration", time.Minute, "how long to go on")
	flag.Uint64Var(&cfg.seed, "seed", uint64(time.Now().UnixNano()), "of all that is random")
	flag.StringVar(&cfg.binary, "binary", "bin/tcpcrypt", "the `PROGRAM` to run")
	flag.IntVar(&cfg.workers, "workers", 12, "connections at a time that each host opens")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	binary, err := filepath.Abs(cfg.binary)
	if err == nil {
		cfg.binary = binary
		err = run(ctx, cfg)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

func logger() func(string, ...any) {
	begin := time.Now()
	return func(format string, args ...any) {
		fmt.Printf("%8.1fs %s\n", time.Since(begin).Seconds(), fmt.Sprintf(format, args...))
	}
}
