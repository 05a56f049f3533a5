package fastpath

// ring is a growable double-ended queue; popping keeps the storage, so that a
// flow in steady state allocates nothing.
type ring[T any] struct {
	b    []T // length a power of two, or nil
	head int
	n    int
}

func (r *ring[T]) len() int { return r.n }

// at returns element i, counted from the front.
func (r *ring[T]) at(i int) *T { return &r.b[(r.head+i)&(len(r.b)-1)] }

// push appends a zero element and returns it; the pointer is valid until the
// next push.
func (r *ring[T]) push() *T {
	if r.n == len(r.b) {
		nb := make([]T, max(8, 2*len(r.b)))
		for i := range r.n {
			nb[i] = *r.at(i)
		}
		r.b, r.head = nb, 0
	}
	r.n++
	p := r.at(r.n - 1)
	var zero T
	*p = zero
	return p
}

// pop removes the front element. A large ring that runs empty gives its
// storage back, so that idle flows stay small.
func (r *ring[T]) pop() {
	var zero T
	*r.at(0) = zero
	r.head = (r.head + 1) & (len(r.b) - 1)
	r.n--
	if r.n == 0 {
		// From the start again: the same few cache lines are used.
		r.head = 0
		if len(r.b) > 256 {
			r.b = nil
		}
	}
}

func (r *ring[T]) clear() { *r = ring[T]{} }
