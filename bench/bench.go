// Package bench measures the program: cryptography alone (Micro), the engine in
// memory (Pipeline), whole hosts on a wire against plain TCP (Wire) and against
// other protections of connections (Peers), and what cores a link would need
// (Capacity).
package bench

import (
	"bufio"
	"cmp"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
)

// Machine describes where figures were taken.
type Machine struct {
	CPU    string `json:"cpu"`
	CPUs   int    `json:"cpus"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
}

// ThisMachine describes the machine that runs the program.
func ThisMachine() Machine {
	m := Machine{CPUs: runtime.NumCPU(), Go: runtime.Version()}
	if f, err := os.Open("/proc/cpuinfo"); err == nil {
		defer f.Close()
		for sc := bufio.NewScanner(f); sc.Scan(); {
			if k, v, ok := strings.Cut(sc.Text(), ":"); ok && strings.TrimSpace(k) == "model name" {
				m.CPU = strings.TrimSpace(v)
				break
			}
		}
	}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m.Kernel = strings.TrimSpace(string(b))
	}
	return m
}

// Report is what a suite prints as JSON.
type Report[Row any] struct {
	Machine Machine `json:"machine"`
	Suite   string  `json:"suite"`
	// Assumptions of a suite that computes and does not only measure.
	Assumptions []string `json:"assumptions,omitempty"`
	Results     []Row    `json:"results"`
}

// A Row can be printed in the format of Go's benchmarks, which benchstat reads.
type Row interface {
	// benchmark returns the name, which tells what was measured under which
	// conditions, and the figures.
	benchmark() (name string, figures []figure)
}

type figure struct {
	value float64
	unit  string
}

// Benchmark returns a line in the format of Go's benchmarks.
func Benchmark(r Row) string {
	name, figures := r.benchmark()
	var s strings.Builder
	fmt.Fprintf(&s, "Benchmark%s 1", name)
	for _, f := range figures {
		fmt.Fprintf(&s, " %.6g %s", f.value, f.unit)
	}
	return s.String()
}

func (r *MicroRow) benchmark() (string, []figure) {
	name := "Micro/" + r.Name
	if r.Bytes > 0 {
		name += fmt.Sprintf("/bytes=%d", r.Bytes)
	}
	if r.Keys > 0 {
		name += fmt.Sprintf("/keys=%d", r.Keys)
	}
	if r.Engine != "" {
		name += "/engine=" + r.Engine
	}
	return name, []figure{{r.NsPer, "ns/op"}, {r.Allocs, "allocs/op"}}
}

func (r *PipelineRow) benchmark() (string, []figure) {
	return fmt.Sprintf("Pipeline/%s/payload=%s/flows=%d/burst=%d/workers=%d/engine=%s", r.Direction, cmp.Or(r.Mix, strconv.Itoa(r.Payload)), r.Flows, r.Burst, r.Workers, r.Engine),
		[]figure{{r.NsPer, "ns/packet"}, {r.AEADNs, "aead-ns/packet"}, {r.Gbps, "Gb/s"}, {r.Allocs, "allocs/packet"}}
}

func (r *WireRow) benchmark() (string, []figure) {
	return fmt.Sprintf("Wire/%s/streams=%d/resumed=%t", r.Variant, r.Streams, r.Resumed), []figure{
		{r.Gbps, "Gb/s"}, {r.CPUPerGB, "cpu-s/GB"}, {r.RTTp50, "rtt-p50-us"}, {r.RTTp99, "rtt-p99-us"},
		{r.ConnPerS, "conn/s"}, {r.Connect50, "connect-p50-us"}, {r.Connect1m, "connect-1ms-p50-us"},
	}
}

func (r *CapacityRow) benchmark() (string, []figure) {
	return fmt.Sprintf("Capacity/%s/payload=%d/mode=%s/link=%g", r.Direction, r.Payload, r.Mode, r.LinkGbps),
		[]figure{{r.NsPer, "ns/packet"}, {r.GbpsPerCore, "Gb/s/core"}, {float64(r.Cores), "cores"}}
}
