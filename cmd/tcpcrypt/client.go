package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/fastpath"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/slowpath"
)

// query is a command that asks the daemon one thing.
type query struct {
	control string
	json    bool
}

func (q *query) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&q.control, "control", defaultControl, "`PATH` of the daemon's control socket")
	jsonFlag(cmd, &q.json)
}

func jsonFlag(cmd *cobra.Command, asJSON *bool) {
	cmd.Flags().BoolVar(asJSON, "json", false, "print JSON")
}

// ask sends req and prints the answer: as the daemon gave it with --json, and
// else by print.
func ask[T any](q *query, w io.Writer, req request, print func(io.Writer, T)) error {
	raw, err := call(q.control, req)
	if err != nil {
		return err
	}
	if q.json {
		return printJSON(w, raw)
	}
	var result T
	if err := json.Unmarshal(raw, &result); err != nil {
		return failuref("the daemon at %s is of another version: %w", q.control, err)
	}
	var text bytes.Buffer
	print(&text, result)
	_, err = w.Write(text.Bytes())
	return outputError(err)
}

func printJSON(w io.Writer, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return failure{err}
	}
	_, err = w.Write(append(text, '\n'))
	return outputError(err)
}

func outputError(err error) error {
	if err != nil {
		return failuref("writing the output: %w", err)
	}
	return nil
}

func newStatusCommand() *cobra.Command {
	q := &query{}
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show how the daemon runs",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return ask(q, cmd.OutOrStdout(), request{Method: "status"}, printStatus)
		},
	}
	q.flags(cmd)
	return cmd
}

func newFlowsCommand() *cobra.Command {
	q := &query{}
	cmd := &cobra.Command{
		Use:   "flows",
		Short: "List the connections that the daemon knows",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return ask(q, cmd.OutOrStdout(), request{Method: "flows"}, printFlows)
		},
	}
	q.flags(cmd)
	return cmd
}

func newStatsCommand() *cobra.Command {
	q := &query{}
	cmd := &cobra.Command{
		Use:   "stats",
		Short: "Show the counters since the daemon started",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return ask(q, cmd.OutOrStdout(), request{Method: "stats"}, printStats)
		},
	}
	q.flags(cmd)
	return cmd
}

func newSessionCommand() *cobra.Command {
	q := &query{}
	cmd := &cobra.Command{
		Use:   "session LOCAL REMOTE",
		Short: "Show the session ID of an encrypted connection",
		Long: `Session shows the session ID (RFC 8548 section 3.4) of the connection between
two address:port pairs. Both ends of an unattacked connection have the same
one: comparing them over an authenticated channel rules out an active attacker.`,
		Example: "  tcpcrypt session 192.0.2.1:43210 192.0.2.2:443",
		Args:    exactArgs("LOCAL", "REMOTE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, arg := range args {
				if _, err := parseEndpoint(arg); err != nil {
					return err
				}
			}
			req := request{Method: "session", Local: args[0], Remote: args[1]}
			return ask(q, cmd.OutOrStdout(), req, printSession)
		},
	}
	q.flags(cmd)
	return cmd
}

func newRekeyCommand() *cobra.Command {
	q := &query{}
	cmd := &cobra.Command{
		Use:   "rekey [LOCAL REMOTE]",
		Short: "Change the traffic keys of encrypted connections",
		Long: `Rekey has the connection between two address:port pairs, or every connection,
change its traffic keys in both directions (RFC 8548 section 3.8). Connections
that are changing them already are left alone.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 0 && len(args) != 2 {
				return fmt.Errorf("rekey takes LOCAL and REMOTE, or nothing")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			req := request{Method: "rekey"}
			if len(args) == 2 {
				if _, _, err := parseEndpoints(args[0], args[1]); err != nil {
					return err
				}
				req.Local, req.Remote = args[0], args[1]
			}
			return ask(q, cmd.OutOrStdout(), req, func(w io.Writer, c count) {
				fmt.Fprintf(w, "rekeying begun on %d connections\n", c.Count)
			})
		},
	}
	q.flags(cmd)
	return cmd
}

func newCacheCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cache list|flush",
		Short: "Show or erase the sessions that later connections may resume",
		Args:  exactArgs(),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Usage() },
	}
	cmd.AddCommand(newCacheListCommand(), newCacheFlushCommand())
	return cmd
}

func newCacheListCommand() *cobra.Command {
	q := &query{}
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the cached sessions",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return ask(q, cmd.OutOrStdout(), request{Method: "cache"}, printCache)
		},
	}
	q.flags(cmd)
	return cmd
}

func newCacheFlushCommand() *cobra.Command {
	q := &query{}
	cmd := &cobra.Command{
		Use:   "flush [PEER]",
		Short: "Erase the cached sessions of a peer address, or all of them",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return fmt.Errorf("flush takes one PEER, or nothing")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			req := request{Method: "cache-flush"}
			if len(args) == 1 {
				if _, err := parsePeer(args[0]); err != nil {
					return err
				}
				req.Peer = args[0]
			}
			return ask(q, cmd.OutOrStdout(), req, func(w io.Writer, c count) {
				fmt.Fprintf(w, "%d sessions erased\n", c.Count)
			})
		},
	}
	q.flags(cmd)
	return cmd
}

func printCache(w io.Writer, entries []slowpath.CacheEntry) {
	table(w, func(w io.Writer) {
		fmt.Fprintln(w, "PEER\tPORT\tTEP\tAEAD\tROLE\tNEXT\tAGE\tEXPIRES")
		for _, e := range entries {
			port := "-"
			if e.Port != 0 {
				port = strconv.Itoa(int(e.Port))
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\t%v\t%v\n", e.Peer, port, e.TEP, e.AEAD, e.Role, e.Next, seconds(e.Age), seconds(e.Expires))
		}
	})
}

// table aligns lines of cells that are separated by tabs.
func table(w io.Writer, fill func(io.Writer)) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fill(tw)
	_ = tw.Flush() // w is a buffer
}

func printStatus(w io.Writer, st fastpath.Status) {
	table(w, func(w io.Writer) {
		fmt.Fprintf(w, "interface\t%s (%s, MTU %d)\n", st.Interface, st.Driver, st.MTU)
		fmt.Fprintf(w, "inner\t%s\n", st.Inner)
		if st.Bypass != "" {
			fmt.Fprintf(w, "bypass\t%s\n", st.Bypass)
		}
		fmt.Fprintf(w, "mode\t%s\n", st.Mode)
		fmt.Fprintf(w, "poll\t%s\n", st.Poll)
		fmt.Fprintf(w, "guard\t%s\n", st.Guard)
		fmt.Fprintf(w, "aead engine\t%s\n", st.Engine)
		fmt.Fprintf(w, "pid\t%d\n", st.PID)
		fmt.Fprintf(w, "uptime\t%v\n", seconds(st.Uptime))
		fmt.Fprintf(w, "flows\t%d encrypted, %d half-open\n", st.Flows, st.HalfOpen)
		if st.Ended > 0 {
			fmt.Fprintf(w, "ended\t%d left over from an earlier daemon\n", st.Ended)
		}
		if st.Draining {
			fmt.Fprintf(w, "draining\tno new connection is encrypted\n")
		}
	})
	if len(st.Layers) > 0 {
		fmt.Fprintln(w)
		table(w, func(w io.Writer) {
			fmt.Fprintln(w, "GUARD LAYER\tACTIVE\tOUTLIVES THE DAEMON\tREASON")
			for _, l := range st.Layers {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", l.Layer, yes(l.Active), yes(l.Persistent), dash(l.Reason))
			}
		})
	}
	if len(st.Queues) == 0 {
		return
	}
	fmt.Fprintln(w)
	table(w, func(w io.Writer) {
		fmt.Fprintln(w, "INTERFACE\tQUEUE\tWORKER\tCPU\tMODE\tCHECKSUM\tRECEIVED\tSENT\tHANDED OVER\tBETTER MODE REFUSED")
		for _, s := range st.Queues {
			fmt.Fprintf(w, "%s\t%d\t%d\t%s\t%s\t%s\t%d\t%d\t%d\t%s\n",
				s.Interface, s.Queue, s.Worker, cpuName(s.CPU), s.Mode, dash(s.Checksum), s.Received, s.Transmitted, s.HandedOver, dash(s.Refused))
		}
	})
	if len(st.Workers) < 2 {
		return
	}
	fmt.Fprintln(w)
	table(w, func(w io.Writer) {
		fmt.Fprintln(w, "WORKER\tCPU\tFLOWS\tHALF-OPEN\tHANDED OVER\tRECEIVED")
		for _, s := range st.Workers {
			fmt.Fprintf(w, "%d\t%s\t%d\t%d\t%d\t%d\n", s.Worker, cpuName(s.CPU), s.Flows, s.HalfOpen, s.HandedOver, s.Received)
		}
	})
}

func cpuName(cpu int) string {
	if cpu < 0 {
		return "-"
	}
	return strconv.Itoa(cpu)
}

func printFlows(w io.Writer, flows []fastpath.FlowInfo) {
	slices.SortStableFunc(flows, func(a, b fastpath.FlowInfo) int {
		return cmp.Or(compareEndpoints(a.Local, b.Local), compareEndpoints(a.Remote, b.Remote))
	})
	table(w, func(w io.Writer) {
		fmt.Fprintln(w, "LOCAL\tREMOTE\tSTATE\tROLE\tTEP\tAEAD\tRESUMED\tIN\tOUT\tRETRANSMITS\tREKEYS\tWORKER\tAGE\tREASON")
		for _, f := range flows {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\t%d\t%d\t%v\t%s\n",
				f.Local, f.Remote, f.State, dash(f.Role), dash(f.TEP), dash(f.AEAD), yes(f.Resumed),
				byteCount(f.BytesIn), byteCount(f.BytesOut), f.Retransmits, f.RekeysIn+f.RekeysOut,
				f.Worker, seconds(f.Age), dash(f.Reason))
		}
	})
}

func printStats(w io.Writer, stats fastpath.Stats) {
	print := func(w io.Writer, counters map[string]uint64) {
		table(w, func(w io.Writer) {
			for _, name := range slices.Sorted(maps.Keys(counters)) {
				fmt.Fprintf(w, "%s\t%d\n", name, counters[name])
			}
		})
	}
	print(w, stats.Counters)
	if len(stats.Reasons) > 0 {
		fmt.Fprintln(w, "\nflows by reason:")
		print(w, stats.Reasons)
	}
}

func printSession(w io.Writer, f fastpath.FlowInfo) {
	table(w, func(w io.Writer) {
		fmt.Fprintf(w, "session ID\t%s\n", f.SessionID)
		fmt.Fprintf(w, "role\t%s\n", f.Role)
		fmt.Fprintf(w, "TEP\t%s\n", f.TEP)
		fmt.Fprintf(w, "AEAD\t%s\n", f.AEAD)
		if f.PeerAware {
			fmt.Fprintf(w, "peer\tapplication-aware\n")
		}
	})
}

func compareEndpoints(a, b string) int {
	x, err1 := netip.ParseAddrPort(a)
	y, err2 := netip.ParseAddrPort(b)
	if err1 != nil || err2 != nil {
		return cmp.Compare(a, b)
	}
	return x.Compare(y)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func seconds(s float64) time.Duration {
	return time.Duration(s * float64(time.Second)).Round(time.Second)
}

// byteCount is n with a binary unit and three digits.
func byteCount(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n), -1
	for v >= 1024 && unit < len("KMGTPE")-1 {
		v /= 1024
		unit++
	}
	digits := 2
	switch {
	case v >= 100:
		digits = 0
	case v >= 10:
		digits = 1
	}
	return fmt.Sprintf("%.*f %ciB", digits, v, "KMGTPE"[unit])
}
