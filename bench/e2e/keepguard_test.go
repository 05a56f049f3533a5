package e2e

import (
	"strings"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/daemon"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// The guard refuses while the daemon hangs, and, when it is told to stay, after
// SIGTERM, until --cleanup.
func TestKeepGuard(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a := b.daemon(b.path.A, "--require", "--keep-guard")
	b.halt(a)
	// Until the programs notice, SYNs wait for the daemon.
	b.eventually("connections of a hung daemon are refused", func() (string, bool) {
		c, err := b.path.A.NS.Dial(b.ctx, "tcp", b.path.B.Addr4().String()+":9")
		if err == nil {
			c.Close()
		}
		return "", err != nil
	})
	b.refused("while it hangs", false)
	b.resume(a)
	if err := a.Stop(); err != nil {
		t.Error(err)
	}
	for _, v6 := range []bool{false, true} {
		b.refused("after SIGTERM", v6)
		b.turned().refused("after SIGTERM, inwards", v6)
	}
	out, err := daemon.Cleanup(b.ctx, program, b.path.A)
	if err != nil || !strings.Contains(out, "guard removed from") {
		t.Errorf("cleanup: %v %s", err, out)
	}
	if d, g := attached(t, b.path.A); len(d)+len(g) != 0 {
		t.Errorf("still attached: %v %v", d, g)
	}
	b.nothingPinned()
	if err := b.exchange(false, make([]byte, 1000), make([]byte, 1000), nil); err != nil {
		t.Errorf("plain connection after the cleanup: %v", err)
	}
}
