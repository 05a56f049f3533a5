package slowpath

import (
	"fmt"
	"testing"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
)

func TestAlgorithms(t *testing.T) {
	for _, tep := range crypto.AllTEPs {
		for _, aead := range crypto.AllAEADs {
			for _, l := range []link{{}, {v6: true}, {vlan: 7}, {v6: true, vlan: 9}} {
				t.Run(fmt.Sprintf("%v/%v/v6=%v,vlan=%d", tep, aead, l.v6, l.vlan), func(t *testing.T) {
					c := &Config{TEPs: []crypto.TEP{tep}, AEADs: []crypto.AEAD{aead}}
					s := newSim(t, l, c, c)
					if got := s.open(); got != "encrypted" || t.Failed() {
						s.dump()
						t.Fatalf("outcome %s", got)
					}
					if s.a.est.TEP != tep || s.a.est.Session.AEAD() != aead {
						t.Errorf("negotiated %v, %v", s.a.est.TEP, s.a.est.Session.AEAD())
					}
				})
			}
		}
	}
}
