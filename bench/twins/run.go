package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

const (
	// atOnce is how many connections each pair has at a time.
	atOnce = 6

	// A connection is worse with daemons if it takes longer than long and more
	// than times as long as without.
	long  = 3 * time.Second
	times = 4

	// again is how often both run it again then. So often more than without
	// daemons it has to be bad with them for a finding.
	again, oftener = 4, 2

	onlyTimes = 20
	onlyFor   = 15 * time.Second // at least, with operations
)

type config struct {
	seed        uint64
	connections int
	only        int // one connection, or -1
	binary      string
	more        func() bool // whether there is time for another world
	log         func(format string, args ...any)
}

// run makes worlds, at least one, and returns an error if something is found.
func run(ctx context.Context, cfg config) error {
	found, worlds := 0, 0
	for seed := cfg.seed; ; seed++ {
		n, err := cfg.world(ctx, newWorld(seed))
		if err != nil {
			return fmt.Errorf("world %d: %w", seed, err)
		}
		found += n
		worlds++
		if cfg.only >= 0 || ctx.Err() != nil || !cfg.more() {
			break
		}
	}
	cfg.log("%d worlds from seed %d on, %d connections in each: %d findings", worlds, cfg.seed, cfg.connections, found)
	if found > 0 {
		return fmt.Errorf("%d findings", found)
	}
	return nil
}

// twins are the two pairs of a world: without daemons, and with them.
type twins struct {
	config
	w     *world
	pairs [2]*pair

	mu         sync.Mutex
	took       [2]time.Duration
	found      int
	operations []string
}

func (cfg config) world(ctx context.Context, w *world) (found int, err error) {
	t := &twins{config: cfg, w: w}
	for i, binary := range []string{"", cfg.binary} {
		if t.pairs[i], err = w.build(ctx, binary); err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, t.pairs[i].lab.Close()) }()
	}
	var wg, operator sync.WaitGroup
	octx, stop := context.WithCancel(ctx)
	defer operator.Wait()
	defer stop()
	if w.restless {
		operator.Go(func() { t.operate(octx) })
	}
	if cfg.only >= 0 {
		c := newConnection(w, cfg.only)
		cfg.log("%v\n%v", w, c)
		begin := time.Now()
		for n := 0; n < onlyTimes || w.restless && time.Since(begin) < onlyFor; n++ {
			plain, encrypted := t.both(ctx, c)
			cfg.log("plain %v, with daemons %v", plain, encrypted)
		}
		stop()
		operator.Wait()
		t.showOperations()
		return 0, ctx.Err()
	}
	room := make(chan struct{}, atOnce)
	for k := range cfg.connections {
		room <- struct{}{}
		wg.Go(func() {
			t.compare(ctx, newConnection(w, k))
			<-room
		})
	}
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return t.found, err
	}
	cfg.log("world %d: plain %v, with daemons %v", w.seed, t.took[0].Round(time.Millisecond), t.took[1].Round(time.Millisecond))
	return t.found, nil
}

// both runs a connection on both pairs at the same time.
func (t *twins) both(ctx context.Context, c *connection) (plain, encrypted outcome) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		plain = c.carry(ctx, t.pairs[0])
	}()
	encrypted = c.carry(ctx, t.pairs[1])
	<-done
	return plain, encrypted
}

// compare runs a connection on both pairs, and again where that with daemons was
// the worse one: losses are random.
func (t *twins) compare(ctx context.Context, c *connection) {
	plain, encrypted := t.both(ctx, c)
	t.mu.Lock()
	t.took[0] += plain.took
	t.took[1] += encrypted.took
	t.mu.Unlock()
	if errors.Is(encrypted.err, errCorrupt) || errors.Is(encrypted.err, errTruncated) {
		t.finding(c, "%v, with daemons %v", plain, encrypted)
		return
	}
	if !worse(encrypted, plain) {
		return
	}
	var bad [2]int
	history := fmt.Sprintf("plain %v, with daemons %v", plain, encrypted)
	for range again {
		// One after the other: they may disturb each other.
		os := [2]outcome{c.carry(ctx, t.pairs[0]), c.carry(ctx, t.pairs[1])}
		for i, o := range os {
			if o.err != nil || o.took > long {
				bad[i]++
			}
		}
		history += fmt.Sprintf("; %v, %v", os[0], os[1])
	}
	if ctx.Err() == nil && bad[1] >= bad[0]+oftener {
		t.finding(c, "%s", history)
	}
}

// worse reports whether an outcome with daemons is much worse than without.
func worse(encrypted, plain outcome) bool {
	return encrypted.err != nil && plain.err == nil || encrypted.took > long && encrypted.took > times*plain.took
}

func (t *twins) finding(c *connection, format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.found++
	t.log("FINDING in %v\n%v\n%s\nagain: -seed %d -only %d", t.w, c, fmt.Sprintf(format, args...), t.w.seed, c.number)
	t.showOperations()
}

func (t *twins) showOperations() {
	if t.w.restless {
		t.log("operations, and their errors without and with daemons: %q", t.operations)
	}
}
