package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
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
	only   string // the part to run, if not all
	rows   []row
	doctor string
}

// row is a line of the table: one guest in one run of the daemon.
type row struct {
	guest, run string
	queues     int
	mode       string
	workers    int
	flows      int
	bytes      int64
	packets    []uint64 // received by each queue
	handed     uint64
	segments   string // of a gateway, by how their data got from card to card
}

func (t *tester) log(format string, args ...any) {
	fmt.Printf("%6.1fs  %s\n", time.Since(t.start).Seconds(), fmt.Sprintf(format, args...))
}

func (t *tester) print(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "GUEST, NIC\tRUN\tQUEUES\tMODE\tWORKERS\tFLOWS\tBYTES\tPACKETS BY QUEUE\tHANDED OVER\tIN PLACE, SMALL, COPIED")
	for _, r := range t.rows {
		fmt.Fprintf(tw, "%s\t%s\t%d\t%s\t%d\t%d\t%d\t%v\t%d\t%s\n", r.guest, r.run, r.queues, r.mode, r.workers, r.flows, r.bytes, r.packets, r.handed, r.segments)
	}
	_ = tw.Flush()
}

// runSpec is one start of the daemons.
type runSpec struct {
	name   string
	queues int // of a card that has several
	mtu    int
	flap   bool
	flags  []string // of the daemon
}

// sleepy workers leave the guests' CPUs, which are emulated by few real ones, to
// the rest of the guest while they have nothing to do.
var sleepy = []string{"--poll", "sleep"}

// runs are what is tried on an igb card with as many queues as its guest has
// CPUs, at the other end of the cable a virtio-net card with one.
var runs = []runSpec{
	{name: "1 queue", queues: 1, mtu: 1500, flags: sleepy, flap: true},
	{name: "2 queues", queues: 2, mtu: 1500, flags: sleepy},
	{name: "busy polling", queues: 2, mtu: 1500, flags: []string{"--poll", "sleep", "--busy-poll"}},
	{name: "4 queues", queues: 4, mtu: 1500, flags: sleepy, flap: true},
	{name: "MTU 3000", queues: 4, mtu: 3000, flags: sleepy},
}

const (
	perQueue    = 4 // connections for each queue that each host opens, and at least 8
	firstBytes  = 64 << 10
	repeatBytes = 16 << 10
	attempts    = 3 // of a run on a machine that is too busy
)

func (t *tester) run(ctx context.Context, cache, logs string) error {
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
	for _, bed := range []struct {
		name string
		run  func(*booter) error
	}{{"hosts", t.hosts}, {"gateway", t.gateway}, {"stacked", t.stacked}, {"others", t.others}} {
		if t.only == "" || t.only == bed.name {
			if err := bed.run(&booter{t, ctx, image, initrd, logs}); err != nil {
				return err
			}
		}
	}
	return nil
}

// booter starts guests.
type booter struct {
	t            *tester
	ctx          context.Context
	image        *vm.Image
	initrd, logs string
}

// boot starts a guest; hello waits until it is there.
func (b *booter) boot(number int, cpus int, nics ...vm.NIC) (*host, error) {
	h := &host{t: b.t, ctx: b.ctx, address: fmt.Sprintf("10.0.0.%d", number)}
	name := string(rune('a' + number - 1))
	for i := range nics {
		nics[i].MAC = fmt.Sprintf("52:54:00:00:%02x:%02x", number, i+1)
		if b.t.refuse {
			nics[i].Card = vm.VirtioPlain
		}
		name += "-" + string(nics[i].Card)
	}
	h.nics = len(nics)
	h.boot = func() (err error) {
		h.Guest, err = vm.Boot(b.ctx, b.image, vm.Options{Name: name, Initrd: b.initrd, Dir: b.logs, CPUs: cpus, Memory: 1024, NICs: nics})
		return err
	}
	return h, h.boot()
}

// hello waits for a guest's agent and learns what the guest is. On a busy machine
// the emulated kernel sometimes stands still before the agent runs: once it is
// booted anew.
func (h *host) hello() error {
	hello, err := h.call(vm.Request{Op: "hello", Cards: h.nics})
	if err != nil && !h.Greeted() {
		h.t.log("%s did not boot, once more: %v", h.Name, err)
		h.end()
		if err = h.boot(); err == nil {
			hello, err = h.call(vm.Request{Op: "hello", Cards: h.nics})
		}
	}
	if err != nil {
		return err
	}
	if len(hello.Failed) > 0 {
		return fmt.Errorf("guest %s: modules: %s", h.Name, strings.Join(hello.Failed, "; "))
	}
	h.iface, h.queues = hello.Cards[0].Interface, hello.Cards[0].Queues
	if h.nics > 1 {
		h.inner = hello.Cards[1].Interface
	}
	for _, c := range hello.Cards {
		h.t.log("%s: Linux %s, %d CPUs, %s %s with %d queues", h.Name, hello.Kernel, hello.CPUs, c.Driver, c.Interface, c.Queues)
	}
	return nil
}

// host is a guest and what the test knows of it.
type host struct {
	*vm.Guest
	t       *tester
	ctx     context.Context
	nics    int
	boot    func() error
	iface   string
	inner   string // the inner interface of a gateway
	address string
	queues  int // at the start
	now     int // in this run

	connections int // that each host opens in this run

	doctor string // what it said
}

// end ends the guest.
func (h *host) end() { _ = h.Guest.Close() }

// hosts boots two guests on one cable and carries out the runs.
func (t *tester) hosts(boots *booter) error {
	wireA, wireB, err := vm.Wire()
	if err != nil {
		return err
	}
	defer wireA.Close()
	defer wireB.Close()
	a, err := boots.boot(1, 4, vm.NIC{Card: vm.IGB, Wire: wireA})
	if err != nil {
		return err
	}
	defer a.end()
	b, err := boots.boot(2, 2, vm.NIC{Card: vm.Virtio, Wire: wireB})
	if err != nil {
		return err
	}
	defer b.end()
	for _, h := range []*host{a, b} {
		if err := h.hello(); err != nil {
			return err
		}
	}
	for i, run := range runs {
		first := i == 0
		err := t.repeat(run.name, func() error {
			defer func() { first = false }()
			return t.once(run, a, b, first)
		}, a, b)
		if err != nil {
			return err
		}
	}
	for _, h := range []*host{a, b} {
		t.doctor += h.doctor
		if _, err := h.call(vm.Request{Op: "poweroff"}); err != nil {
			return err
		}
	}
	return nil
}

// repeat carries out a run, again when daemons were not scheduled for so long
// that connections became plain, as they should then: the machine is too busy to
// emulate guests. Any other failure is one.
func (t *tester) repeat(name string, once func() error, hosts ...*host) error {
	for attempt := 1; ; attempt++ {
		err := once()
		if err == nil {
			return nil
		}
		if attempt == attempts || !starved(err, hosts) {
			for _, h := range hosts {
				h.diagnose()
			}
			return fmt.Errorf("%s: %w", name, err)
		}
		t.log("%s: a daemon was starved of CPU, once more: %v", name, err)
		for _, h := range hosts {
			if err := h.reset(); err != nil {
				return err
			}
		}
	}
}

// call asks a guest, which must answer within two minutes.
func (h *host) call(req vm.Request) (*vm.Response, error) {
	ctx, cancel := context.WithTimeoutCause(h.ctx, 2*time.Minute, errors.New("two minutes have passed"))
	defer cancel()
	return h.Call(ctx, req)
}

// notEncrypted is the failure that connections, whose bytes all arrived right,
// were plain.
type notEncrypted struct {
	missing int
	text    string
}

func (e *notEncrypted) Error() string { return e.text }

// starved reports whether an error says nothing but that connections were plain,
// and no more of them than there were SYNs that the BPF programs let pass because
// a daemon showed no life.
func starved(err error, hosts []*host) bool {
	missing := 0
	for _, e := range unjoin(err) {
		plain, ok := e.(*notEncrypted)
		if !ok {
			return false
		}
		missing = max(missing, plain.missing)
	}
	passed := uint64(0)
	for _, h := range hosts {
		var stats fastpath.Stats
		if h.ask(&stats, "stats") != nil {
			continue // a host without daemon
		}
		for _, name := range []string{"stale_syns", "bpf_xdp_syn_passed_stale", "bpf_egress_syn_passed_stale", "bpf_outer_syn_forwarded", "bpf_inner_syn_forwarded"} {
			passed += stats.Counters[name]
		}
	}
	return passed >= uint64(missing)
}

// unjoin returns the errors that errors.Join made one of.
func unjoin(err error) []error {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	var out []error
	for _, e := range joined.Unwrap() {
		out = append(out, unjoin(e)...)
	}
	return out
}

// reset ends what a failed run left behind.
func (h *host) reset() error {
	// There may be nothing to end.
	_, _ = h.call(vm.Request{Op: "kill"})
	_, _ = h.call(vm.Request{Op: "abort"})
	if _, err := h.call(vm.Request{Op: "spread", Queues: -1}); err != nil {
		return err
	}
	return h.cleanUp()
}

// cleanUp removes what a daemon has left.
func (h *host) cleanUp() error {
	args := []string{vm.ProgramPath, "run", "--interface", h.iface, "--cleanup"}
	if h.inner != "" {
		args = append(args, "--inner-interface", h.inner)
	}
	resp, err := h.call(vm.Request{Op: "exec", Args: args})
	if err == nil && resp.Code != 0 {
		err = fmt.Errorf("guest %s: %s", h.Name, resp.Stderr)
	}
	return err
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
func (t *tester) once(run runSpec, a, b *host, first bool) error {
	log := func(format string, args ...any) { t.log(run.name+": "+format, args...) }
	if err := both(a, b, func(h *host) error { return h.setUp(run, first) }); err != nil {
		return err
	}
	if err := both(a, b, func(h *host) error { return h.startDaemon(run.flags) }); err != nil {
		return err
	}
	log("both daemons are ready")
	if err := both(a, b, func(h *host) error {
		_, err := h.call(vm.Request{Op: "listen", Address: ":" + port})
		return err
	}); err != nil {
		return err
	}
	before, err := snapshots(a, b)
	if err != nil {
		return err
	}
	x := &exchange{a: a, b: b}
	if err := x.round(firstBytes, false); err != nil {
		return err
	}
	log("%d connections, %d bytes are right", 2*a.connections, x.bytes)
	if run.flap {
		for _, flap := range []func(*host) error{(*host).unplug, (*host).downAndUp} {
			if err := flap(a); err != nil {
				return err
			}
			if err := x.round(repeatBytes, true); err != nil {
				return fmt.Errorf("after a link flap: %w", err)
			}
		}
		log("the connections outlived two link flaps")
	}
	if a.now > 1 {
		if err := x.misdirected(); err != nil {
			return err
		}
		log("packets that came to other workers were handed over")
	}
	after, err := snapshots(a, b)
	if err != nil {
		return err
	}
	if err := both(a, b, (*host).checkFlows); err != nil {
		return err
	}
	for i, h := range []*host{a, b} {
		r := h.row(run, before[i], after[i])
		r.bytes = x.bytes
		t.rows = append(t.rows, r)
		if slices.Contains(r.packets, 0) {
			return fmt.Errorf("guest %s: one of its queues carried nothing: %v", h.Name, r.packets)
		}
	}
	if err := both(a, b, func(h *host) error {
		_, err := h.call(vm.Request{Op: "close"})
		return err
	}); err != nil {
		return err
	}
	return both(a, b, (*host).stopDaemon)
}

func (h *host) setUp(run runSpec, first bool) error {
	queues := run.queues
	h.connections = max(8, perQueue*queues)
	if h.now = queues; h.queues == 1 {
		queues, h.now = 0, 1
	}
	if first {
		if err := h.examine(run.mtu); err != nil {
			return err
		}
	}
	return h.configure(queues, run.mtu)
}

// configure gives the card its queues, 0: as they are, and the host its address.
func (h *host) configure(queues, mtu int) error {
	_, err := h.call(vm.Request{Op: "net", Interface: h.iface, Queues: queues, MTU: mtu, Args: []string{h.address + "/24"}})
	return err
}

// examine runs the doctor on the card as it is; nothing must fail.
func (h *host) examine(mtu int) error {
	if err := h.configure(0, mtu); err != nil {
		return err
	}
	resp, err := h.call(vm.Request{Op: "exec", Args: []string{vm.ProgramPath, "doctor", h.iface}})
	if err != nil {
		return err
	}
	h.doctor = fmt.Sprintf("%s, exit code %d:\n%s\n", h.Name, resp.Code, resp.Stdout)
	if resp.Code != 0 {
		return fmt.Errorf("guest %s: doctor: exit code %d: %s%s", h.Name, resp.Code, resp.Stdout, resp.Stderr)
	}
	if want := fmt.Sprintf("%d of %d queues (tried)", h.queues, h.queues); !h.t.refuse && !strings.Contains(resp.Stdout, want) {
		return fmt.Errorf("guest %s: doctor finds no zero-copy on %s: %s", h.Name, want, resp.Stdout)
	}
	return nil
}

// startDaemon starts it and checks that it is what it was asked to be.
func (h *host) startDaemon(flags []string) error {
	var cpus []string
	for cpu := range h.now {
		cpus = append(cpus, strconv.Itoa(cpu))
	}
	resp, err := h.call(vm.Request{Op: "start", Args: append([]string{
		"--interface", h.iface, "--mode", "zerocopy", "--cpus", strings.Join(cpus, ","), "--control", control,
	}, flags...)})
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
	if st.Guard != "active" {
		return fmt.Errorf("guest %s: the guard is not complete: %+v", h.Name, st.Layers)
	}
	if st.Mode != "zerocopy" || len(st.Queues) != h.now || len(sockets.Sockets) != h.now || len(st.Workers) != h.now {
		return fmt.Errorf("guest %s: mode %s, queues %+v, sockets %+v", h.Name, st.Mode, st.Queues, sockets.Sockets)
	}
	for i, s := range sockets.Sockets {
		if s.Queue != i || !s.ZeroCopy {
			return fmt.Errorf("guest %s: XDP_OPTIONS tell of no zero-copy on queue %d: %+v", h.Name, i, sockets.Sockets)
		}
	}
	if err := h.checkPinned(&st); err != nil {
		return err
	}
	return h.waitCarrier(true)
}

// checkPinned wants worker i on CPU i with queue i, and a thread there that may
// run nowhere else.
func (h *host) checkPinned(st *fastpath.Status) error {
	threads, err := h.call(vm.Request{Op: "threads"})
	if err != nil {
		return err
	}
	for i, w := range st.Workers {
		if w.Worker != i || w.CPU != i || !slices.Equal(w.Queues, []int{i}) || !slices.Contains(threads.Threads, vm.ThreadInfo{CPU: i}) {
			return fmt.Errorf("guest %s: worker %d is not pinned to CPU %d with queue %d: %+v, threads %+v", h.Name, i, i, i, st.Workers, threads.Threads)
		}
	}
	return nil
}

// exchange is the traffic of a run, in which both hosts open connections.
type exchange struct {
	a, b  *host
	bytes int64
}

// round sends bytes over each connection in both directions, and compares what
// arrives.
func (x *exchange) round(bytes int, again bool) error {
	var got [2]int64
	err := both(x.a, x.b, func(h *host) error {
		peer, mine := x.b, &got[0]
		if h == x.b {
			peer, mine = x.a, &got[1]
		}
		resp, err := h.call(vm.Request{Op: "open", Address: peer.address + ":" + port, Connections: h.connections, Bytes: bytes, Again: again})
		if err == nil {
			*mine = resp.Bytes
		}
		return err
	})
	x.bytes += got[0] + got[1]
	return err
}

// misdirected has the card with several queues deliver everything to the last
// one, so that the packets of most connections come to a worker that does not
// have them.
func (x *exchange) misdirected() error {
	before, err := snapshots(x.a)
	if err != nil {
		return err
	}
	last := x.a.now - 1
	if _, err := x.a.call(vm.Request{Op: "spread", Interface: x.a.iface, Queues: last}); err != nil {
		return err
	}
	if err := x.round(repeatBytes, true); err != nil {
		return fmt.Errorf("with all packets on queue %d: %w", last, err)
	}
	if _, err := x.a.call(vm.Request{Op: "spread", Interface: x.a.iface, Queues: -1}); err != nil {
		return err
	}
	after, err := snapshots(x.a)
	if err != nil {
		return err
	}
	if r := x.a.row(runSpec{}, before[0], after[0]); r.handed == 0 || slices.Max(r.packets[:last]) > r.packets[last] {
		return fmt.Errorf("guest %s: all packets were to come on queue %d and to be handed over: %v, %d handed over", x.a.Name, last, r.packets, r.handed)
	}
	return nil
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

// checkFlows wants all connections encrypted, and every worker to have some.
func (h *host) checkFlows() error {
	workers, err := h.encrypted()
	if err == nil && slices.Contains(workers, 0) {
		err = fmt.Errorf("guest %s: a worker has no connection: %v", h.Name, workers)
	}
	return err
}

// encrypted wants all connections encrypted, and tells how many each worker has.
func (h *host) encrypted() (workers []int, err error) {
	var flows []fastpath.FlowInfo
	if err := h.ask(&flows, "flows"); err != nil {
		return nil, err
	}
	workers = make([]int, h.now)
	encrypted := 0
	for _, f := range flows {
		if f.State == slowpath.StateEncrypted && f.SessionID != "" && f.Worker < len(workers) {
			encrypted++
			workers[f.Worker]++
		}
	}
	if missing := 2*h.connections - encrypted; missing != 0 {
		return nil, &notEncrypted{missing, fmt.Sprintf("guest %s: %d of %d connections are encrypted, by worker %v", h.Name, encrypted, 2*h.connections, workers)}
	}
	return workers, nil
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

// snapshot is what a daemon tells of itself.
type snapshot struct{ status fastpath.Status }

func snapshots(hosts ...*host) ([]snapshot, error) {
	out := make([]snapshot, len(hosts))
	for i, h := range hosts {
		if err := h.ask(&out[i].status, "status"); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// row makes a row of the table of two snapshots.
func (h *host) row(run runSpec, before, after snapshot) row {
	r := row{
		guest: h.Name, run: run.name, queues: len(after.status.Queues), mode: after.status.Mode,
		workers: len(after.status.Workers), flows: after.status.Flows,
	}
	for q, st := range after.status.Queues {
		r.packets = append(r.packets, st.Received-before.status.Queues[q].Received)
		r.handed += st.HandedOver - before.status.Queues[q].HandedOver
	}
	return r
}
