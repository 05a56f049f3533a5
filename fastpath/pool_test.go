package fastpath

import "testing"

// Flows of the pool do not overlap, and one that was retired comes back only
// after recycle.
func TestFlowPool(t *testing.T) {
	var p flowPool
	seen := make(map[*flow]bool)
	for range 3000 {
		f := p.get()
		if seen[f] {
			t.Fatal("a flow was given twice")
		}
		seen[f] = true
		f.sealO = 7
	}
	var f *flow
	for f = range seen {
		break
	}
	p.retire(f)
	if g := p.get(); g == f || f.sealO != 7 {
		t.Error("a retired flow was used before recycle")
	}
	p.recycle()
	if f.state != flowFree || !f.gone || f.sealO != 0 {
		t.Error("a recycled flow was not cleared")
	}
	if p.get() != f {
		t.Error("a recycled flow was not used")
	}
}

// What packets in order need of a flow is together, and not much.
func TestFlowLayout(t *testing.T) {
	if hotBytes > 18*cacheLine {
		t.Errorf("packets in order need %d bytes of a flow", hotBytes)
	}
}
