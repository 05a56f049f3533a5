package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// WireRow is one figure of the Wire suite: two hosts in namespaces of this
// machine, joined by a veth, on the kernel's own TCP.
type WireRow struct {
	Variant   string  `json:"variant"` // plain, plain-nooffload, tcpcrypt
	Streams   int     `json:"streams"`
	Gbps      float64 `json:"gbps"`
	CPUPerGB  float64 `json:"cpu_s_per_gb"` // busy CPU seconds of the machine, both hosts together
	RTTp50    float64 `json:"rtt_p50_us"`
	RTTp99    float64 `json:"rtt_p99_us"`
	ConnPerS  float64 `json:"conn_per_s"` // connect, one byte each way, close; one after the other
	Connect50 float64 `json:"connect_p50_us"`
	Resumed   bool    `json:"resumed"`
}

// WireOptions size a Wire run.
type WireOptions struct {
	Binary  string        // the program
	Time    time.Duration // of each bulk transfer
	Streams int
	Rounds  int // rotations over the variants; medians are reported
	Log     func(string)
}

// Variants of the Wire suite, in the order in which each rotation runs them.
var wireVariants = []string{"plain", "plain-nooffload", "tcpcrypt"}

// Wire measures the variants in turn, several times, and returns the median of
// each figure.
func Wire(ctx context.Context, o WireOptions) ([]WireRow, error) {
	all := make(map[string][]WireRow)
	for round := range o.Rounds {
		for _, v := range wireVariants {
			r, err := wireOnce(ctx, o, v)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", v, err)
			}
			if o.Log != nil {
				o.Log(fmt.Sprintf("round %d/%d %-16s %6.2f Gb/s %6.3f CPU s/GB  rtt p50 %4.0f us  connect p50 %5.0f us", round+1, o.Rounds, v, r.Gbps, r.CPUPerGB, r.RTTp50, r.Connect50))
			}
			all[v] = append(all[v], r)
		}
	}
	var rows []WireRow
	for _, v := range wireVariants {
		m := WireRow{Variant: v, Streams: o.Streams}
		for _, f := range []func(*WireRow) *float64{
			func(r *WireRow) *float64 { return &r.Gbps }, func(r *WireRow) *float64 { return &r.CPUPerGB },
			func(r *WireRow) *float64 { return &r.RTTp50 }, func(r *WireRow) *float64 { return &r.RTTp99 },
			func(r *WireRow) *float64 { return &r.ConnPerS }, func(r *WireRow) *float64 { return &r.Connect50 },
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

func wireOnce(ctx context.Context, o WireOptions, variant string) (r WireRow, err error) {
	ctx, cancel := context.WithTimeout(ctx, o.Time+90*time.Second)
	defer cancel()
	l, err := lab.New()
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	p, err := l.Pair(lab.Options{Neighbours: true, NoOffload: variant == "plain-nooffload"})
	if err != nil {
		return r, err
	}
	if variant == "tcpcrypt" {
		for _, host := range []*lab.Iface{p.A, p.B} {
			d, err := daemon.Start(ctx, o.Binary, host, nil)
			if err != nil {
				return r, err
			}
			defer func() { err = errors.Join(err, d.Stop()) }()
		}
	}
	r = WireRow{Variant: variant, Streams: o.Streams}
	if err = bulk(ctx, p, o, &r); err != nil {
		return r, err
	}
	if err = roundTrips(ctx, p, 3000, &r); err != nil {
		return r, err
	}
	return r, connections(ctx, p, 300, &r)
}

// serve accepts connections on B and runs fn on each.
func serve(p *lab.Pair, fn func(net.Conn)) (net.Listener, error) {
	ln, err := p.B.NS.Listen("tcp", net.JoinHostPort(p.B.Addr4().String(), "0"))
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

func bulk(ctx context.Context, p *lab.Pair, o WireOptions, r *WireRow) error {
	var mu sync.Mutex
	var total int64
	var got sync.WaitGroup
	got.Add(o.Streams)
	ln, err := serve(p, func(c net.Conn) {
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
		c, err := p.A.NS.Dial(ctx, "tcp", ln.Addr().String())
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

func roundTrips(ctx context.Context, p *lab.Pair, n int, r *WireRow) error {
	ln, err := serve(p, func(c net.Conn) { _, _ = io.Copy(c, c) })
	if err != nil {
		return err
	}
	defer ln.Close()
	c, err := p.A.NS.Dial(ctx, "tcp", ln.Addr().String())
	if err != nil {
		return err
	}
	defer c.Close()
	var b [1]byte
	us := make([]float64, 0, n)
	for range n {
		t := time.Now()
		if _, err := c.Write(b[:]); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return err
		}
		us = append(us, float64(time.Since(t).Microseconds()))
	}
	sort.Float64s(us)
	r.RTTp50, r.RTTp99 = us[n/2], us[n*99/100]
	return nil
}

func connections(ctx context.Context, p *lab.Pair, n int, r *WireRow) error {
	ln, err := serve(p, func(c net.Conn) { _, _ = io.Copy(c, c) })
	if err != nil {
		return err
	}
	defer ln.Close()
	us := make([]float64, 0, n)
	begin := time.Now()
	var b [1]byte
	for range n {
		t := time.Now()
		c, err := p.A.NS.Dial(ctx, "tcp", ln.Addr().String())
		if err != nil {
			return err
		}
		if _, err = c.Write(b[:]); err == nil {
			_, err = io.ReadFull(c, b[:])
		}
		us = append(us, float64(time.Since(t).Microseconds()))
		if err = errors.Join(err, c.Close()); err != nil {
			return err
		}
	}
	r.ConnPerS = float64(n) / time.Since(begin).Seconds()
	sort.Float64s(us)
	r.Connect50 = us[n/2]
	return nil
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
