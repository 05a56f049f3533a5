package vaesgcm

import "golang.org/x/sys/cpu"

// supported is what the CPU has and the operating system lets use: package cpu
// asks XGETBV for what it says of AVX2 and AVX-512.
var supported = func() (s [Forms]bool) {
	const vaes, vpclmulqdq = 1 << 9, 1 << 10
	x := &cpu.X86
	if !x.HasAVX2 || !x.HasAES || !x.HasPCLMULQDQ {
		return s
	}
	const both = vaes | vpclmulqdq
	s[Narrow] = cpuid7()&both == both
	s[Wide] = s[Narrow] && x.HasAVX512F && x.HasAVX512BW && x.HasAVX512DQ && x.HasAVX512VL && x.HasBMI2
	return s
}()

// Supported reports whether this machine has what a form needs.
func Supported(f Form) bool { return f < Forms && supported[f] }
