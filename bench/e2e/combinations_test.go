package e2e

import (
	"errors"
	"fmt"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/bench/lab"
	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
)

// turned is the same bed, seen from the other host: what A did, B does.
func (b *bed) turned() *bed {
	c := *b
	c.path = &lab.Path{A: b.path.B, B: b.path.A}
	return &c
}

// Every key agreement with every cipher, opened by either host, over IPv4 and
// IPv6: the daemons agree on what they negotiated, and the data is exact.
func TestCombinations(t *testing.T) {
	const n = 10 << 20
	up, down := stream(1, n), stream(2, n)
	for _, tep := range crypto.AllTEPs {
		for _, aead := range crypto.AllAEADs {
			t.Run(fmt.Sprintf("%v-%v", tep, aead), func(t *testing.T) {
				b := newBed(t, lab.Options{}, lab.ForwarderOptions{})
				a, z := b.both("--teps", tep.String(), "--aeads", aead.String(), "--no-resume")
				for _, side := range []string{"opened by a", "opened by b"} {
					c, opener, other := b, a, z
					if side == "opened by b" {
						c, opener, other = b.turned(), z, a
					}
					for _, v6 := range []bool{false, true} {
						err := c.exchange(v6, up, down, func() {
							fo, fp := b.flow(opener), b.flow(other)
							if fo.Role != "A" || fp.Role != "B" || fo.SessionID == "" || fo.SessionID != fp.SessionID ||
								fo.TEP != tep.String() || fp.TEP != tep.String() || fo.AEAD != aead.String() || fp.AEAD != aead.String() {
								t.Errorf("%s: flows %+v and %+v", side, fo, fp)
							}
						})
						if err != nil {
							t.Fatalf("%s, IPv6 %v: %v", side, v6, err)
						}
						b.noFlows(a)
						b.noFlows(z)
					}
				}
				b.encryptedOnly(a, z, 4)
				if err := errors.Join(a.Stop(), z.Stop()); err != nil {
					t.Error(err)
				}
			})
		}
	}
}
