package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// metricsAddr is in each host's own network namespace.
const metricsAddr = "127.0.0.1:9433"

// outage is a time in which the daemon of a host was gone. A connection that it
// overlaps may be reset, or plain.
type outage struct {
	what       string
	begin, end time.Time // end is zero while it lasts
}

// host is one side: its daemon, which comes and goes, and what happened to it.
type host struct {
	name   string
	iface  *lab.Iface
	binary string
	flags  []string
	log    func(format string, args ...any)

	mu      sync.Mutex
	d       *daemon.Daemon // nil while none runs
	outages []outage
	reasons map[string]uint64 // of all daemons that were stopped orderly
}

func (h *host) start(ctx context.Context) error {
	d, err := daemon.Start(ctx, h.binary, h.iface, h.warning, append([]string{"--metrics", metricsAddr}, h.flags...)...)
	if err != nil {
		return err
	}
	h.mu.Lock()
	h.d = d
	h.mu.Unlock()
	return nil
}

// warning logs what a daemon warns of.
func (h *host) warning(line string) {
	if !strings.Contains(line, "level=INFO") {
		h.log("%s says: %s", h.name, line)
	}
}

// daemon returns the running daemon, or nil.
func (h *host) daemon() *daemon.Daemon {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.d
}

func (h *host) begin(what string) {
	h.log("%s", what)
	h.mu.Lock()
	h.outages = append(h.outages, outage{what: what, begin: time.Now()})
	h.mu.Unlock()
}

func (h *host) over() {
	h.mu.Lock()
	h.outages[len(h.outages)-1].end = time.Now()
	h.mu.Unlock()
}

// aftermath is how long the end of an outage can still be the reason of an error:
// until a keep-alive or a retransmission has found out that the peer is gone.
const aftermath = 60 * time.Second

// disturbed returns the outage that a connection between two times met, or "".
func (h *host) disturbed(from, to time.Time) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, o := range h.outages {
		if o.begin.Before(to) && (o.end.IsZero() || o.end.Add(aftermath).After(from)) {
			return o.what
		}
	}
	return ""
}

// keepReasons adds up what a daemon says of its connections before it is stopped.
func (h *host) keepReasons(ctx context.Context, d *daemon.Daemon) {
	st, err := d.Stats(ctx)
	if err != nil {
		h.log("%s: stats: %v", h.name, err)
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for r, n := range st.Reasons {
		h.reasons[r] += n
	}
}

func (h *host) restart(ctx context.Context, pause time.Duration) error {
	d := h.daemon()
	h.keepReasons(ctx, d)
	h.begin("restart of " + h.name)
	defer h.over()
	if err := d.Stop(); err != nil {
		return fmt.Errorf("the daemon of %s did not stop well: %w\n%s", h.name, err, tail(d.Logs()))
	}
	h.mu.Lock()
	h.d = nil
	h.mu.Unlock()
	time.Sleep(pause)
	return h.start(ctx)
}

func (h *host) kill(ctx context.Context, pause time.Duration) error {
	d := h.daemon()
	h.keepReasons(ctx, d)
	h.begin("kill of " + h.name)
	defer h.over()
	// How it ended is known.
	_ = d.Kill()
	h.mu.Lock()
	h.d = nil
	h.mu.Unlock()
	time.Sleep(pause)
	return h.start(ctx)
}

// hang stops the daemon for a while. That is no outage: connections wait for it.
func (h *host) hang(pause time.Duration) error {
	h.log("hang of %s for %v", h.name, pause.Round(time.Millisecond))
	d := h.daemon()
	if err := d.Process.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	time.Sleep(pause)
	return d.Process.Signal(syscall.SIGCONT)
}

// reason looks for what the daemon says of a connection that ended.
func (h *host) reason(ctx context.Context, local, remote string) string {
	d := h.daemon()
	if d == nil {
		return ""
	}
	fs, err := d.Flows(ctx)
	if err != nil {
		return ""
	}
	for _, f := range fs {
		if f.Local == local && f.Remote == remote && f.State == slowpath.StateFailed {
			return f.Reason
		}
	}
	return ""
}

// sample is what a daemon uses.
type sample struct {
	goroutines, fds int
	rss, heap       int64
	flows           int
}

func (h *host) sample(ctx context.Context) (s sample, err error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
			return h.iface.NS.Dial(ctx, network, addr)
		},
	}}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+metricsAddr+"/metrics", nil)
	if err != nil {
		return s, err
	}
	res, err := client.Do(req)
	if err != nil {
		return s, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return s, errors.New(res.Status)
	}
	sc := bufio.NewScanner(io.LimitReader(res.Body, 1<<20))
	for sc.Scan() {
		name, text, _ := strings.Cut(sc.Text(), " ")
		v, err := strconv.ParseFloat(text, 64)
		if err != nil {
			continue
		}
		switch name {
		case "go_goroutines":
			s.goroutines = int(v)
		case "process_open_fds":
			s.fds = int(v)
		case "process_resident_memory_bytes":
			s.rss = int64(v)
		case "go_memstats_heap_inuse_bytes":
			s.heap = int64(v)
		case "tcpcrypt_flows":
			s.flows = int(v)
		}
	}
	return s, sc.Err()
}

// tail is the end of a log.
func tail(s string) string {
	const most = 4000
	if len(s) > most {
		return "..." + s[len(s)-most:]
	}
	return s
}
