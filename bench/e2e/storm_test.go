package e2e

import (
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// The interface changes more often than the kernel can tell, as when containers
// come and go by the hundred: the daemon goes on, and connections with it.
func TestLinkStorm(t *testing.T) {
	b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
	a, z := b.both()
	secret := b.chatter(canary)
	for range 1000 {
		for _, mtu := range []int{1400, 1500} {
			if err := b.path.A.SetMTU(mtu); err != nil {
				t.Fatal(err)
			}
		}
	}
	f := b.flow(a)
	b.eventually("the connection carries data", func() (string, bool) {
		g, err := a.Flow(b.ctx)
		return "", err == nil && g.BytesOut > f.BytesOut+100000
	})
	select {
	case err := <-secret.sent:
		t.Errorf("the connection ended: %v", err)
	default:
	}
	secret.client.Close()
	secret.server.Close()
	b.idle(a, z)
	b.meet(a, z, b.echo())
}
