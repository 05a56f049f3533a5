package matrix

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

var (
	all   = flag.Bool("matrix.all", false, "all cells and all comparisons, not a selection")
	table = flag.String("matrix.table", "", "write the tables to this `file`")
)

// selection is how many cells run without -matrix.all.
const selection = 50

// program is the binary under test: a fresh build, or what TCPCRYPT_PROGRAM
// names.
var program string

func TestMain(m *testing.M) {
	flag.Parse()
	dir, err := os.MkdirTemp("", "tcpcrypt-matrix")
	if err != nil {
		panic(err)
	}
	if program = os.Getenv("TCPCRYPT_PROGRAM"); program == "" {
		if program, err = daemon.Build(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	load, _ := os.ReadFile("/proc/loadavg")
	code := m.Run()
	os.RemoveAll(dir)
	if *table != "" {
		one, _, _ := strings.Cut(string(load), " ")
		if err := writeTable(*table, one); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(code)
}

// The cells cover all triples of values, and the selection all pairs.
func TestCells(t *testing.T) {
	cells := Cells(CongestionControls)
	if again := Cells(CongestionControls); !slices.Equal(cells, again) {
		t.Error("the list differs from one call to the next")
	}
	type values [3][2]int // axis and value
	covered := func(cells []Cell) map[values]bool {
		m := map[values]bool{}
		for _, c := range cells {
			v := c.values(CongestionControls)
			for i := range v {
				for j := range i {
					m[values{{j, v[j]}, {i, v[i]}}] = true
					for k := range j {
						m[values{{k, v[k]}, {j, v[j]}, {i, v[i]}}] = true
					}
				}
			}
		}
		return m
	}
	pairs, triples := covered(cells[:selection]), covered(cells)
	sizes := [5]int{len(CongestionControls), len(MTUs), len(Hosts), len(Wires), len(Nets)}
	n := 1
	for _, s := range sizes {
		n *= s
	}
	for x := range n {
		var v [5]int
		for i, r := 0, x; i < 5; i++ {
			v[i], r = r%sizes[i], r/sizes[i]
		}
		c := Cell{CongestionControls[v[0]], MTUs[v[1]], Hosts[v[2]], Wires[v[3]], Nets[v[4]]}
		if !c.possible() {
			continue
		}
		for i := range v {
			for j := range i {
				if !pairs[values{{j, v[j]}, {i, v[i]}}] {
					t.Fatalf("no cell of the selection has the values of axes %d and %d of %v", j, i, c)
				}
				for k := range j {
					if !triples[values{{k, v[k]}, {j, v[j]}, {i, v[i]}}] {
						t.Fatalf("no cell has the values of axes %d, %d and %d of %v", k, j, i, c)
					}
				}
			}
		}
	}
}

// available returns the kernel's congestion controls.
func available(t *testing.T) []string {
	t.Helper()
	ccs, err := Available()
	if err != nil {
		t.Fatal(err)
	}
	return ccs
}

func newPair(t *testing.T, ctx context.Context, mtu int) *Pair {
	t.Helper()
	p, err := NewPair(ctx, mtu, program)
	if errors.Is(err, lab.ErrPrivilege) {
		t.Skipf("skipped: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// results are what the tests measured, for the tables.
var results struct {
	rows []Row
	loss []LossRow
}

// In every cell both connections deliver every byte.
func TestMatrix(t *testing.T) {
	cells := Cells(available(t))
	if !*all {
		cells = cells[:selection]
	}
	for _, mtu := range MTUs {
		t.Run(fmt.Sprintf("MTU %d", mtu), func(t *testing.T) {
			p := newPair(t, t.Context(), mtu)
			for _, c := range cells {
				if c.MTU != mtu {
					continue
				}
				t.Run(fmt.Sprintf("%s, %v, %v, %v", c.CC, c.Host, c.Wire, c.Net), func(t *testing.T) {
					ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
					defer cancel()
					r, err := p.Cell(ctx, c)
					if err != nil {
						t.Fatal(err)
					}
					t.Logf("plain %.1f Mb/s, encrypted %.1f Mb/s, ratio %.2f", r.Plain.Mbps(), r.Encrypted.Mbps(), r.Ratio())
					results.rows = append(results.rows, r)
				})
			}
		})
	}
}

// writeTable writes what the tests measured; load is the machine's before them.
func writeTable(file, load string) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	machine := fmt.Sprintf("Linux %s, %d CPUs, load average %s before it began, %s", unix.ByteSliceToString(u.Release[:]), runtime.NumCPU(), load, runtime.Version())
	var b bytes.Buffer
	if err := WriteTables(&b, machine, "make test-matrix", results.rows, results.loss); err != nil {
		return err
	}
	return os.WriteFile(file, b.Bytes(), 0o644)
}
