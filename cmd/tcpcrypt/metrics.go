package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metricsServer answers GET /metrics. The zero value serves nothing.
type metricsServer struct {
	ln   net.Listener
	srv  *http.Server
	log  *slog.Logger
	done sync.WaitGroup
}

// listenMetrics takes the address, so that one that cannot be had is an error
// before anything is attached. An empty address means no metrics.
func listenMetrics(addr string, log *slog.Logger) (*metricsServer, error) {
	if addr == "" {
		return &metricsServer{}, nil
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	return &metricsServer{ln: ln, log: log}, nil
}

func (m *metricsServer) serve(h host) {
	if m.ln == nil {
		return
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		hostCollector{h},
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	m.srv = &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(m.log.Handler(), slog.LevelWarn),
	}
	m.log.Info("metrics", "addr", m.ln.Addr().String())
	m.done.Go(func() {
		if err := m.srv.Serve(m.ln); !errors.Is(err, http.ErrServerClosed) {
			m.log.Error("metrics ended", "err", err)
		}
	})
}

// close ends requests that are being answered within a second. It may be
// called more than once.
func (m *metricsServer) close() {
	switch {
	case m.srv != nil:
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if m.srv.Shutdown(ctx) != nil {
			_ = m.srv.Close()
		}
		m.done.Wait()
	case m.ln != nil:
		_ = m.ln.Close()
	}
}

// hostCollector reads the host at every scrape.
type hostCollector struct{ h host }

var (
	descEvents = prometheus.NewDesc("tcpcrypt_events_total",
		"Packets, drops and other events since start, by name.", []string{"event"}, nil)
	descOutcomes = prometheus.NewDesc("tcpcrypt_flows_by_reason_total",
		"Flows that ended, stayed plain or failed since start, by reason.", []string{"reason"}, nil)
	descFlows = prometheus.NewDesc("tcpcrypt_flows",
		"Flows that are encrypted or closing.", nil, nil)
	descHalfOpen = prometheus.NewDesc("tcpcrypt_half_open_flows",
		"Flows that are offered or negotiating.", nil, nil)
	descUptime = prometheus.NewDesc("tcpcrypt_uptime_seconds",
		"Time since the daemon was ready.", nil, nil)
	descDraining = prometheus.NewDesc("tcpcrypt_draining",
		"1 while the daemon is stopping and makes no new offers.", nil, nil)
	descGuard = prometheus.NewDesc("tcpcrypt_guard_active",
		"1 when plaintext cannot bypass the daemon of an encrypted flow, nor after its death.", nil, nil)
	descLayer = prometheus.NewDesc("tcpcrypt_guard_layer_active",
		"1 when a layer of the guard is in force.", []string{"layer", "persistent"}, nil)
	descQueue = prometheus.NewDesc("tcpcrypt_queue_mode",
		"Always 1: the mode that a NIC queue got.", []string{"interface", "queue", "worker", "mode"}, nil)
	descRefused = prometheus.NewDesc("tcpcrypt_queue_mode_refused",
		"Always 1: why a NIC queue did not get a better mode.", []string{"interface", "queue", "reason"}, nil)
	descHanded = prometheus.NewDesc("tcpcrypt_queue_handed_over_total",
		"Packets of a NIC queue that went on to another worker, which has their flow.", []string{"interface", "queue", "worker"}, nil)
	descWorker = prometheus.NewDesc("tcpcrypt_worker_flows",
		"Flows of a worker that are encrypted or closing.", []string{"worker", "cpu"}, nil)
	descBuild = prometheus.NewDesc("tcpcrypt_build_info",
		"Always 1: the version of the daemon.", []string{"version", "goversion"}, nil)
)

func (hostCollector) Describe(descs chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descEvents, descOutcomes, descFlows, descHalfOpen,
		descUptime, descDraining, descGuard, descLayer, descQueue, descRefused, descHanded, descWorker, descBuild} {
		descs <- d
	}
}

func (c hostCollector) Collect(metrics chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		metrics <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		metrics <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	stats := c.h.Stats()
	for name, v := range stats.Counters {
		counter(descEvents, v, name)
	}
	for reason, v := range stats.Reasons {
		counter(descOutcomes, v, reason)
	}
	st := c.h.Status()
	gauge(descFlows, float64(st.Flows))
	gauge(descHalfOpen, float64(st.HalfOpen))
	gauge(descUptime, st.Uptime)
	gauge(descDraining, oneIf(st.Draining))
	gauge(descGuard, oneIf(st.Guard == "active"))
	for _, l := range st.Layers {
		gauge(descLayer, oneIf(l.Active), l.Layer, strconv.FormatBool(l.Persistent))
	}
	for _, q := range st.Queues {
		gauge(descQueue, 1, q.Interface, strconv.Itoa(q.Queue), strconv.Itoa(q.Worker), q.Mode)
		if q.Refused != "" {
			gauge(descRefused, 1, q.Interface, strconv.Itoa(q.Queue), q.Refused)
		}
		counter(descHanded, q.HandedOver, q.Interface, strconv.Itoa(q.Queue), strconv.Itoa(q.Worker))
	}
	for _, w := range st.Workers {
		gauge(descWorker, float64(w.Flows), strconv.Itoa(w.Worker), cpuName(w.CPU))
	}
	v := buildVersion()
	gauge(descBuild, 1, v.Version, v.Go)
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
