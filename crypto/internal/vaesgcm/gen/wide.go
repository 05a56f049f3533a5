package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// Registers of the AVX-512 form. Z16 to Z30 hold the round keys.
var (
	zTag  = Z11
	zAcc  = Z12 // the block of additional data in its lane, then the accumulator
	zPoly = Z13
	zInc  = Z14
	zCtr  = Z15
	zSwap = Z31

	kFirst = K1 // bytes of the first vector that are data
	kSlot  = K2 // the slot, in quadwords
	kLast  = K3 // bytes of the group's last vector that are data
	kEdge  = K4 // kFirst and kLast, for a group of one vector
	kLen   = K5 // the last lane, in quadwords; empty unless the lengths stand there
)

func zKey(i int) VecPhysical { return zRegs[16+i] }

var zRegs = []VecPhysical{
	Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z8, Z9, Z10, Z11, Z12, Z13, Z14, Z15,
	Z16, Z17, Z18, Z19, Z20, Z21, Z22, Z23, Z24, Z25, Z26, Z27, Z28, Z29, Z30, Z31,
}

// wide writes a seal or open function with vectors of 64 bytes. The first group
// of vectors has 1 to 4 of them, so that all others have 4.
func wide(seal bool, rounds int) {
	begin(seal, rounds, "Wide")
	Load(Param("k"), key)
	Load(Param("n"), size)
	Load(Param("src"), src)
	Load(Param("dst"), dst)
	Load(Param("aadBits"), aad)

	Comment("R8: blocks with slot and lengths, R10: vectors, RBX: lanes of padding")
	LEAQ(at(size, 15+2*16), R8)
	SHRQ(U8(4), R8)
	LEAQ(at(R8, 3), R10)
	SHRQ(U8(2), R10)
	MOVQ(R10, RBX)
	SHLQ(U8(2), RBX)
	SUBQ(R8, RBX)

	Comment("Counters, less what the padding takes")
	Load(Param("j0lo"), R11)
	MOVQ(R11, R12)
	SHRQ(U8(32), R12)
	SHLQ(U8(32), R12)
	SUBL(EBX, R11.As32())
	ORQ(R12, R11)
	VMOVQ(R11, X15)
	Load(Param("j0hi"), R12)
	VPINSRQ(U8(1), R12, X15, X15)
	VSHUFI64X2(U8(0), zCtr, zCtr, zCtr)
	VPADDD(shared.lanes4, zCtr, zCtr)
	VBROADCASTI32X4(shared.bswap, zSwap)
	VBROADCASTI32X4(shared.poly, zPoly)
	VMOVDQU64(shared.inc4, zInc)
	for i := range rounds + 1 {
		VBROADCASTI32X4(at(key, offKeys+16*i), zKey(i))
	}

	Comment("Masks: RCX is the slot's distance in bytes from the first lane")
	MOVQ(I32(-1), R12)
	MOVQ(RBX, RCX)
	SHLQ(U8(1), RCX)
	MOVL(U32(3), R11.As32())
	SHLXQ(RCX, R11, R11)
	KMOVQ(R11, kSlot)
	SHLQ(U8(3), RCX)
	ADDQ(U8(16), RCX)
	SHLXQ(RCX, R12, R11)
	SUBQ(RCX, src)
	SUBQ(RCX, dst)
	Comment("A shift by 64 is none, and then the first vector has no data")
	XORL(R8.As32(), R8.As32())
	CMPQ(RCX, U8(64))
	CMOVQEQ(R8, R11)
	KMOVQ(R11, kFirst)
	Comment("R13: data bytes of the last vector, R10: groups of four that follow the first")
	ADDQ(size, RCX)
	LEAQ(at(R10, -1), R13)
	MOVQ(R13, RBX)
	ANDQ(U8(3), RBX)
	SHLQ(U8(6), R13)
	SUBQ(R13, RCX)
	MOVQ(RCX, R13)
	BZHIQ(R13, R12, R13)
	DECQ(R10)
	SHRQ(U8(2), R10)
	MOVL(U32(0xc0), R8.As32())
	MOVQ(R13, RCX)
	XORL(R11.As32(), R11.As32())
	TESTQ(R10, R10)
	CMOVQNE(R12, RCX)
	CMOVQNE(R11, R8)
	KMOVQ(RCX, kLast)
	KMOVQ(R8, kLen)
	KANDQ(kFirst, kLast, kEdge)

	Comment("The block of additional data, in the slot's lane")
	Load(Param("ylo"), R11)
	VMOVQ(R11, X12)
	Load(Param("yhi"), R11)
	VPINSRQ(U8(1), R11, X12, X12)
	VSHUFI64X2_Z(U8(0), zAcc, zAcc, kSlot, zAcc)

	SHLQ(U8(3), size)
	CMPQ(RBX, U8(1))
	JB(LabelRef("first1"))
	JE(LabelRef("first2"))
	CMPQ(RBX, U8(2))
	JE(LabelRef("first3"))
	for _, n := range []int{4, 3, 2, 1} {
		Label("first" + string(rune('0'+n)))
		g := group{seal: seal, rounds: rounds, n: n, first: true, last: true}
		g.emit()
		ADDQ(I32(64*n), src)
		ADDQ(I32(64*n), dst)
		if n > 1 {
			JMP(LabelRef("more"))
		}
	}
	Label("more")
	SUBQ(U8(1), R10)
	JB(LabelRef("end"))
	JE(LabelRef("last"))
	mid := group{seal: seal, rounds: rounds, n: 4}
	advance := func() {
		ADDQ(I32(256), src)
		ADDQ(I32(256), dst)
		SUBQ(U8(1), R10)
	}
	if seal {
		Comment("GHASH stays one group behind, so that the cipher does not wait for it")
		emit(mid.cipher())
		emit(mid.text())
		advance()
		JEQ(LabelRef("drain"))
		Label("loop")
		emit(merge(mid.cipher(), mid.hash(dst, -256)))
		emit(mid.text())
		advance()
		JNE(LabelRef("loop"))
		Label("drain")
		emit(mid.hash(dst, -256))
	} else {
		Label("loop")
		mid.emit()
		advance()
		JNE(LabelRef("loop"))
	}
	Label("last")
	KMOVQ(R13, kLast)
	MOVL(U32(0xc0), R8.As32())
	KMOVQ(R8, kLen)
	end := group{seal: seal, rounds: rounds, n: 4, last: true}
	end.emit()
	ADDQ(I32(256), src)
	ADDQ(I32(256), dst)

	Label("end")
	Comment("Sum of the lanes")
	VMOVDQU64(at(key, offH4), Z7)
	multiply(zAcc, Z7, true, Z4, Z5, Z6, Z8, Z9)
	reduceWide(Z4, Z5, Z6, zAcc, Z8)
	VEXTRACTI64X4(U8(1), zAcc, Y4)
	VPXOR(Y4, Y12, Y12)
	VEXTRACTI128(U8(1), Y12, X4)
	VPXOR(X4, X12, X12)
	VPSHUFB(shared.bswap, X12, X12)
	VPXOR(X11, X12, X12)
	finish(seal)
}

// multiply makes the three parts of the product of the lanes of x and h, or adds
// them to what lo, mid and hi hold.
func multiply(x, h VecPhysical, set bool, lo, mid, hi, t, u VecPhysical) {
	if set {
		VPCLMULQDQ(U8(0x00), h, x, lo)
		VPCLMULQDQ(U8(0x11), h, x, hi)
		VPCLMULQDQ(U8(0x01), h, x, mid)
		VPCLMULQDQ(U8(0x10), h, x, t)
		VPXORQ(t, mid, mid)
		return
	}
	VPCLMULQDQ(U8(0x00), h, x, t)
	VPCLMULQDQ(U8(0x11), h, x, u)
	VPXORQ(t, lo, lo)
	VPXORQ(u, hi, hi)
	VPCLMULQDQ(U8(0x01), h, x, t)
	VPCLMULQDQ(U8(0x10), h, x, u)
	VPTERNLOGQ(U8(0x96), t, u, mid)
}

// reduceWide sets out to what hi, mid and lo stand for, modulo the polynomial.
func reduceWide(lo, mid, hi, out, t VecPhysical) {
	VPCLMULQDQ(U8(0x01), lo, zPoly, t)
	VPSHUFD(U8(0x4e), lo, lo)
	VPTERNLOGQ(U8(0x96), t, lo, mid)
	VPCLMULQDQ(U8(0x01), mid, zPoly, t)
	VPSHUFD(U8(0x4e), mid, mid)
	VPXORQ(t, hi, out)
	VPXORQ(mid, out, out)
}

// group is the work on 1 to 4 vectors at src.
type group struct {
	seal        bool
	rounds, n   int
	first, last bool // has the slot; may have the lengths
}

func (g *group) emit() {
	if g.seal {
		emit(g.cipher())
		emit(g.text())
		emit(g.hash(nil, 0))
		return
	}
	emit(merge(g.cipher(), g.hash(src, 0)))
	emit(g.text())
}

// mask returns the mask of vector j's data, nil if all of it is data.
func (g *group) mask(j int) Register {
	first, last := g.first && j == 0, g.last && j == g.n-1
	switch {
	case first && last:
		return kEdge
	case first:
		return kFirst
	case last:
		return kLast
	}
	return nil
}

// cipher makes the key stream in Z0 to Z3.
func (g *group) cipher() (s []func()) {
	for j := range g.n {
		s = append(s,
			func() { VPSHUFB(zSwap, zCtr, zRegs[j]) },
			func() { VPADDD(zInc, zCtr, zCtr) })
	}
	for j := range g.n {
		s = append(s, func() { VPXORQ(zKey(0), zRegs[j], zRegs[j]) })
	}
	for r := 1; r < g.rounds; r++ {
		for j := range g.n {
			s = append(s, func() { VAESENC(zKey(r), zRegs[j], zRegs[j]) })
		}
	}
	for j := range g.n {
		s = append(s, func() { VAESENCLAST(zKey(g.rounds), zRegs[j], zRegs[j]) })
	}
	return s
}

// text adds the data to the key stream and stores the result, which stays in Z0
// to Z3 with zeros where there is no data.
func (g *group) text() (s []func()) {
	for j := range g.n {
		z, k := zRegs[j], g.mask(j)
		if g.first && j == 0 {
			s = append(s, func() { VPCOMPRESSQ_Z(z, kSlot, zTag) })
		}
		if k == nil {
			s = append(s,
				func() { VPXORQ(at(src, 64*j), z, z) },
				func() { VMOVDQU64(z, at(dst, 64*j)) })
			continue
		}
		s = append(s,
			func() { VMOVDQU8_Z(at(src, 64*j), k, Z7) },
			func() { VPXORQ(Z7, z, z) },
			func() { VMOVDQU8(z, k, at(dst, 64*j)) })
		if g.seal {
			s = append(s, func() { VMOVDQU8_Z(z, k, z) })
		}
	}
	return s
}

// hash takes the ciphertext into the accumulator, from memory or, if base is nil,
// from Z0 to Z3.
func (g *group) hash(base Register, disp int) (s []func()) {
	offs := []int{offH4, offH8, offH12, offH16}
	lo, mid, hi, x, h, t, u := Z4, Z5, Z6, Z7, Z8, Z9, Z10
	set := true
	product := func(v VecPhysical, off int) {
		start := set
		set = false
		s = append(s, func() { VBROADCASTI32X4(at(key, off), h) })
		if start {
			s = append(s,
				func() { VPCLMULQDQ(U8(0x00), h, v, lo) },
				func() { VPCLMULQDQ(U8(0x11), h, v, hi) },
				func() { VPCLMULQDQ(U8(0x01), h, v, mid) },
				func() { VPCLMULQDQ(U8(0x10), h, v, t) },
				func() { VPXORQ(t, mid, mid) })
			return
		}
		s = append(s,
			func() { VPCLMULQDQ(U8(0x00), h, v, t) },
			func() { VPCLMULQDQ(U8(0x11), h, v, u) },
			func() { VPXORQ(t, lo, lo) },
			func() { VPXORQ(u, hi, hi) },
			func() { VPCLMULQDQ(U8(0x01), h, v, t) },
			func() { VPCLMULQDQ(U8(0x10), h, v, u) },
			func() { VPTERNLOGQ(U8(0x96), t, u, mid) })
	}
	if !g.first {
		product(zAcc, offs[g.n-1])
	}
	for j := range g.n {
		v := x
		if base == nil {
			v = zRegs[j]
		} else if k := g.mask(j); k != nil {
			s = append(s, func() { VMOVDQU8_Z(at(base, disp+64*j), k, x) })
		} else {
			s = append(s, func() { VMOVDQU64(at(base, disp+64*j), x) })
		}
		s = append(s, func() { VPSHUFB(zSwap, v, v) })
		if g.first && j == 0 {
			s = append(s, func() { VPXORQ(zAcc, v, v) })
		}
		if j < g.n-1 {
			product(v, offs[g.n-2-j])
			continue
		}
		if g.last {
			s = append(s,
				func() { VMOVQ(size, X8) },
				func() { VPINSRQ(U8(1), aad, X8, X8) },
				func() { VSHUFI64X2_Z(U8(0), Z8, Z8, kLen, Z8) },
				func() { VPXORQ(Z8, v, v) })
		}
		if set {
			return append(s, func() { VMOVDQA64(v, zAcc) })
		}
		s = append(s, func() { VPXORQ(v, hi, hi) })
	}
	return append(s, func() { reduceWide(lo, mid, hi, zAcc, t) })
}
