package crypto

import "unsafe" // compares addresses only

// partial reports whether a and b overlap but begin at different bytes. b must
// not be empty.
func partial(a, b []byte) bool {
	p, q := uintptr(unsafe.Pointer(&a[0])), uintptr(unsafe.Pointer(&b[0]))
	return p != q && p < q+uintptr(len(b)) && q < p+uintptr(len(a))
}
