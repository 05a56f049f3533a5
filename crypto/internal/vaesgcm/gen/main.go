// Command gen writes the assembly of package vaesgcm: AES-GCM with the vector
// forms of the AES and carry-less multiplication instructions, once for AVX-512
// and once for CPUs that have them in 256 bits only.
//
// It is a module of its own so that the assembler generator is no dependency of
// the program.
//
// # The stream
//
// A message is worked on as a stream of 16-byte blocks
//
//	[padding] [slot] [data ...] [lengths]
//
// cut into vectors of 4 or 2 lanes. The slot is where the counter has its first
// value: its key stream encrypts the tag, and GHASH takes the block of
// additional data there. Padding at the front makes the lengths fill the last
// lane of the last vector, whatever the length of the data. GHASH sees zeros in
// the padding, which add nothing.
//
// # GHASH
//
// Blocks are byte-reversed and H is multiplied by x, so that a product of two
// needs no shift (the representation of Gueron's "AES-GCM-SIV" and "Intel
// carry-less multiplication" papers). The accumulator has as many lanes as a
// vector; each sums up the blocks of its lane by Horner's rule, in the power of
// H that one vector is worth. In the end the lanes are multiplied by H^lanes ...
// H^1 and added up. One reduction serves a group of up to four vectors.
package main

import (
	"fmt"

	"github.com/mmcloughlin/avo/attr"
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// Offsets in vaesgcm.Key.
const (
	offH8   = 0
	offH12  = 16 // 64-byte vectors
	offH6   = 16 // 32-byte vectors
	offH4   = 32 // H^4, H^3, H^2 and H^1 follow each other
	offH2   = 64
	offH1   = 80
	offH16  = 96  // 64-byte vectors
	offKeys = 112 // round keys
)

// keyLines is how many cache lines a key takes.
const keyLines = (offKeys + 16*15 + 63) / 64

const signature = "func(k *byte, j0lo, j0hi, ylo, yhi, aadBits uint64, dst, src *byte, n uint64)"

func main() {
	ConstraintExpr("amd64")
	constants()
	cpuid7()
	fetch()
	expand(10)
	expand(14)
	ghash()
	for _, rounds := range []int{10, 14} {
		for _, seal := range []bool{true, false} {
			wide(seal, rounds)
			narrow(seal, rounds)
		}
	}
	Generate()
}

// begin starts a seal or open function and documents it.
func begin(seal bool, rounds int, suffix string) {
	verb, sig := "open", signature+" (bad uint64)"
	if seal {
		verb, sig = "seal", signature
	}
	name := fmt.Sprintf("%s%d%s", verb, bits(rounds), suffix)
	TEXT(name, attr.NOSPLIT, sig)
	if seal {
		Doc(name+" encrypts n bytes from src to dst, which may be the same, and writes the",
			"tag behind them. j0 is the counter block and y the block that GHASH takes",
			"first, both as byte-reversed numbers; aadBits is the length of the additional",
			"data.")
	} else {
		Doc(name+" decrypts n bytes from src to dst, which may be the same. The tag is",
			"expected behind src; bad is 0 if it is right. The other arguments are those of",
			"seal. The plaintext is written in any case.")
	}
	Pragma("noescape")
}

func bits(rounds int) int { return map[int]int{10: 128, 14: 256}[rounds] }

// Registers that the seal and open functions have in common.
var (
	key  = RAX
	dst  = RDI // moved so that the stream's blocks lie at multiples of 16
	src  = RSI
	size = R9 // bytes of data
	aad  = RDX
)

// finish ends a function whose tag is in X12: the tag is stored, or compared
// without a branch.
func finish(seal bool) {
	Load(Param("n"), R8)
	if seal {
		Load(Param("dst"), dst)
		VMOVDQU(X12, Mem{Base: dst, Index: R8, Scale: 1})
	} else {
		Load(Param("src"), src)
		VPXOR(Mem{Base: src, Index: R8, Scale: 1}, X12, X12)
		VMOVQ(X12, R8)
		VPEXTRQ(U8(1), X12, R11)
		ORQ(R11, R8)
		Store(R8, Return("bad"))
	}
	VZEROUPPER()
	RET()
}

func at(base Register, disp int) Mem { return Mem{Base: base, Disp: disp} }

// merge interleaves two instruction sequences, so that both execute at once
// where the CPU does not look far enough ahead to see to it.
func merge(a, b []func()) []func() {
	var out []func()
	for i, j := 0, 0; i < len(a) || j < len(b); {
		if j == len(b) || i < len(a) && i*len(b) <= j*len(a) {
			out = append(out, a[i])
			i++
		} else {
			out = append(out, b[j])
			j++
		}
	}
	return out
}

func emit(steps []func()) {
	for _, s := range steps {
		s()
	}
}

// shared are the constants in the data section.
var shared struct {
	bswap, poly, lanes4, lanes2, inc4, inc2, mask, one Mem
}

func constants() {
	vector := func(name string, v ...uint64) Mem {
		m := GLOBL(name, attr.RODATA|attr.NOPTR)
		for i, q := range v {
			DATA(8*i, U64(q))
		}
		return m
	}
	const h, l = 0x0001020304050607, 0x08090a0b0c0d0e0f
	shared.bswap = vector("bswap", l, h, l, h)
	shared.poly = vector("poly", 1, 0xc2<<56, 1, 0xc2<<56)
	shared.lanes4 = vector("lanes4", 0, 0, 1, 0, 2, 0, 3, 0)
	shared.inc4 = vector("inc4", 4, 0, 4, 0, 4, 0, 4, 0)
	shared.lanes2 = vector("lanes2", 0, 0, 1, 0)
	shared.inc2 = vector("inc2", 2, 0, 2, 0)
	// 16 bytes from mask+16-n on begin with n ones.
	shared.mask = vector("mask", ^uint64(0), ^uint64(0), 0, 0)
}

func cpuid7() {
	TEXT("cpuid7", attr.NOSPLIT, "func() (ecx uint32)")
	Doc("cpuid7 returns ECX of CPUID leaf 7.")
	MOVL(U32(7), EAX)
	XORL(ECX, ECX)
	CPUID()
	Store(ECX, Return("ecx"))
	RET()
}

func fetch() {
	TEXT("fetch", attr.NOSPLIT, "func(k *byte)")
	Doc("fetch has the cache fetch a key.")
	Pragma("noescape")
	Load(Param("k"), key)
	for i := range keyLines {
		PREFETCHT0(at(key, 64*i))
	}
	RET()
}
