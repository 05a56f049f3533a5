package fastpath

import (
	"fmt"

	"github.com/tcpcrypt-xdp/tcpcrypt-xdp/crypto"
)

// checkEngine looks at what must hold between any two calls.
func (n *simNode) checkEngine() {
	e := n.e
	switch {
	case e.buf.used > e.buf.budget:
		n.s.fail("node %d: %d bytes of slabs, the budget is %d", n.id, e.buf.used, e.buf.budget)
	case e.buf.held < 0 || e.buf.held > n.u.Chunks():
		n.s.fail("node %d: %d chunks held", n.id, e.buf.held)
	case n.u.Available()+e.buf.held != n.u.Chunks():
		n.s.fail("node %d: %d chunks free and %d held of %d", n.id, n.u.Available(), e.buf.held, n.u.Chunks())
	case len(e.seal) != 0 || len(e.open) != 0 || len(e.dirty) != 0:
		n.s.fail("node %d: work left after flush", n.id)
	}
	if n.s.steps&15 == 0 {
		for key, f := range n.flows {
			if fl := e.tab.find(&key); fl != nil && fl.state == flowLive {
				if err := checkFlow(fl); err != "" {
					n.s.fail("node %d: %s: %s", n.id, f.name, err)
				}
				if most := fl.innerEdge + 2*bigSize + 2<<fl.localShift; fl.dlvI > most && !f.m[n.id].shrunk {
					n.s.fail("node %d: %s: plaintext to %d, beyond the window of the inner stack, which ends at %d", n.id, f.name, fl.dlvI, fl.innerEdge)
				}
				// Custody is bounded, whatever the inner stack does (T13).
				if c, most := fl.dlvI+1-fl.innerAck, uint64(e.cfg.FlowBudget+crypto.MaxFrame); c > most {
					n.s.fail("node %d: %s: %d bytes in custody, the budget is %d", n.id, f.name, c, most)
				}
			}
		}
	}
}

// checkFlow holds a flow's fields against one another.
func checkFlow(f *flow) string {
	o, i, tx := f.unaO, f.ackI, 0
	for k := range f.recs.len() {
		r := f.recs.at(k)
		if k == 0 {
			o, i = r.o, r.i
			if o > f.unaO || i > f.ackI {
				return fmt.Sprintf("first record at %d/%d, una %d/%d", o, i, f.unaO, f.ackI)
			}
		}
		if r.o != o || r.i != i {
			return fmt.Sprintf("record %d at %d/%d, want %d/%d", k, r.o, r.i, o, i)
		}
		o, i = o+uint64(r.oLen), i+uint64(r.iLen)
		tx += int(r.oLen) - b2i(r.fin)
	}
	if o != f.sealO || i != f.sealI || tx != f.txBytes {
		return fmt.Sprintf("records end at %d/%d of %d bytes, sealed are %d/%d of %d", o, i, tx, f.sealO, f.sealI, f.txBytes)
	}
	if f.unaO > f.sentO || f.sentO > f.sealO || f.ackI > f.sealI {
		return fmt.Sprintf("una %d sent %d sealed %d", f.unaO, f.sentO, f.sealO)
	}
	var set spans
	n := 0
	at := f.nxtO
	for k := range f.ooo {
		s := &f.ooo[k]
		lo := s.o
		if end := lo + uint64(s.n); k == 0 && lo < at && at < end {
			lo = at // a part was taken, the rest waits for memory
		}
		if lo < at || s.n == 0 {
			return fmt.Sprintf("out-of-order segment %d at %d, want %d or more", k, s.o, at)
		}
		at = s.o + uint64(s.n)
		n += int(s.n)
		set.add(lo, at)
	}
	if n != f.oooBytes || len(set) != len(f.runs) {
		return fmt.Sprintf("%d bytes out of order in %d runs, want %d in %d", n, len(set), f.oooBytes, len(f.runs))
	}
	for k, r := range f.runs {
		if set[k] != (span{max(r.s, f.nxtO), r.e}) {
			return fmt.Sprintf("run [%d,%d), want %v", r.s, r.e, set[k])
		}
	}
	if f.pieces.len() > 0 {
		at := f.pieces.at(0).at
		if at > f.innerAck {
			return fmt.Sprintf("custody begins at %d, acknowledged are %d", at, f.innerAck)
		}
		for k := range f.pieces.len() {
			p := f.pieces.at(k)
			if p.at != at {
				return fmt.Sprintf("piece %d at %d, want %d", k, p.at, at)
			}
			at += uint64(p.n)
		}
		if at != f.dlvI {
			return fmt.Sprintf("custody ends at %d, want %d", at, f.dlvI)
		}
	} else if f.innerAck < f.dlvI {
		return fmt.Sprintf("no custody, acknowledged %d of %d", f.innerAck, f.dlvI)
	}
	if f.innerAck > f.sntI || f.sntI > f.dlvI+1 || f.ackSentO > f.nxtO || f.nxtO > f.rxEdge+1 {
		return fmt.Sprintf("inner %d %d %d, outer %d %d %d", f.innerAck, f.sntI, f.dlvI, f.ackSentO, f.nxtO, f.rxEdge)
	}
	return ""
}
