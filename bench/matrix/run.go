package matrix

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// Of the comparison under random loss.
const (
	LossRTT       = 4 * time.Millisecond
	LossSize      = 3 << 20 // bytes; half of that above 2 % loss
	LossRotations = 5
)

// Available returns those of CongestionControls that the kernel has.
func Available() ([]string, error) {
	b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_available_congestion_control")
	if err != nil {
		return nil, err
	}
	have := strings.Fields(string(b))
	var ccs []string
	for _, cc := range CongestionControls {
		if slices.Contains(have, cc) {
			ccs = append(ccs, cc)
		}
	}
	return ccs, nil
}

// Pair is two rigs that differ in the program only.
type Pair struct {
	Plain, Encrypted *Rig
	labs             [2]*lab.Lab
}

// NewPair builds a pair for cells of one MTU.
func NewPair(ctx context.Context, mtu int, binary string) (*Pair, error) {
	p := &Pair{}
	for i, program := range []string{"", binary} {
		var err error
		if p.labs[i], err = lab.New(); err == nil {
			*[]**Rig{&p.Plain, &p.Encrypted}[i], err = NewRig(ctx, p.labs[i], mtu, program)
		}
		if err != nil {
			return nil, errors.Join(err, p.Close())
		}
	}
	return p, nil
}

// Close removes both rigs.
func (p *Pair) Close() error {
	var errs []error
	for _, l := range p.labs {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	return errors.Join(errs...)
}

// Cell transfers the cell's bytes over a plain and an encrypted connection.
func (p *Pair) Cell(ctx context.Context, c Cell) (r Row, err error) {
	r.Cell = c
	if r.Plain, err = p.Plain.Run(ctx, c, c.impair(), c.size()); err != nil {
		return r, fmt.Errorf("plain TCP: %w", err)
	}
	r.Encrypted, err = p.Encrypted.Run(ctx, c, c.impair(), c.size())
	return r, err
}

// Loss compares longer transfers under random loss, LossRotations times. The n-th
// segment of a direction meets the same fate in both connections of a rotation.
// While the median of the ratios is below least there are as many rotations again,
// at most three times as many in all: chance alone varies a ratio by a fifth.
func (p *Pair) Loss(ctx context.Context, cc string, drop, least float64, log func(string)) (LossRow, error) {
	row := LossRow{CC: cc, Drop: drop}
	var mbps [2][]float64
	c := Cell{CC: cc, MTU: 1500}
	size := LossSize
	if drop > 0.02 {
		size /= 2
	}
	for i := range 3 * LossRotations {
		if i > 0 && i%LossRotations == 0 && Median(slices.Sorted(slices.Values(row.Ratios))) >= least {
			break
		}
		im := lab.Impair{Seed: uint64(i + 1), Drop: drop, Rate: 200e6, Delay: LossRTT / 2, QueueBytes: 256 << 10}
		for k, r := range []*Rig{p.Plain, p.Encrypted} {
			t, err := r.Run(ctx, c, im, size)
			if err != nil {
				return row, err
			}
			mbps[k] = append(mbps[k], t.Mbps())
			log(fmt.Sprintf("%s, %g %% loss, %-9s %6.1f Mb/s, %d retransmitted, %d timeouts", cc, 100*drop,
				[...]string{"plain", "encrypted"}[k], t.Mbps(), t.Sender["Tcp.RetransSegs"], t.Sender["TcpExt.TCPTimeouts"]))
		}
		row.Ratios = append(row.Ratios, mbps[1][i]/mbps[0][i])
	}
	for _, x := range [][]float64{mbps[0], mbps[1], row.Ratios} {
		slices.Sort(x)
	}
	row.Plain, row.Encrypted = Median(mbps[0]), Median(mbps[1])
	return row, nil
}
