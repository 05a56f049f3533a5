package packet

import "golang.org/x/sys/cpu"

// vectorMin is the length in bytes from which on vectors gain.
const vectorMin = 160

var (
	hasVector = cpu.X86.HasAVX2
	hasWide   = cpu.X86.HasAVX512F && cpu.X86.HasAVX512BW
)

// sumVector returns the sum of the n bytes at p as 32-bit words, for n > 0 that
// are a multiple of 32 and below 2^32.
//
//go:noescape
func sumVector(p *byte, n int) uint64

// copySumVector copies n bytes from src to dst and returns what sumVector does.
//
//go:noescape
func copySumVector(dst, src *byte, n int) uint64

// sumWide and copySumWide are the same for any n, with vectors of 64 bytes.
//
//go:noescape
func sumWide(p *byte, n int) uint64

//go:noescape
func copySumWide(dst, src *byte, n int) uint64
