package e2e

import (
	"net/netip"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
)

// What B says to A takes another interface of both hosts, past their daemons: no
// connection can be encrypted, and the guard must not hold plain ones up for
// longer than it is offered, which the third SYN does not do. The next connection does
// without the offer.
func TestAnswerElsewhere(t *testing.T) {
	eachIP(t, func(t *testing.T, v6 bool) {
		for _, where := range []string{"plain", "A", "A and B"} {
			t.Run(where, func(t *testing.T) {
				b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
				to, at, err := b.path.A.NS.Lab().Connect(b.path.A.NS, b.path.B.NS, lab.LinkOptions{
					Neighbours: true, A: lab.EndOptions{Name: "eth1"}, B: lab.EndOptions{Name: "eth1"},
				})
				if err != nil {
					t.Fatal(err)
				}
				via, dst := to.Addr4(), b.path.A.Addr4()
				if v6 {
					via, dst = to.Addr6(), b.path.A.Addr6()
				}
				if err := at.AddRoute(netip.PrefixFrom(dst, dst.BitLen()), via); err != nil {
					t.Fatal(err)
				}
				daemons := map[string][]*lab.Iface{"A": {b.path.A}, "A and B": {b.path.A, b.path.B}}[where]
				for _, host := range daemons {
					b.daemon(host)
				}
				ln := b.echoAt(v6)
				for i := range 2 {
					before := b.resent(b.path.A.NS)
					_, offers := b.wire.seen()
					c, err := b.path.A.NS.Dial(b.ctx, "tcp", ln.Addr().String())
					if err != nil {
						t.Fatal(err)
					}
					// Of a few, one or the other may be due to a busy machine.
					if n := b.resent(b.path.A.NS) - before; n > 4 {
						t.Errorf("connection %d took %d copies of the SYN", i, n)
					}
					if _, n := b.wire.seen(); i > 0 && n > offers {
						t.Error("encryption was offered again")
					}
					b.guarded(c)
					b.echoed(c, make([]byte, 1<<20))
					c.Close()
				}
			})
		}
	})
}
