package slowpath

import "slices"

// Bounds of what is kept of a peer's stream before the flow is installed.
const (
	rxAhead    = 64 << 10 // bytes beyond an unfinished Init message of one flow
	rxTotal    = 64 << 20 // bytes of all half-open flows
	rxFair     = 4 << 10  // bytes of one flow for which there is room in any case: an Init message of usual length
	maxRxSpans = 32       // pieces of one stream, the in-order one included
	openWindow = 16 << 10 // most bytes advertised while half-open (T19)

	// leastWindow is advertised whatever the inner stack's window, as long as
	// the length of the Init message is not known.
	leastWindow = 536
)

type span struct{ from, to int }

// reassembly puts a stream together from its first byte on. The first bytes
// that arrive for an offset are kept.
type reassembly struct {
	buf  []byte
	have []span // sorted, disjoint, not adjacent
}

// inOrder returns how many bytes there are without a gap.
func (r *reassembly) inOrder() int {
	if len(r.have) == 0 || r.have[0].from != 0 {
		return 0
	}
	return r.have[0].to
}

// insert takes the bytes p that begin at stream offset off, as far as they lie
// in [0, edge). It reports whether that brought anything new.
func (r *reassembly) insert(off int, p []byte, edge int) bool {
	if off < 0 {
		p = p[min(-off, len(p)):]
		off = 0
	}
	p = p[:max(0, min(len(p), edge-off))]
	if len(p) == 0 {
		return false
	}
	end := off + len(p)
	// i is the first span that touches the new bytes, j the first behind them.
	i, _ := slices.BinarySearchFunc(r.have, off, func(s span, o int) int { return s.to - o })
	j := i
	for j < len(r.have) && r.have[j].from <= end {
		j++
	}
	if i == j && len(r.have) == maxRxSpans {
		// What comes last in the stream is the first to be sacrificed, so
		// that the gaps before it can always be filled.
		if i == len(r.have) {
			return false
		}
		r.have = r.have[:len(r.have)-1]
	}
	if len(r.buf) < end {
		r.buf = append(r.buf, make([]byte, end-len(r.buf))...)
	}
	at, fresh := off, false
	for _, s := range r.have[i:j] {
		if at < s.from {
			copy(r.buf[at:s.from], p[at-off:])
			fresh = true
		}
		at = max(at, s.to)
	}
	if at < end {
		copy(r.buf[at:end], p[at-off:])
		fresh = true
	}
	all := span{off, end}
	if i < j {
		all = span{min(off, r.have[i].from), max(end, r.have[j-1].to)}
	}
	r.have = slices.Replace(r.have, i, j, all)
	return fresh
}
