package matrix

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
)

// Row is what was measured in a cell.
type Row struct {
	Cell
	Plain, Encrypted Transfer
}

// Ratio returns the encrypted connection's throughput divided by the plain one's.
func (r Row) Ratio() float64 { return r.Encrypted.Mbps() / r.Plain.Mbps() }

// LossRow is a comparison under random loss.
type LossRow struct {
	CC               string
	Drop             float64
	Plain, Encrypted float64   // medians in Mb/s
	Ratios           []float64 // of each rotation, sorted
}

// Median returns the median of a sorted list.
func Median(sorted []float64) float64 { return sorted[len(sorted)/2] }

// WriteTables writes the results as a document. machine says where they were
// measured, command how.
func WriteTables(w io.Writer, machine, command string, rows []Row, loss []LossRow) error {
	var b strings.Builder
	fmt.Fprintf(&b, `# Paths and hosts

Written by `+"`%s`"+`; %s.

Every row is two connections, one plain and one encrypted, between two hosts in
network namespaces of one machine, on the kernel's own TCP, in the same run. Each
carries data one way and then a quarter of it back, and must deliver it exactly.
Between the hosts is a link of 200 Mb/s with a round trip of 2 ms, whose fault
meets segments of both directions. The throughput is that of the first direction,
with the connecting. These are short transfers, most of them shorter than a second,
under random faults, on CPUs that the hosts, the link and the applications share:
single ratios say little.

## Random loss, longer transfers

A link of 200 Mb/s with a round trip of %v, %d MiB one way
(half of that at 5 %%), the same pattern of losses for both connections of a rotation, in both directions; medians.

| congestion control | loss | plain Mb/s | encrypted Mb/s | ratio, median | ratios |
|---|---|---|---|---|---|
`, command, machine, LossRTT, LossSize>>20)
	for _, l := range loss {
		fmt.Fprintf(&b, "| %s | %g %% | %.1f | %.1f | %.2f | %.2f |\n", l.CC, 100*l.Drop, l.Plain, l.Encrypted, Median(l.Ratios), l.Ratios)
	}
	var ratios []float64
	for _, r := range rows {
		ratios = append(ratios, r.Ratio())
	}
	slices.Sort(ratios)
	fmt.Fprintf(&b, "\n## All cells\n\n%d cells, all exact; the median of their ratios is %.2f. Each triple of values of the\ncolumns occurs in one of them.\n", len(rows), Median(ratios))
	b.WriteString(`
| congestion control | MTU | hosts | wire | network | KiB | plain Mb/s | encrypted Mb/s | ratio |
|---|---|---|---|---|---|---|---|---|
`)
	rows = slices.Clone(rows)
	slices.SortFunc(rows, func(x, y Row) int {
		return cmp.Or(cmp.Compare(x.Wire, y.Wire), cmp.Compare(x.Host, y.Host), cmp.Compare(x.MTU, y.MTU), cmp.Compare(x.CC, y.CC), cmp.Compare(x.Net, y.Net))
	})
	for _, r := range rows {
		fmt.Fprintf(&b, "| %s | %d | %v | %v | %v | %d | %.1f | %.1f | %.2f |\n", r.CC, r.MTU, r.Host, r.Wire, r.Net,
			r.Plain.Bytes>>10, r.Plain.Mbps(), r.Encrypted.Mbps(), r.Ratio())
	}
	_, err := io.WriteString(w, b.String())
	return err
}
