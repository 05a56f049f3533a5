package fastpath

import (
	"errors"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/xdp"
)

// A packet must be received in one chunk, or in several that are put together,
// but never in pieces that look like packets: in zero-copy mode drivers round a
// chunk's room down to a KiB.
func TestFits(t *testing.T) {
	for _, c := range []struct {
		mtu, chunk     int
		zeroCopy, want bool
	}{
		{1500, smallChunk, false, true},
		{1774, smallChunk, false, true},
		{1775, smallChunk, false, false},
		{1500, smallChunk, true, false},
		{1006, smallChunk, true, true},
		{1500, largeChunk, true, true},
		{3054, largeChunk, true, true},
		{3055, largeChunk, true, false},
		{3055, largeChunk, false, true},
		{3822, largeChunk, false, true},
		{3823, largeChunk, false, false},
	} {
		nic := &xdp.Capabilities{MTU: c.mtu}
		if got := fits(nic, c.chunk, c.zeroCopy); got != c.want {
			t.Errorf("MTU %d in chunks of %d, zero-copy %v: fits is %v", c.mtu, c.chunk, c.zeroCopy, got)
		}
	}
}

// The best mode that works is taken, and the others' reasons are kept.
func TestFirstMode(t *testing.T) {
	native := []xdp.Mode{xdp.ModeZeroCopy, xdp.ModeCopy}
	for _, c := range []struct {
		name    string
		modes   []xdp.Mode
		refused string
		fails   map[xdp.Mode]string
		mode    xdp.Mode
		why     string
		err     string
	}{
		{"best", native, "", nil, xdp.ModeZeroCopy, "", ""},
		{"second", native, "", map[xdp.Mode]string{xdp.ModeZeroCopy: "no"}, xdp.ModeCopy, "zerocopy: no", ""},
		{"none", native, "", map[xdp.Mode]string{xdp.ModeZeroCopy: "no", xdp.ModeCopy: "never"}, 0, "", "zerocopy: no; copy: never"},
		{"only one wanted", native[:1], "", map[xdp.Mode]string{xdp.ModeZeroCopy: "no"}, 0, "", "zerocopy: no"},
		{"last resort", []xdp.Mode{xdp.ModeGeneric}, "copy: no native XDP", nil, xdp.ModeGeneric, "copy: no native XDP", ""},
		{"no last resort", []xdp.Mode{xdp.ModeGeneric}, "copy: no native XDP", map[xdp.Mode]string{xdp.ModeGeneric: "no"}, 0, "", "generic: no"},
	} {
		mode, why, err := firstMode(c.modes, c.refused, func(m xdp.Mode) error {
			if text := c.fails[m]; text != "" {
				return errors.New(text)
			}
			return nil
		})
		text := ""
		if err != nil {
			text = err.Error()
		}
		if mode != c.mode || why != c.why || text != c.err {
			t.Errorf("%s: %v, %q, %q", c.name, mode, why, text)
		}
	}
}
