package main

import (
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
)

// fakeGateway has a queue of the same number on another interface.
type fakeGateway struct{ fakeHost }

func (g *fakeGateway) Status() fastpath.Status {
	st := g.fakeHost.Status()
	st.Queues = append(st.Queues, fastpath.QueueStatus{Interface: "inner0", CPU: -1, Mode: "copy"})
	return st
}

func TestMetrics(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	m, err := listenMetrics("127.0.0.1:0", log)
	if err != nil {
		t.Fatal(err)
	}
	defer m.close()
	addr := m.ln.Addr().String()
	if _, err := listenMetrics(addr, log); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("the same address again: %v", err)
	}
	m.serve(&fakeGateway{fakeHost{cfg: fastpath.HostConfig{Interface: "fake0"}}})

	client := http.Client{Timeout: patience}
	resp, err := client.Get("http://" + addr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`tcpcrypt_events_total{event="rx-packets"} 12`,
		`tcpcrypt_flows_by_reason_total{reason="peer-no-eno"} 4`,
		`tcpcrypt_flows 2`,
		`tcpcrypt_half_open_flows 1`,
		`tcpcrypt_uptime_seconds 61.4`,
		`tcpcrypt_draining 0`,
		`tcpcrypt_guard_active 0`,
		`tcpcrypt_guard_layer_active{layer="netfilter",persistent="false"} 1`,
		`tcpcrypt_guard_layer_active{layer="cgroup",persistent="false"} 0`,
		`tcpcrypt_queue_mode{interface="fake0",mode="copy",queue="0",worker="0"} 1`,
		`tcpcrypt_queue_mode_refused{interface="fake0",queue="0",reason="zerocopy: not supported"} 1`,
		`tcpcrypt_queue_handed_over_total{interface="fake0",queue="0",worker="0"} 5`,
		`tcpcrypt_queue_mode{interface="inner0",mode="copy",queue="0",worker="0"} 1`,
		`tcpcrypt_worker_flows{cpu="-",worker="0"} 2`,
		`tcpcrypt_build_info{`,
		`go_goroutines `,
	} {
		if !strings.Contains(string(text), want) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}

	m.close()
	if _, err := client.Get("http://" + addr + "/metrics"); err == nil {
		t.Error("metrics are served after close")
	}
}

func TestMetricsOff(t *testing.T) {
	m, err := listenMetrics("", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	m.serve(&fakeHost{})
	m.close()
}
