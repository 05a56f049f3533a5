package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench"
)

func newBenchCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bench micro|pipeline|wire",
		Short: "Measure the program on this machine",
		Args:  exactArgs("SUITE"),
	}
	cmd.AddCommand(newBenchMicro(), newBenchPipeline(), newBenchWire())
	return cmd
}

// emit prints rows as JSON with the machine, or as a table.
func emit[Row any](out io.Writer, asJSON bool, rows []Row, head string, line func(*Row) string) error {
	if asJSON {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		return enc.Encode(bench.Report[Row]{Machine: bench.ThisMachine(), Results: rows})
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, head+"\t")
	for i := range rows {
		fmt.Fprintln(w, line(&rows[i])+"\t")
	}
	return w.Flush()
}

func newBenchMicro() *cobra.Command {
	cmd := &cobra.Command{Use: "micro", Short: "Sealing, opening and key agreement alone", Args: exactArgs()}
	asJSON := cmd.Flags().Bool("json", false, "print JSON")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		rows, err := bench.Micro()
		if err != nil {
			return failure{err}
		}
		return emit(cmd.OutOrStdout(), *asJSON, rows, "operation\tbytes\tns\tGB/s\tallocs", func(r *bench.MicroRow) string {
			return fmt.Sprintf("%s\t%d\t%.0f\t%.2f\t%.0f", r.Name, r.Bytes, r.NsPer, r.GBps, r.Allocs)
		})
	}
	return cmd
}

func newBenchPipeline() *cobra.Command {
	cmd := &cobra.Command{Use: "pipeline", Short: "One worker's engine in memory, a packet at a time", Args: exactArgs()}
	asJSON := cmd.Flags().Bool("json", false, "print JSON")
	payloads := cmd.Flags().IntSlice("payload", []int{64, 512, 1440}, "data bytes of a packet")
	flows := cmd.Flags().IntSlice("flows", []int{1, 1000}, "number of flows")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		for _, n := range *payloads {
			if n < 1 || n > bench.MaxPayload {
				return fmt.Errorf("--payload %d: must be 1 to %d", n, bench.MaxPayload)
			}
		}
		for _, n := range *flows {
			if n < 1 || n > bench.MaxFlows {
				return fmt.Errorf("--flows %d: must be 1 to %d", n, bench.MaxFlows)
			}
		}
		rows, err := bench.Pipeline(*payloads, *flows)
		if err != nil {
			return failure{err}
		}
		return emit(cmd.OutOrStdout(), *asJSON, rows, "direction\tpayload\tflows\tengine\tns/packet\tof it AEAD\tMpps\tGb/s\tallocs/packet", func(r *bench.PipelineRow) string {
			return fmt.Sprintf("%s\t%d\t%d\t%s\t%.0f\t%.0f\t%.2f\t%.2f\t%.3f", r.Direction, r.Payload, r.Flows, r.Engine, r.NsPer, r.AEADNs, r.PPS/1e6, r.Gbps, r.Allocs)
		})
	}
	return cmd
}

func newBenchWire() *cobra.Command {
	cmd := &cobra.Command{Use: "wire", Short: "Two hosts in namespaces, against plain TCP; needs root", Args: exactArgs()}
	asJSON := cmd.Flags().Bool("json", false, "print JSON")
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
		rows, err := bench.Wire(cmd.Context(), o)
		if err != nil {
			return failure{err}
		}
		plain := &rows[0]
		return emit(cmd.OutOrStdout(), *asJSON, rows, "variant\tstreams\tGb/s\tCPU s/GB\t/ plain\trtt p50 us\trtt p99 us\tconn/s\tconnect p50 us\tat 1 ms rtt\tresumed", func(r *bench.WireRow) string {
			return fmt.Sprintf("%s\t%d\t%.2f\t%.3f\t%.1f\t%.0f\t%.0f\t%.0f\t%.0f (%.2fx)\t%.0f (%.2fx)\t%t", r.Variant, r.Streams, r.Gbps, r.CPUPerGB, r.CPUPerGB/plain.CPUPerGB,
				r.RTTp50, r.RTTp99, r.ConnPerS, r.Connect50, r.Connect50/plain.Connect50, r.Connect1m, r.Connect1m/plain.Connect1m, r.Resumed)
		})
	}
	return cmd
}
