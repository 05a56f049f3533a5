package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/vm"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

const (
	control = "/run/tcpcrypt.sock"
	port    = "4433"
)

// tester runs the beds and remembers what was seen.
type tester struct {
	start  time.Time
	refuse bool
	rows   []row
	doctor strings.Builder
}

// row is a line of the table: one guest in one run of the daemon.
type row struct {
	bed, guest, card string
	run              string
	queues           int
	mode             string
	workers          int
	flows            int
	bytes            int64
	packets          []uint64 // received by each queue
	handed           uint64
}

func (t *tester) log(format string, args ...any) {
	fmt.Printf("%6.1fs  %s\n", time.Since(t.start).Seconds(), fmt.Sprintf(format, args...))
}

func (t *tester) print(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "BED\tGUEST\tNIC\tRUN\tQUEUES\tMODE\tWORKERS\tFLOWS\tBYTES\tPACKETS BY QUEUE\tHANDED OVER")
	for _, r := range t.rows {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%d\t%s\t%d\t%d\t%d\t%v\t%d\n", r.bed, r.guest, r.card, r.run, r.queues, r.mode, r.workers, r.flows, r.bytes, r.packets, r.handed)
	}
	_ = tw.Flush()
}

// bedSpec is two guests on one cable, and the runs of the daemon on them.
type bedSpec struct {
	name string
	a, b vm.Card
	cpus int
	runs []runSpec
}

// runSpec is one start of the daemons.
type runSpec struct {
	name   string
	queues int // of a card that has several
	mtu    int
	flap   bool
}

var beds = []bedSpec{
	{"igb", vm.IGB, vm.IGB, 2, []runSpec{
		{name: "1 queue", queues: 1, mtu: 1500, flap: true},
	}},
	{"virtio", vm.Virtio, vm.Virtio, 2, []runSpec{
		{name: "1 queue", mtu: 1500, flap: true},
		{name: "MTU 3000", mtu: 3000},
	}},
}

func (t *tester) run(ctx context.Context, cache, only, logs string) error {
	image, err := vm.Fetch(ctx, cache, t.log)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "tcpcrypt-vm")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if logs == "" {
		logs = dir
	}
	initrd, err := build(ctx, dir, image)
	if err != nil {
		return err
	}
	t.log("Linux %s and the emulator are ready", image.Version)
	ran := 0
	for _, spec := range beds {
		if only != "" && only != spec.name {
			continue
		}
		ran++
		if err := t.bed(ctx, spec, image, initrd, logs); err != nil {
			return fmt.Errorf("bed %s: %w", spec.name, err)
		}
	}
	if ran == 0 {
		return fmt.Errorf("there is no bed %q", only)
	}
	return nil
}

// host is a guest and what the test knows of it.
type host struct {
	*vm.Guest
	t       *tester
	ctx     context.Context
	card    vm.Card
	iface   string
	address string
	queues  int
}

func (t *tester) bed(ctx context.Context, spec bedSpec, image *vm.Image, initrd, logs string) error {
	wireA, wireB, err := vm.Wire()
	if err != nil {
		return err
	}
	defer wireA.Close()
	defer wireB.Close()
	var hosts [2]*host
	for i, card := range []vm.Card{spec.a, spec.b} {
		if t.refuse {
			card = vm.VirtioPlain
		}
		wire := []*os.File{wireA, wireB}[i]
		name := fmt.Sprintf("%s-%c", spec.name, 'a'+i)
		g, err := vm.Boot(ctx, image, vm.Options{
			Name: name, Initrd: initrd, Dir: logs, CPUs: spec.cpus, Memory: 1024, Card: card,
			MAC: fmt.Sprintf("52:54:00:00:00:%02x", i+1), Wire: wire,
		})
		if err != nil {
			return err
		}
		defer g.Close()
		hosts[i] = &host{Guest: g, t: t, ctx: ctx, card: card, address: fmt.Sprintf("10.0.0.%d", i+1)}
	}
	for _, h := range hosts {
		hello, err := h.call(vm.Request{Op: "hello"})
		if err != nil {
			return err
		}
		if len(hello.Failed) > 0 {
			return fmt.Errorf("guest %s: modules: %s", h.Name, strings.Join(hello.Failed, "; "))
		}
		h.iface, h.queues = hello.Interface, hello.Queues
		t.log("%s: Linux %s, %d CPUs, %s %s with %d queues", h.Name, hello.Kernel, hello.CPUs, hello.Driver, hello.Interface, hello.Queues)
	}
	a, b := hosts[0], hosts[1]
	for i, run := range spec.runs {
		if err := t.once(spec, run, a, b, i == 0); err != nil {
			for _, h := range hosts {
				h.diagnose()
			}
			return fmt.Errorf("%s: %w", run.name, err)
		}
	}
	for _, h := range hosts {
		if _, err := h.call(vm.Request{Op: "poweroff"}); err != nil {
			return err
		}
	}
	return nil
}

// call asks a guest, which must answer within two minutes.
func (h *host) call(req vm.Request) (*vm.Response, error) {
	ctx, cancel := context.WithTimeoutCause(h.ctx, 2*time.Minute, errors.New("two minutes have passed"))
	defer cancel()
	return h.Call(ctx, req)
}

// diagnose prints what a guest can tell about a failure.
func (h *host) diagnose() {
	print := func(what, text string) {
		fmt.Printf("--- %s of %s:\n%s\n", what, h.Name, strings.TrimSpace(text))
	}
	if resp, err := h.call(vm.Request{Op: "log"}); err == nil {
		print("log of the daemon", resp.Stderr)
		for _, command := range []string{"status", "stats", "flows"} {
			if resp, err := h.call(vm.Request{Op: "exec", Args: []string{vm.ProgramPath, command, "--control", control}}); err == nil {
				print(command, resp.Stdout+resp.Stderr)
			}
		}
	}
	if resp, err := h.call(vm.Request{Op: "counters", Interface: h.iface}); err == nil {
		var moved []string
		for name, n := range resp.Counters {
			if n != 0 {
				moved = append(moved, fmt.Sprintf("%s=%d", name, n))
			}
		}
		slices.Sort(moved)
		print("counters of the driver", strings.Join(moved, " "))
	}
	print("console", h.LastLines(10))
}

// both does the same on both hosts at the same time.
func both(a, b *host, do func(*host) error) error {
	second := make(chan error, 1)
	go func() { second <- do(b) }()
	return errors.Join(do(a), <-second)
}

// ask runs a command of the program and reads its JSON.
func (h *host) ask(into any, args ...string) error {
	resp, err := h.call(vm.Request{Op: "exec", Args: append(append([]string{vm.ProgramPath}, args...), "--json", "--control", control)})
	if err != nil {
		return err
	}
	if resp.Code != 0 {
		return fmt.Errorf("guest %s: tcpcrypt %s: exit code %d: %s", h.Name, args[0], resp.Code, strings.TrimSpace(resp.Stderr))
	}
	return json.Unmarshal([]byte(resp.Stdout), into)
}

// once is one start of the daemons, traffic, and their end.
func (t *tester) once(spec bedSpec, run runSpec, a, b *host, first bool) error {
	if err := both(a, b, func(h *host) error { return h.setUp(run, first) }); err != nil {
		return err
	}
	if err := both(a, b, (*host).startDaemon); err != nil {
		return err
	}
	t.log("%s, %s: both daemons are ready", spec.name, run.name)
	if _, err := b.call(vm.Request{Op: "listen", Address: ":" + port}); err != nil {
		return err
	}
	before, err := snapshots(a, b)
	if err != nil {
		return err
	}
	const connections = 16
	total, err := a.exchange(b, connections, 64<<10, false)
	if err != nil {
		return err
	}
	more, err := a.exchange(b, connections, 64<<10, true)
	if err != nil {
		return err
	}
	total += more
	t.log("%s, %s: %d connections, %d bytes are right", spec.name, run.name, connections, total)
	if run.flap {
		for _, flap := range []func(*host) error{(*host).unplug, (*host).downAndUp} {
			if err := flap(a); err != nil {
				return err
			}
			more, err := a.exchange(b, connections, 16<<10, true)
			if err != nil {
				return fmt.Errorf("after a link flap: %w", err)
			}
			total += more
		}
		t.log("%s, %s: the connections outlived two link flaps", spec.name, run.name)
	}
	if err := both(a, b, func(h *host) error { return h.checkFlows(connections) }); err != nil {
		return err
	}
	after, err := snapshots(a, b)
	if err != nil {
		return err
	}
	for i, h := range []*host{a, b} {
		r := h.row(spec, run, before[i], after[i])
		r.flows, r.bytes = connections, total
		t.rows = append(t.rows, r)
		for q, n := range r.packets {
			if n == 0 {
				return fmt.Errorf("guest %s: queue %d of %d carried nothing: %v", h.Name, q, r.queues, r.packets)
			}
		}
	}
	if _, err := a.call(vm.Request{Op: "close"}); err != nil {
		return err
	}
	return both(a, b, (*host).stopDaemon)
}

func (h *host) setUp(run runSpec, first bool) error {
	queues := run.queues
	if h.queues == 1 {
		queues = 0
	}
	_, err := h.call(vm.Request{Op: "net", Interface: h.iface, Queues: queues, MTU: run.mtu, Args: []string{h.address + "/24"}})
	if err != nil {
		return err
	}
	if !first {
		return nil
	}
	resp, err := h.call(vm.Request{Op: "exec", Args: []string{vm.ProgramPath, "doctor", h.iface}})
	if err != nil {
		return err
	}
	fmt.Fprintf(&h.t.doctor, "%s (%s), exit code %d:\n%s\n", h.Name, h.card, resp.Code, resp.Stdout)
	if resp.Code != 0 {
		return fmt.Errorf("guest %s: doctor: exit code %d: %s%s", h.Name, resp.Code, resp.Stdout, resp.Stderr)
	}
	return h.waitCarrier(true)
}

// startDaemon starts it and checks that it is what it was asked to be.
func (h *host) startDaemon() error {
	resp, err := h.call(vm.Request{Op: "start", Args: []string{"--interface", h.iface, "--mode", "zerocopy", "--control", control}})
	if err != nil {
		if resp != nil {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(resp.Stderr))
		}
		return err
	}
	sockets, err := h.call(vm.Request{Op: "sockets"})
	if err != nil {
		return err
	}
	var st fastpath.Status
	if err := h.ask(&st, "status"); err != nil {
		return err
	}
	if st.Mode != "zerocopy" || len(st.Queues) != len(sockets.Sockets) || len(st.Queues) == 0 {
		return fmt.Errorf("guest %s: mode %s, queues %+v, sockets %+v", h.Name, st.Mode, st.Queues, sockets.Sockets)
	}
	for i, s := range sockets.Sockets {
		if s.Queue != i || !s.ZeroCopy {
			return fmt.Errorf("guest %s: XDP_OPTIONS tell of no zero-copy on queue %d: %+v", h.Name, i, sockets.Sockets)
		}
	}
	return h.waitCarrier(true)
}

// exchange sends and receives over connections to the other host.
func (h *host) exchange(peer *host, connections, bytes int, again bool) (int64, error) {
	resp, err := h.call(vm.Request{Op: "open", Address: peer.address + ":" + port, Connections: connections, Bytes: bytes, Again: again})
	if err != nil {
		return 0, err
	}
	return resp.Bytes, nil
}

// unplug takes the cable out and puts it in again.
func (h *host) unplug() error {
	for _, up := range []bool{false, true} {
		if err := h.SetCarrier(up); err != nil {
			return err
		}
		if err := h.waitCarrier(up); err != nil {
			return err
		}
	}
	return nil
}

// downAndUp does what an administrator may do.
func (h *host) downAndUp() error {
	for _, up := range []bool{false, true} {
		if _, err := h.call(vm.Request{Op: "link", Interface: h.iface, Up: up}); err != nil {
			return err
		}
		if err := h.waitCarrier(up); err != nil {
			return err
		}
	}
	return nil
}

func (h *host) waitCarrier(up bool) error {
	_, err := h.call(vm.Request{Op: "carrier", Interface: h.iface, Up: up})
	return err
}

// checkFlows wants that many flows, all of them encrypted.
func (h *host) checkFlows(n int) error {
	var flows []fastpath.FlowInfo
	if err := h.ask(&flows, "flows"); err != nil {
		return err
	}
	encrypted := 0
	for _, f := range flows {
		if f.State == slowpath.StateEncrypted && f.SessionID != "" {
			encrypted++
		}
	}
	if encrypted != n {
		return fmt.Errorf("guest %s: %d encrypted flows, expected %d: %+v", h.Name, encrypted, n, flows)
	}
	return nil
}

// stopDaemon ends it and looks for what it left.
func (h *host) stopDaemon() error {
	resp, err := h.call(vm.Request{Op: "stop"})
	if err != nil {
		return err
	}
	if resp.Code != 0 {
		return fmt.Errorf("guest %s: the daemon ended with %d:\n%s", h.Name, resp.Code, resp.Stderr)
	}
	left, err := h.call(vm.Request{Op: "attached", Interface: h.iface})
	if err != nil {
		return err
	}
	if left.XDP || len(left.Bound) > 0 || !slices.Equal(left.Devices, []string{"lo", h.iface}) {
		return fmt.Errorf("guest %s: the daemon left XDP program %v, bound queues %v, devices %v", h.Name, left.XDP, left.Bound, left.Devices)
	}
	return nil
}

// snapshot is what the daemon and the driver count.
type snapshot struct {
	status fastpath.Status
	stats  fastpath.Stats
	driver map[string]uint64
}

func snapshots(hosts ...*host) (out []snapshot, err error) {
	for _, h := range hosts {
		var s snapshot
		if err := errors.Join(h.ask(&s.status, "status"), h.ask(&s.stats, "stats")); err != nil {
			return nil, err
		}
		resp, err := h.call(vm.Request{Op: "counters", Interface: h.iface})
		if err != nil {
			return nil, err
		}
		s.driver = resp.Counters
		out = append(out, s)
	}
	return out, nil
}

// row makes a row of the table of two snapshots.
func (h *host) row(spec bedSpec, run runSpec, before, after snapshot) row {
	r := row{
		bed: spec.name, guest: h.Name, card: string(h.card), run: run.name,
		queues: len(after.status.Queues), mode: after.status.Mode, workers: 1,
	}
	// One worker serves all queues: only their sum is known.
	r.packets = []uint64{after.stats.Counters["xsk_received"] - before.stats.Counters["xsk_received"]}
	return r
}
