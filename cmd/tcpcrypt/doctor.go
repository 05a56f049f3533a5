package main

import (
	"bytes"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/doctor"
)

// doctorReport is what `doctor --json` prints.
type doctorReport struct {
	Status   doctor.Status    `json:"status"` // the worst of the findings
	Findings []doctor.Finding `json:"findings"`
	Fixed    []fixed          `json:"fixed,omitempty"`
	Facts    doctor.Facts     `json:"facts"`
}

// fixed is a change that --fix made, or could not make.
type fixed struct {
	Command string `json:"command"`
	Undo    string `json:"undo"`
	Error   string `json:"error,omitempty"`
}

func newDoctorCommand() *cobra.Command {
	var asJSON, fix, noProbe bool
	cpus := list[int]{parse: parseIndexes}
	cmd := &cobra.Command{
		Use:   "doctor [IF]",
		Short: "Examine the machine and a network interface",
		Long: `Doctor tells what the machine and a network interface have of what the daemon
needs, why it matters, and the command that mends it. It needs no daemon.

A named interface is tried for real: an XDP program that passes everything is
attached and AF_XDP sockets are bound to its queues, unless a program is attached
already. Traffic goes on, but many drivers reset the link at each of these steps,
for seconds: with --no-probe nothing is touched, and what the driver announces is
told. Without a name all interfaces are examined that way.

It ends with 0 when nothing failed, with 1 when at least one check failed, and
with 2 for wrong flags or an interface that does not exist. Warnings do not
count.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return unexpected(cmd, args[1])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			o := doctor.Options{Try: !noProbe, WorkerCPUs: cpus.items}
			if len(args) == 1 {
				o.Interface = args[0]
			}
			return examine(cmd.OutOrStdout(), o, fix, asJSON)
		},
	}
	cmd.Flags().SortFlags = false
	cmd.Flags().BoolVar(&noProbe, "no-probe", false, "attach nothing and bind nothing")
	cmd.Flags().Var(&cpus, "cpus", "CPUs that workers are to be pinned to, as for run")
	cmd.Flags().BoolVar(&fix, "fix", false, "make the changes that interrupt nothing, and tell how to take them back")
	jsonFlag(cmd, &asJSON)
	return cmd
}

func examine(w io.Writer, o doctor.Options, fix, asJSON bool) error {
	facts, err := doctor.Gather(o)
	if err != nil {
		return err
	}
	r := doctorReport{Facts: facts, Findings: doctor.Examine(facts)}
	if fix {
		r.Fixed = applyFixes(r.Findings)
		if len(r.Fixed) > 0 {
			if r.Facts, err = doctor.Gather(o); err != nil {
				return err
			}
			r.Findings = doctor.Examine(r.Facts)
		}
	}
	r.Status = doctor.Worst(r.Findings)
	if asJSON {
		err = printJSON(w, r)
	} else {
		var text bytes.Buffer
		printFindings(&text, r)
		_, err = w.Write(text.Bytes())
		err = outputError(err)
	}
	if err != nil {
		return err
	}
	failed := 0
	for _, f := range r.Findings {
		if f.Status == doctor.Fail {
			failed++
		}
	}
	if failed > 0 {
		return failuref("%d of %d checks failed", failed, len(r.Findings))
	}
	return nil
}

func applyFixes(findings []doctor.Finding) (done []fixed) {
	for i := range findings {
		f := &findings[i]
		if f.Status == doctor.OK || !f.Safe {
			continue
		}
		x := fixed{Command: f.Mend, Undo: f.Undo}
		if err := f.Apply(); err != nil {
			x.Error = oneLine(err)
		}
		done = append(done, x)
	}
	return done
}

func printFindings(w io.Writer, r doctorReport) {
	for _, x := range r.Fixed {
		if x.Error != "" {
			fmt.Fprintf(w, "not fixed: %s\n", x.Error)
			continue
		}
		fmt.Fprintf(w, "fixed: %s\n       undo: %s\n", x.Command, x.Undo)
	}
	subject := ""
	for _, f := range r.Findings {
		if f.Subject != subject {
			subject = f.Subject
			fmt.Fprintf(w, "%s:\n", subject)
		}
		fmt.Fprintf(w, "  %-4s  %-14s %s\n", f.Status, f.Check, f.Found)
		if f.Why != "" {
			fmt.Fprintf(w, "        why: %s\n", f.Why)
		}
		if f.Mend != "" {
			safe := ""
			if f.Safe {
				safe = "   (--fix does it)"
			}
			fmt.Fprintf(w, "        mend: %s%s\n", f.Mend, safe)
		}
	}
	for _, i := range r.Facts.Interfaces {
		if i.NotTried != "" {
			fmt.Fprintf(w, "%s was not tried: %s\n", i.Name, i.NotTried)
		}
	}
}
