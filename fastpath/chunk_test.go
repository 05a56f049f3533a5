package fastpath

import (
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
		h := &Host{caps: xdp.Capabilities{MTU: c.mtu}}
		if got := h.fits(c.chunk, c.zeroCopy); got != c.want {
			t.Errorf("MTU %d in chunks of %d, zero-copy %v: fits is %v", c.mtu, c.chunk, c.zeroCopy, got)
		}
	}
}
