package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
)

func newBenchCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bench micro|pipeline|wire|peers|capacity|report",
		Short: "Measure the program on this machine",
		Args:  exactArgs(),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Usage() },
	}
	var engine string
	engineFlag(cmd.PersistentFlags(), &engine)
	cmd.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		if err := useEngine(engine); err != nil {
			return err
		}
		if save := cmd.Flags().Lookup("save"); save != nil && save.Value.String() != "" {
			// Not only after minutes of measuring.
			if _, err := os.Stat(filepath.Dir(save.Value.String())); err != nil {
				return fmt.Errorf("save: %w", err)
			}
		}
		// For the daemons that some suites start.
		return os.Setenv(crypto.EngineEnv, crypto.EngineName())
	}
	cmd.AddCommand(newBenchMicro(), newBenchPipeline(), newBenchWire(), newBenchPeers(), newBenchCapacity(), newBenchReport())
	return cmd
}

// benchOutput says how a suite's rows are printed.
type benchOutput struct {
	json, benchstat bool
	save            string // file that gets the JSON besides what is printed
	assumptions     []string
}

func (o *benchOutput) flags(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
	cmd.Flags().BoolVar(&o.benchstat, "benchstat", false, "print lines that benchstat reads")
	cmd.Flags().StringVar(&o.save, "save", "", "file that gets the JSON as well, for bench report")
	cmd.MarkFlagsMutuallyExclusive("json", "benchstat")
}

// emit prints rows as JSON with the machine, as lines for benchstat, or as a
// table.
func emit[R any, P interface {
	*R
	bench.Row
}](cmd *cobra.Command, o *benchOutput, rows []R, head string, line func(P) string) error {
	out := cmd.OutOrStdout()
	text, err := json.MarshalIndent(bench.Report[R]{Machine: bench.ThisMachine(), Suite: cmd.Name(), Assumptions: o.assumptions, Results: rows}, "", "  ")
	if err != nil {
		return failure{err}
	}
	text = append(text, '\n')
	if o.save != "" {
		if err := os.WriteFile(o.save, text, 0o644); err != nil {
			return failure{err}
		}
	}
	switch {
	case o.json:
		_, err := out.Write(text)
		return err
	case o.benchstat:
		m := bench.ThisMachine()
		fmt.Fprintf(out, "goos: linux\ngoarch: %s\ncpu: %s\n", runtime.GOARCH, m.CPU)
		for i := range rows {
			fmt.Fprintln(out, bench.Benchmark(P(&rows[i])))
		}
		return nil
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, head+"\t")
	for i := range rows {
		fmt.Fprintln(w, line(&rows[i])+"\t")
	}
	return w.Flush()
}

func newBenchMicro() *cobra.Command {
	cmd := &cobra.Command{Use: "micro", Short: "Single operations: AEAD engines, checksums, ENO, key agreement", Args: exactArgs()}
	var o benchOutput
	o.flags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		m := bench.MicroOptions{Log: func(s string) { fmt.Fprintln(cmd.ErrOrStderr(), s) }}
		if cmd.Flags().Changed(engineFlagName) {
			m.Engines = []string{crypto.EngineName()}
		}
		rows, err := bench.Micro(m)
		if err != nil {
			return failure{err}
		}
		return emit(cmd, &o, rows, "operation\tengine\tbytes\tkeys\tns\tGB/s\tallocs", func(r *bench.MicroRow) string {
			return fmt.Sprintf("%s\t%s\t%d\t%d\t%.1f\t%.2f\t%.0f", r.Name, r.Engine, r.Bytes, r.Keys, r.NsPer, r.GBps, r.Allocs)
		})
	}
	return cmd
}

func newBenchPipeline() *cobra.Command {
	cmd := &cobra.Command{Use: "pipeline", Short: "One worker's engine in memory, a packet at a time", Args: exactArgs()}
	var o benchOutput
	o.flags(cmd)
	var p bench.PipelineOptions
	payloads := cmd.Flags().StringSlice("payload", []string{"64", "512", "1440", "9000", "imix"}, "data bytes of a packet, or imix")
	cmd.Flags().IntSliceVar(&p.Flows, "flows", []int{1, 1000, 100000}, "flows of a worker, which take turns in random order")
	cmd.Flags().IntSliceVar(&p.Bursts, "burst", []int{1, 16}, "packets of a flow that come together")
	cmd.Flags().IntSliceVar(&p.Workers, "workers", []int{1}, "threads that work at once")
	cmd.RunE = func(cmd *cobra.Command, _ []string) (err error) {
		if p.Payloads, err = parsePayloads(*payloads); err != nil {
			return err
		}
		if err := checkPipeline(&p); err != nil {
			return err
		}
		p.Log = func(s string) { fmt.Fprintln(cmd.ErrOrStderr(), s) }
		rows, err := bench.Pipeline(p)
		if err != nil {
			return failure{err}
		}
		return emit(cmd, &o, rows, "direction\tpayload\tflows\tburst\tworkers\tengine\tns/packet\tof it AEAD\tMpps\tGb/s\tallocs/packet\t"+strings.Join(fastpath.StageNames[:], "/")+" ns", func(r *bench.PipelineRow) string {
			return fmt.Sprintf("%s\t%s\t%d\t%d\t%d\t%s\t%.0f\t%.0f\t%.2f\t%.2f\t%.3f\t%s", r.Direction, cmp.Or(r.Mix, strconv.Itoa(r.Payload)), r.Flows, r.Burst, r.Workers, r.Engine, r.NsPer, r.AEADNs, r.PPS/1e6, r.Gbps, r.Allocs, stages(r))
		})
	}
	return cmd
}

// stages returns the times of a row's stages, in the order of their names.
func stages(r *bench.PipelineRow) string {
	var s []string
	for _, name := range fastpath.StageNames {
		s = append(s, strconv.Itoa(int(r.Stages[name]+0.5)))
	}
	return strings.Join(s, "/")
}

// parsePayloads reads sizes and the word imix.
func parsePayloads(words []string) (out []int, err error) {
	for _, w := range words {
		n, err := strconv.Atoi(w)
		switch {
		case w == "imix":
			n = bench.IMIX
		case err != nil || n < 1 || n > bench.MaxPayload:
			return nil, fmt.Errorf("--payload %s: must be imix or 1 to %d", w, bench.MaxPayload)
		}
		out = append(out, n)
	}
	return out, nil
}

func checkPipeline(o *bench.PipelineOptions) error {
	for _, c := range []struct {
		name   string
		values []int
		most   int
	}{
		{"flows", o.Flows, bench.MaxFlows}, {"burst", o.Bursts, bench.MaxBurst}, {"workers", o.Workers, runtime.NumCPU()},
	} {
		for _, n := range c.values {
			if n < 1 || n > c.most {
				return fmt.Errorf("--%s %d: must be 1 to %d", c.name, n, c.most)
			}
		}
	}
	return nil
}

func newBenchWire() *cobra.Command {
	cmd := &cobra.Command{Use: "wire", Short: "Two hosts in namespaces, and two behind gateways, against plain TCP and bridges; needs root", Args: exactArgs()}
	return benchHosts(cmd, bench.Wire)
}

func newBenchPeers() *cobra.Command {
	cmd := &cobra.Command{Use: "peers", Short: "Two hosts, and whatever of Go TLS, stunnel and wireguard-go is installed", Args: exactArgs()}
	return benchHosts(cmd, bench.Peers)
}

func benchHosts(cmd *cobra.Command, suite func(context.Context, bench.WireOptions) ([]bench.WireRow, error)) *cobra.Command {
	var out benchOutput
	out.flags(cmd)
	o := bench.WireOptions{}
	cmd.Flags().DurationVar(&o.Time, "time", 5*time.Second, "length of each bulk transfer")
	cmd.Flags().IntVar(&o.Streams, "streams", 1, "connections of the bulk transfer")
	cmd.Flags().IntVar(&o.Rounds, "rounds", 3, "rotations over the variants; medians are printed")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if o.Rounds < 1 || o.Streams < 1 || o.Time <= 0 {
			return fmt.Errorf("--time, --streams and --rounds must be positive")
		}
		var err error
		if o.Binary, err = os.Executable(); err != nil {
			return failure{err}
		}
		o.Log = func(s string) { fmt.Fprintln(cmd.ErrOrStderr(), s) }
		rows, err := suite(cmd.Context(), o)
		if err != nil {
			return failure{err}
		}
		plain := &rows[0]
		return emit(cmd, &out, rows, "variant\tstreams\tGb/s\tCPU s/GB\t/ plain\trtt p50 us\trtt p99 us\tconn/s\tconnect p50 us\tat 1 ms rtt\tresumed", func(r *bench.WireRow) string {
			return fmt.Sprintf("%s\t%d\t%.2f\t%.3f\t%.1f\t%.0f\t%.0f\t%.0f\t%.0f (%.2fx)\t%.0f (%.2fx)\t%t", r.Variant, r.Streams, r.Gbps, r.CPUPerGB, r.CPUPerGB/plain.CPUPerGB,
				r.RTTp50, r.RTTp99, r.ConnPerS, r.Connect50, r.Connect50/plain.Connect50, r.Connect1m, r.Connect1m/plain.Connect1m, r.Resumed)
		})
	}
	return cmd
}

func newBenchCapacity() *cobra.Command {
	cmd := &cobra.Command{Use: "capacity", Short: "Cores that links of 10 to 400 Gb/s need, from costs measured here", Args: exactArgs()}
	var o benchOutput
	o.flags(cmd)
	payloads := cmd.Flags().StringSlice("payload", []string{"64", "512", "1440", "3400"}, "data bytes of a packet")
	flows := cmd.Flags().Int("flows", 1000, "number of flows")
	burst := cmd.Flags().Int("burst", 16, "packets of a flow that come together")
	c := bench.DefaultCosts
	cmd.Flags().Float64Var(&c.ZeroCopy, "zerocopy-ns", c.ZeroCopy, "assumed: AF_XDP in zero-copy mode, ns a packet")
	cmd.Flags().Float64Var(&c.CopyRX, "copy-rx-ns", c.CopyRX, "assumed: receiving in copy mode, ns a packet")
	cmd.Flags().Float64Var(&c.CopyTX, "copy-tx-ns", c.CopyTX, "assumed: sending in copy mode, ns a packet")
	cmd.Flags().Float64Var(&c.Inner, "inner-ns", c.Inner, "assumed: inner path, ns per 1440 bytes")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		sizes, err := parsePayloads(*payloads)
		if err != nil {
			return err
		}
		for _, f := range []struct {
			name string
			ns   float64
		}{{"zerocopy-ns", c.ZeroCopy}, {"copy-rx-ns", c.CopyRX}, {"copy-tx-ns", c.CopyTX}, {"inner-ns", c.Inner}} {
			if !(f.ns >= 0) {
				return fmt.Errorf("--%s %v: must not be negative", f.name, f.ns)
			}
		}
		p := bench.PipelineOptions{Payloads: sizes, Flows: []int{*flows}, Bursts: []int{*burst}, Workers: []int{1}}
		if err := checkPipeline(&p); err != nil {
			return err
		}
		measured, err := bench.Pipeline(p)
		if err != nil {
			return failure{err}
		}
		o.assumptions = bench.Assumptions(c)
		err = emit(cmd, &o, bench.Capacity(measured, c), "direction\tpayload\tmode\tlink Gb/s\tns/packet\tof it engine\tGb/s per core\tcores", func(r *bench.CapacityRow) string {
			return fmt.Sprintf("%s\t%d\t%s\t%g\t%.0f\t%.0f\t%.1f\t%d", r.Direction, r.Payload, r.Mode, r.LinkGbps, r.NsPer, r.EngineNs, r.GbpsPerCore, r.Cores)
		})
		if err == nil && !o.json && !o.benchstat {
			fmt.Fprintln(cmd.OutOrStdout(), "assumptions:")
			for _, a := range o.assumptions {
				fmt.Fprintln(cmd.OutOrStdout(), "  "+a)
			}
		}
		return err
	}
	return cmd
}

func newBenchReport() *cobra.Command {
	cmd := &cobra.Command{Use: "report FILE...", Short: "One HTML page with charts, from what suites printed with --json"}
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return fmt.Errorf("%s: FILE is missing", commandName(cmd))
		}
		return nil
	}
	out := cmd.Flags().StringP("output", "o", "report.html", "file to write")
	cmd.RunE = func(cmd *cobra.Command, files []string) error {
		var p bench.Page
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				return failure{err}
			}
			if err := p.ParseReport(b); err != nil {
				return failuref("%s: %w", f, err)
			}
		}
		var page bytes.Buffer
		if err := p.HTML(&page); err != nil {
			return failure{err}
		}
		if err := os.WriteFile(*out, page.Bytes(), 0o644); err != nil {
			return failure{err}
		}
		return nil
	}
	return cmd
}
