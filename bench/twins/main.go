// Command twins runs the same connections over two equal pairs of hosts at once,
// one with daemons and one without: random settings of the kernels, sockets,
// interfaces and daemons, random losses on the wire, random reads and writes, and
// in some worlds administrators who change hosts meanwhile. A
// connection that fails or takes long with daemons only is run again several
// times over both; if it does so again that is a finding. It needs root, and
// leaves nothing behind.
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
	cfg := config{log: func(format string, args ...any) { fmt.Printf(format+"\n", args...) }}
	duration := flag.Duration("duration", time.Minute, "how long to make new worlds")
	flag.Uint64Var(&cfg.seed, "seed", uint64(time.Now().UnixNano()), "of the first `WORLD`; the next have the numbers after it")
	flag.IntVar(&cfg.connections, "connections", 40, "in each world")
	flag.IntVar(&cfg.only, "only", -1, "the `CONNECTION` of the first world to run, again and again, and nothing else")
	flag.StringVar(&cfg.binary, "binary", "bin/tcpcrypt", "the `PROGRAM` to run")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	binary, err := filepath.Abs(cfg.binary)
	if err == nil {
		cfg.binary = binary
		begin := time.Now()
		cfg.more = func() bool { return time.Since(begin) < *duration }
		err = run(ctx, cfg)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "twins:", err)
		os.Exit(1)
	}
}
