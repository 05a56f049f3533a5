package matrix

import (
	"fmt"
	"testing"
)

// Under random loss an encrypted connection keeps most of plain TCP's throughput:
// 0.9 of it with 1 % loss and 0.8 with 5 %, on a machine that does nothing else. The
// default run asks for half, as what else runs is felt by the one more than by the
// other.
func TestLoss(t *testing.T) {
	p := newPair(t, t.Context(), 1500)
	ccs := available(t)
	if !*all {
		ccs = ccs[:1]
	}
	for _, l := range []struct{ drop, least float64 }{{0.01, 0.9}, {0.05, 0.8}} {
		for _, cc := range ccs {
			if !*all {
				l.least = 0.5
			}
			t.Run(fmt.Sprintf("%s, %g %%", cc, 100*l.drop), func(t *testing.T) {
				row, err := p.Loss(t.Context(), cc, l.drop, l.least, func(s string) { t.Log(s) })
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("plain %.1f Mb/s, encrypted %.1f Mb/s, ratios %.2f", row.Plain, row.Encrypted, row.Ratios)
				if m := Median(row.Ratios); m < l.least {
					t.Errorf("encrypted has %.2f of plain TCP's throughput, want %.2f", m, l.least)
				}
				results.loss = append(results.loss, row)
			})
		}
	}
}
