package fastpath

import (
	"math/rand/v2"
	"sort"
)

// span is the range [s,e) of stream offsets.
type span struct{ s, e uint64 }

// spans is a set of offsets: sorted ranges that do not touch.
type spans []span

func (p *spans) add(s, e uint64) {
	if s >= e {
		return
	}
	v := *p
	k := sort.Search(len(v), func(k int) bool { return v[k].e >= s })
	j := k
	for j < len(v) && v[j].s <= e {
		s, e = min(s, v[j].s), max(e, v[j].e)
		j++
	}
	if j == k {
		v = append(v, span{})
		copy(v[k+1:], v[k:])
	} else {
		v = append(v[:k+1], v[j:]...)
	}
	v[k] = span{s, e}
	*p = v
}

func (p *spans) dropBelow(o uint64) {
	v := *p
	k := 0
	for k < len(v) && v[k].e <= o {
		k++
	}
	v = append(v[:0], v[k:]...)
	if len(v) > 0 {
		v[0].s = max(v[0].s, o)
	}
	*p = v
}

// next returns the first range that ends above o.
func (p spans) next(o uint64) (span, bool) {
	k := sort.Search(len(p), func(k int) bool { return p[k].e > o })
	if k == len(p) {
		return span{}, false
	}
	return p[k], true
}

func (p spans) covers(s, e uint64) bool {
	r, ok := p.next(s)
	return s >= e || ok && r.s <= s && e <= r.e
}

func (p spans) below(o uint64) (n uint64) {
	for _, r := range p {
		if r.s >= o {
			break
		}
		n += min(r.e, o) - r.s
	}
	return n
}

// Stream contents: one pool of random bytes that is read cyclically from a
// phase of the stream's own, so that a byte tells its place. A canary that must
// never be seen on the wire stands in every 64 bytes.

const (
	poolLen = 1<<20 + 7
	canary  = "plaintext-canary"
)

var pool = func() []byte {
	b := make([]byte, poolLen+1<<17)
	var seed [32]byte
	c := rand.NewChaCha8(seed)
	c.Read(b[:poolLen])
	for i := 0; i+64 <= poolLen; i += 64 {
		copy(b[i:], canary)
	}
	copy(b[poolLen:], b)
	return b
}()

// content returns n bytes, at most 1<<17, at offset o of the stream with the
// given phase.
func content(phase, o uint64, n int) []byte {
	at := (phase + o) % poolLen
	return pool[at : at+uint64(n)]
}
