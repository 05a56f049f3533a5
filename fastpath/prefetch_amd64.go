package fastpath

import "unsafe"

// prefetch has the cache fetch lines from p on. It never faults.
//
//go:noescape
func prefetch(p unsafe.Pointer, lines int)
