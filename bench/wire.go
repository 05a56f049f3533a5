package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// WireRow is one figure of the Wire suite: two hosts in namespaces of this
// machine, joined by a veth, on the kernel's own TCP.
type WireRow struct {
	Variant   string  `json:"variant"` // see wireVariants; of the Peers suite also those of peers
	Streams   int     `json:"streams"`
	Gbps      float64 `json:"gbps"`
	CPUPerGB  float64 `json:"cpu_s_per_gb"` // busy CPU seconds of the machine, both hosts and what is between them together
	RTTp50    float64 `json:"rtt_p50_us"`
	RTTp99    float64 `json:"rtt_p99_us"`
	ConnPerS  float64 `json:"conn_per_s"`         // connect, one byte each way, close; one after the other
	Connect50 float64 `json:"connect_p50_us"`     // connect to first byte
	Connect1m float64 `json:"connect_1ms_p50_us"` // the same over a path with a round trip of 1 ms
	Resumed   bool    `json:"resumed"`            // these connections resumed a session
}

// WireOptions size a Wire run.
type WireOptions struct {
	Binary  string        // the program
	Time    time.Duration // of each bulk transfer
	Streams int
	Rounds  int // rotations over the variants; medians are reported
	Log     func(string)
}

// wireVariant is a kind of hosts; see wireVariants.
type wireVariant struct {
	name      string
	noOffload bool
	xdp       bool // each host's interface has an XDP program that lets everything pass
	daemons   bool
	beside    bool // the daemons leave the connections of the suite alone
	resume    bool
	between   bool // the daemons are gateways before the hosts; without daemons there are bridges
	// over, if not nil, is how connections are made instead of plainly.
	over *peerKind
}

// wireVariants of the Wire suite, in the order in which each rotation runs them.
// Native XDP alone, whatever the program, turns segmentation offload of a veth
// off: plain-xdp is what plain-beside, connections that pass by the daemons, are
// to be held against.
var wireVariants = []wireVariant{
	{name: "plain"},
	{name: "plain-nooffload", noOffload: true},
	{name: "plain-xdp", xdp: true},
	{name: "plain-beside", daemons: true, beside: true},
	{name: "tcpcrypt", daemons: true},
	{name: "tcpcrypt", daemons: true, resume: true},
}

// gatewayVariants of the Wire suite: hosts without the daemon behind a bridge of
// the kernel each, and behind a gateway.
var gatewayVariants = []wireVariant{
	{name: "bridge", between: true},
	{name: "gateway", between: true, daemons: true},
}

const (
	farRTT         = time.Millisecond
	connectsNear   = 300
	connectsFar    = 100
	roundTripsNear = 3000
)

// Wire measures plain TCP and the program in turn, several times, and returns the
// median of each figure.
func Wire(ctx context.Context, o WireOptions) ([]WireRow, error) {
	return rotate(ctx, o, slices.Concat(wireVariants, gatewayVariants))
}

// rotate measures the variants in turn, o.Rounds times.
func rotate(ctx context.Context, o WireOptions, variants []wireVariant) ([]WireRow, error) {
	all := make(map[wireVariant][]WireRow)
	for round := range o.Rounds {
		for _, v := range variants {
			r, err := wireOnce(ctx, o, v)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", v.name, err)
			}
			if o.Log != nil {
				o.Log(fmt.Sprintf("round %d/%d %-16s resumed %-5t %6.2f Gb/s %6.3f CPU s/GB  rtt p50 %4.0f us  connect p50 %5.0f us, at 1 ms %5.0f us",
					round+1, o.Rounds, v.name, r.Resumed, r.Gbps, r.CPUPerGB, r.RTTp50, r.Connect50, r.Connect1m))
			}
			all[v] = append(all[v], r)
		}
	}
	var rows []WireRow
	for _, v := range variants {
		m := all[v][0]
		for _, f := range []func(*WireRow) *float64{
			func(r *WireRow) *float64 { return &r.Gbps }, func(r *WireRow) *float64 { return &r.CPUPerGB },
			func(r *WireRow) *float64 { return &r.RTTp50 }, func(r *WireRow) *float64 { return &r.RTTp99 },
			func(r *WireRow) *float64 { return &r.ConnPerS }, func(r *WireRow) *float64 { return &r.Connect50 },
			func(r *WireRow) *float64 { return &r.Connect1m },
		} {
			var xs []float64
			for i := range all[v] {
				xs = append(xs, *f(&all[v][i]))
			}
			sort.Float64s(xs)
			*f(&m) = xs[len(xs)/2]
		}
		rows = append(rows, m)
	}
	return rows, nil
}

// wireOnce measures a variant: everything between neighbours, and connections
// once more over a longer path.
func wireOnce(ctx context.Context, o WireOptions, v wireVariant) (r WireRow, err error) {
	ctx, cancel := context.WithTimeout(ctx, o.Time+90*time.Second)
	defer cancel()
	r = WireRow{Variant: v.name, Streams: o.Streams}
	err = v.onHosts(ctx, o.Binary, &r, func(l *lab.Lab, opts lab.Options) (ends [2]*lab.Iface, err error) {
		p, err := l.Pair(opts)
		if err != nil {
			return ends, err
		}
		return [2]*lab.Iface{p.A, p.B}, nil
	}, func(via transport) (conns, fresh int, err error) {
		if err := bulk(ctx, via, o, &r); err != nil {
			return 0, 0, err
		}
		if err := roundTrips(ctx, via, roundTripsNear, &r); err != nil {
			return 0, 0, err
		}
		r.Connect50, r.ConnPerS, err = connections(ctx, via, connectsNear)
		return o.Streams + 1 + connectsNear, o.Streams + 2, err
	})
	if err != nil {
		return r, err
	}
	return r, v.onHosts(ctx, o.Binary, &r, func(l *lab.Lab, opts lab.Options) (ends [2]*lab.Iface, err error) {
		p, err := l.Middle(opts)
		if err != nil {
			return ends, err
		}
		// What XDP forwards a veth takes only with NAPI at its far end.
		if err := errors.Join(p.MidA.SetFeature(lab.GRO, v.between), p.MidB.SetFeature(lab.GRO, v.between)); err != nil {
			return ends, err
		}
		half := lab.Impair{Delay: farRTT / 2}
		_, err = p.Forward(lab.ForwarderOptions{AtoB: half, BtoA: half})
		return [2]*lab.Iface{p.A, p.B}, err
	}, func(via transport) (conns, fresh int, err error) {
		r.Connect1m, _, err = connections(ctx, via, connectsFar)
		return connectsFar, 1, err
	})
}

// onHosts makes two hosts on the ends of a path with the variant's daemons, runs
// fn between them and checks that its connections, whose number fn returns, were
// what the variant says. The first ones to a server, and those at the same time as
// the first, are not resumed: fn returns how many these are at most.
func (v *wireVariant) onHosts(ctx context.Context, binary string, r *WireRow,
	path func(*lab.Lab, lab.Options) ([2]*lab.Iface, error), fn func(transport) (conns, fresh int, err error)) (err error) {
	l, err := lab.New()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	opts := lab.Options{Neighbours: true, NoOffload: v.noOffload}
	if v.between {
		bare := lab.EndOptions{NoAddress: true}
		opts = lab.Options{A: bare, B: bare}
	}
	ends, err := path(l, opts)
	if err != nil {
		return err
	}
	hosts := ends
	var sites [2]lab.Site
	if v.between {
		if sites, err = l.Behind(ends, 1); err != nil {
			return err
		}
		hosts = [2]*lab.Iface{sites[0].Host, sites[1].Host}
	}
	var first *daemon.Daemon
	for i := range ends {
		if v.xdp {
			detach, e := passAll(ends[i])
			if e != nil {
				return e
			}
			defer func() { err = errors.Join(err, detach()) }()
		}
		if !v.daemons {
			if v.between {
				err = errors.Join(err, ends[i].NS.Bridge("br0", sites[i].Outer, sites[i].Inner))
			}
			continue
		}
		var flags []string
		if !v.resume {
			flags = []string{"--no-resume"}
		}
		if v.between {
			flags = append(flags, "--inner-interface", sites[i].Inner.Name)
		}
		if v.beside {
			flags = append(flags, "--ports", "1") // no connection of the suite has it
		}
		d, e := daemon.Start(ctx, binary, ends[i], nil, flags...)
		if e != nil {
			return e
		}
		defer func() { err = errors.Join(err, d.Stop()) }()
		if first == nil {
			first = d
		}
	}
	if err != nil {
		return err
	}
	a, b := hosts[0], hosts[1]
	via := overTCP(a, b)
	if v.over != nil {
		if via, err = v.over.open(ctx, a, b); err != nil {
			return err
		}
	}
	n, fresh, err := fn(via)
	if err != nil || first == nil {
		return err
	}
	st, err := first.Stats(ctx)
	if err != nil {
		return err
	}
	encrypted, resumed := st.Counters["slowpath_encrypted"], st.Counters["slowpath_resumed"]
	r.Resumed = resumed > 0
	if v.beside {
		n = 0
	}
	if encrypted != uint64(n) || v.resume && resumed+uint64(fresh) < uint64(n) || !v.resume && resumed > 0 {
		return fmt.Errorf("of %d connections %d were encrypted and %d resumed", n, encrypted, resumed)
	}
	return nil
}

// passAll attaches an XDP program to a host's interface that does nothing.
func passAll(host *lab.Iface) (detach func() error, err error) {
	const xdpPass = 2
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.XDP,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, xdpPass), asm.Return()}, License: "Dual MIT/GPL",
	})
	if err != nil {
		return nil, err
	}
	defer p.Close()
	var l link.Link
	err = host.NS.Do(func() error {
		i, err := net.InterfaceByName(host.Name)
		if err != nil {
			return err
		}
		l, err = link.AttachXDP(link.XDPOptions{Program: p, Interface: i.Index, Flags: link.XDPDriverMode})
		return err
	})
	if err != nil {
		return nil, err
	}
	return l.Close, nil
}

// transport is how applications on two hosts reach each other.
type transport struct {
	client *lab.Namespace // where dial must be called
	listen func() (net.Listener, error)
	// dial connects to ln, which listen returned. It does what a client has to
	// do until it may write.
	dial func(ctx context.Context, ln net.Listener) (net.Conn, error)
}

// overTCP is TCP from a to b.
func overTCP(a, b *lab.Iface) transport {
	return tcpTo(a.NS, b.NS, b.Addr4())
}

// tcpTo is TCP from one host to an address of another.
func tcpTo(client, server *lab.Namespace, addr netip.Addr) transport {
	return transport{
		client: client,
		listen: func() (net.Listener, error) {
			return server.Listen("tcp", net.JoinHostPort(addr.String(), "0"))
		},
		dial: func(ctx context.Context, ln net.Listener) (net.Conn, error) {
			var d net.Dialer
			d.SetMultipathTCP(false)
			return d.DialContext(ctx, "tcp", ln.Addr().String())
		},
	}
}

// connect dials from the client's host.
func (v *transport) connect(ctx context.Context, ln net.Listener) (c net.Conn, err error) {
	err = v.client.Do(func() error {
		c, err = v.dial(ctx, ln)
		return err
	})
	return c, err
}

// serve accepts connections on the server's host and runs fn on each.
func (v *transport) serve(fn func(net.Conn)) (net.Listener, error) {
	ln, err := v.listen()
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				fn(c)
			}()
		}
	}()
	return ln, nil
}

func bulk(ctx context.Context, via transport, o WireOptions, r *WireRow) error {
	var mu sync.Mutex
	var total int64
	var got sync.WaitGroup
	got.Add(o.Streams)
	ln, err := via.serve(func(c net.Conn) {
		defer got.Done()
		buf := make([]byte, 1<<20)
		for {
			n, err := c.Read(buf)
			mu.Lock()
			total += int64(n)
			mu.Unlock()
			if err != nil {
				return
			}
		}
	})
	if err != nil {
		return err
	}
	defer ln.Close()
	var conns []net.Conn
	for range o.Streams {
		c, err := via.connect(ctx, ln)
		if err != nil {
			return err
		}
		defer c.Close()
		conns = append(conns, c)
	}
	busy, begin := cpuBusy(), time.Now()
	errs := make(chan error, len(conns))
	for _, c := range conns {
		go func() {
			buf := make([]byte, 1<<20)
			for time.Since(begin) < o.Time {
				if _, err := c.Write(buf); err != nil {
					errs <- err
					return
				}
			}
			errs <- c.Close()
		}()
	}
	for range conns {
		err = errors.Join(err, <-errs)
	}
	if err != nil {
		return err
	}
	got.Wait()
	took := time.Since(begin).Seconds()
	r.Gbps = float64(total) * 8 / took / 1e9
	r.CPUPerGB = (cpuBusy() - busy) / (float64(total) / 1e9)
	return nil
}

func roundTrips(ctx context.Context, via transport, n int, r *WireRow) error {
	ln, err := via.serve(func(c net.Conn) { _, _ = io.Copy(c, c) })
	if err != nil {
		return err
	}
	defer ln.Close()
	c, err := via.connect(ctx, ln)
	if err != nil {
		return err
	}
	defer c.Close()
	var one [1]byte
	us := make([]float64, 0, n)
	for range n {
		t := time.Now()
		if _, err := c.Write(one[:]); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, one[:]); err != nil {
			return err
		}
		us = append(us, float64(time.Since(t).Microseconds()))
	}
	sort.Float64s(us)
	r.RTTp50, r.RTTp99 = us[n/2], us[n*99/100]
	return nil
}

// connections opens n connections one after the other, and returns the median
// of the microseconds from connect to the first byte of the answer, and how many
// were opened and closed in a second.
func connections(ctx context.Context, via transport, n int) (p50, perSecond float64, err error) {
	ln, err := via.serve(func(c net.Conn) { _, _ = io.Copy(c, c) })
	if err != nil {
		return 0, 0, err
	}
	defer ln.Close()
	us := make([]float64, 0, n)
	begin := time.Now()
	var one [1]byte
	// Inside, so that the way into the namespace is not measured.
	err = via.client.Do(func() error {
		for range n {
			t := time.Now()
			c, err := via.dial(ctx, ln)
			if err != nil {
				return err
			}
			if _, err = c.Write(one[:]); err == nil {
				_, err = io.ReadFull(c, one[:])
			}
			us = append(us, float64(time.Since(t).Microseconds()))
			if err = errors.Join(err, c.Close()); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return 0, 0, err
	}
	perSecond = float64(n) / time.Since(begin).Seconds()
	sort.Float64s(us)
	return us[n/2], perSecond, nil
}

// cpuBusy returns the seconds that all CPUs of the machine were not idle.
func cpuBusy() float64 {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := strings.Cut(string(b), "\n")
	var ticks float64
	for i, f := range strings.Fields(line)[1:] {
		v, err := strconv.ParseFloat(f, 64)
		// Fields 3 and 4 are idle and iowait, 8 and 9 are contained in others.
		if err == nil && i != 3 && i != 4 && i < 8 {
			ticks += v
		}
	}
	return ticks / 100
}
