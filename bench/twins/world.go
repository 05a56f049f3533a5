package main

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// sysctls of net.ipv4 and the values that a host may have. A kernel may lack some.
var sysctls = map[string][]string{
	"ip_default_ttl":                {"64", "255", "5"},
	"ip_no_pmtu_disc":               {"0", "1", "2", "3"},
	"tcp_abort_on_overflow":         {"0", "1"},
	"tcp_adv_win_scale":             {"-2", "1", "4"},
	"tcp_app_win":                   {"0", "1", "31"},
	"tcp_autocorking":               {"0", "1"},
	"tcp_backlog_ack_defer":         {"0", "1"},
	"tcp_base_mss":                  {"512", "1024", "1400"},
	"tcp_challenge_ack_limit":       {"1", "1000"},
	"tcp_comp_sack_delay_ns":        {"0", "1000000", "5000000"},
	"tcp_comp_sack_nr":              {"0", "1", "44", "200"},
	"tcp_congestion_control":        {"reno", "cubic", "bbr"},
	"tcp_dsack":                     {"0", "1"},
	"tcp_early_retrans":             {"0", "3", "4"},
	"tcp_ecn":                       {"0", "1", "2"},
	"tcp_fin_timeout":               {"1", "60"},
	"tcp_frto":                      {"0", "2"},
	"tcp_invalid_ratelimit":         {"0", "500"},
	"tcp_keepalive_intvl":           {"1"},
	"tcp_keepalive_time":            {"1"},
	"tcp_limit_output_bytes":        {"5000", "65536", "4194304"},
	"tcp_min_snd_mss":               {"48", "500"},
	"tcp_min_tso_segs":              {"1", "2", "16"},
	"tcp_moderate_rcvbuf":           {"0", "1"},
	"tcp_mtu_probing":               {"0", "1", "2"},
	"tcp_no_metrics_save":           {"0", "1"},
	"tcp_notsent_lowat":             {"1", "10000", "4294967295"},
	"tcp_pacing_ca_ratio":           {"100", "200"},
	"tcp_pacing_ss_ratio":           {"100", "200", "1000"},
	"tcp_pingpong_thresh":           {"1", "3", "8"},
	"tcp_recovery":                  {"0", "1", "2", "4"},
	"tcp_reflect_tos":               {"0", "1"},
	"tcp_reordering":                {"3", "30"},
	"tcp_retrans_collapse":          {"0", "1"},
	"tcp_rfc1337":                   {"0", "1"},
	"tcp_rmem":                      {"4096 8192 16384", "4096 16384 65536", "4096 131072 6291456", "4096 1000000 16000000"},
	"tcp_rto_max_ms":                {"1000", "120000"},
	"tcp_rto_min_us":                {"5000", "50000", "200000"},
	"tcp_sack":                      {"0", "1"},
	"tcp_shrink_window":             {"0", "1"},
	"tcp_slow_start_after_idle":     {"0", "1"},
	"tcp_stdurg":                    {"0", "1"},
	"tcp_syn_linear_timeouts":       {"0", "4"},
	"tcp_syncookies":                {"0", "1", "2"},
	"tcp_thin_linear_timeouts":      {"0", "1"},
	"tcp_timestamps":                {"0", "1", "2"},
	"tcp_tso_rtt_log":               {"0", "9"},
	"tcp_tso_win_divisor":           {"0", "3"},
	"tcp_tw_reuse":                  {"0", "1", "2"},
	"tcp_window_scaling":            {"0", "1"},
	"tcp_wmem":                      {"4096 4096 8192", "4096 8192 65536", "4096 16384 4194304", "4096 1000000 8000000"},
	"tcp_workaround_signed_windows": {"0", "1"},
}

// world is what two pairs of hosts have in common.
type world struct {
	seed      uint64
	sysctls   [2]map[string]string // of hosts a and b
	off       [2][]lab.Feature     // offloads that are switched off
	noOffload bool                 // all of them
	wire      [2]lab.Impair        // from a to b and back
	mtu       int
	queues    int
	alternate bool // a flow arrives on two queues
	flags     []string
	options   bool // sockets have options
	restless  bool // hosts are changed while connections are in use, which are longer
}

func newWorld(seed uint64) *world {
	rng := rand.New(rand.NewPCG(seed, 0))
	w := &world{
		seed: seed,
		mtu:  pick(rng, 1500, 1500, 1500, 1280, 9000), queues: pick(rng, 1, 1, 1, 2, 4),
		alternate: rng.IntN(2) == 0, options: rng.IntN(3) > 0, restless: rng.IntN(3) == 0,
		flags: pick(rng, nil, nil, []string{"--mode", "generic"}, []string{"--guard", "off"}, []string{"--rekey-bytes", "20000"},
			[]string{"--no-resume"}, []string{"--poll", "busy"}, []string{"--tcp-keepalive"}),
	}
	names := slices.Sorted(maps.Keys(sysctls))
	for i := range w.sysctls {
		w.sysctls[i] = make(map[string]string)
		for range rng.IntN(9) {
			name := pick(rng, names...)
			w.sysctls[i][name] = pick(rng, sysctls[name]...)
		}
		for _, f := range []lab.Feature{lab.TxChecksum, lab.TSO, lab.GSO, lab.GRO} {
			if rng.IntN(6) == 0 {
				w.off[i] = append(w.off[i], f)
			}
		}
		if rng.IntN(3) > 0 {
			w.wire[i] = impair(rng)
			// A super-segment is one packet to the wire: with offloads a plain
			// host meets a fraction of the losses.
			w.noOffload = true
		}
	}
	w.noOffload = w.noOffload || rng.IntN(2) == 0
	return w
}

func impair(rng *rand.Rand) (im lab.Impair) {
	for _, e := range []struct {
		of   int
		set  *float64
		most float64
	}{{2, &im.Drop, 0.02}, {4, &im.Reorder, 0.1}, {4, &im.Duplicate, 0.1}, {4, &im.Cut, 0.3}, {4, &im.Coalesce, 0.3}, {5, &im.Corrupt, 0.01}} {
		if rng.IntN(e.of) == 0 {
			*e.set = e.most * rng.Float64()
		}
	}
	if rng.IntN(3) == 0 {
		im.Delay = time.Duration(rng.Int64N(int64(10 * time.Millisecond)))
	}
	return im
}

func pick[T any](rng *rand.Rand, of ...T) T { return of[rng.IntN(len(of))] }

func (w *world) String() string {
	s := fmt.Sprintf("world %d: MTU %d, %d queues", w.seed, w.mtu, w.queues)
	if w.alternate && w.queues > 1 {
		s += " in turn"
	}
	if w.noOffload {
		s += ", no offloads"
	}
	for i, name := range []string{"a", "b"} {
		s += fmt.Sprintf("; %s: %v off %v, sends over %+v", name, w.sysctls[i], w.off[i], w.wire[i])
	}
	if w.restless {
		s += "; restless"
	}
	return s + fmt.Sprintf("; flags %q", w.flags)
}

// pair is two hosts of a world.
type pair struct {
	lab     *lab.Lab
	hosts   [2]*lab.Iface
	daemons [2]*daemon.Daemon // nil: none
}

// build makes a pair of hosts, and starts the daemon on both unless binary is "".
func (w *world) build(ctx context.Context, binary string) (p *pair, err error) {
	l, err := lab.New()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			l.Close()
		}
	}()
	path, err := l.Middle(lab.Options{MTU: w.mtu, Queues: w.queues, NoOffload: w.noOffload, Neighbours: true})
	if err != nil {
		return nil, err
	}
	fwd, err := path.Forward(lab.ForwarderOptions{Seed: w.seed})
	if err != nil {
		return nil, err
	}
	p = &pair{lab: l, hosts: [2]*lab.Iface{path.A, path.B}}
	for i, h := range p.hosts {
		for name, value := range w.sysctls[i] {
			// What this kernel does not know or take, neither pair has.
			_ = h.NS.Sysctl("net/ipv4/"+name, value)
		}
		for _, dir := range []string{"all", h.Name} {
			if err := h.NS.Sysctl("net/ipv6/conf/"+dir+"/keep_addr_on_down", "1"); err != nil {
				return nil, err
			}
		}
		for _, f := range w.off[i] {
			if err := h.SetFeature(f, false); err != nil {
				return nil, err
			}
		}
	}
	if w.queues > 1 && w.alternate {
		for _, m := range []*lab.Iface{path.MidA, path.MidB} {
			if _, err := m.AlternateQueues(4); err != nil {
				return nil, err
			}
		}
	}
	if binary != "" {
		for i, h := range p.hosts {
			if p.daemons[i], err = daemon.Start(ctx, binary, h, nil, w.flags...); err != nil {
				return nil, err
			}
		}
	}
	fwd.Set(lab.AtoB, w.wire[0])
	fwd.Set(lab.BtoA, w.wire[1])
	return p, nil
}
