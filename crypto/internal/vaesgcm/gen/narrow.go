package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// Registers of the 256-bit form.
var (
	yLo, yMid, yHi = Y4, Y5, Y6
	yPow           = Y7
	yTmp           = Y8
	yRound         = Y9
	yText          = Y10 // ciphertext when opening; in the end the last block of output
	yTag           = Y11
	yAcc           = Y12
	yPoly          = Y13
	yLast          = Y14 // the last block of input, filled up with zeros
	yCtr           = Y15

	mask = R12 // address of the last block's mask
)

// narrow writes a seal or open function with vectors of 32 bytes. The first
// vector is worked on alone; then come groups of 4, and a last one of 1 to 4.
func narrow(seal bool, rounds int) {
	begin(seal, rounds, "Narrow")
	Load(Param("k"), key)
	Load(Param("n"), size)
	Load(Param("src"), src)
	Load(Param("dst"), dst)
	Load(Param("aadBits"), aad)
	VBROADCASTI128(shared.poly, yPoly)

	Comment("R8: blocks of data, RBX: lanes of padding")
	LEAQ(at(size, 15), R8)
	SHRQ(U8(4), R8)
	MOVQ(R8, RBX)
	ANDQ(U8(1), RBX)

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
	VINSERTI128(U8(1), X15, Y15, Y15)
	VPADDD(shared.lanes2, yCtr, yCtr)

	Comment("The block of additional data")
	Load(Param("ylo"), R11)
	VMOVQ(R11, X12)
	Load(Param("yhi"), R11)
	VPINSRQ(U8(1), R11, X12, X12)

	Comment("The first vector")
	one := ngroup{rounds: rounds, n: 1}
	emit(one.cipher())
	Comment("R13: bytes of the last block, R10: vectors between the first and the last")
	MOVQ(size, R13)
	LEAQ(Mem{Base: R8, Index: RBX, Scale: 1}, R10)
	SHRQ(U8(1), R10)
	SHLQ(U8(4), R8)
	SUBQ(R8, R13)
	ADDQ(U8(16), R13)
	SHLQ(U8(3), size)
	TESTQ(RBX, RBX)
	JNE(LabelRef("padded"))
	VMOVDQA(X0, X11)
	SUBQ(U8(1), R10)
	JB(LabelRef("nothing"))
	VEXTRACTI128(U8(1), Y0, X0)
	VMOVDQU(at(src, 0), X1)
	VPXOR(X1, X0, X0)
	VMOVDQU(X0, at(dst, 0))
	ADDQ(U8(16), src)
	ADDQ(U8(16), dst)
	text := X1
	if seal {
		text = X0
	}
	VPSHUFB(shared.bswap, text, text)
	VINSERTI128(U8(1), text, yAcc, yAcc)
	JMP(LabelRef("body"))
	Label("nothing")
	VMOVQ(size, X0)
	VPINSRQ(U8(1), aad, X0, X0)
	VINSERTI128(U8(1), X0, yAcc, yAcc)
	JMP(LabelRef("end"))
	Label("padded")
	VEXTRACTI128(U8(1), Y0, X11)
	VPXOR(Y0, Y0, Y0)
	VINSERTI128(U8(1), X12, Y0, yAcc)
	SUBQ(U8(1), R10)

	Label("body")
	Comment("The last block of input")
	LEAQ(shared.mask, mask)
	ADDQ(U8(16), mask)
	SUBQ(R13, mask)
	MOVQ(R10, RBX)
	SHLQ(U8(5), RBX)
	ADDQ(src, RBX)
	loadBlock(RBX, R13, X14)

	Comment("Groups of 4")
	SUBQ(U8(4), R10)
	JB(LabelRef("rest"))
	mid := ngroup{seal: seal, rounds: rounds, n: 4}
	advance := func() {
		SUBQ(I32(-128), src)
		SUBQ(I32(-128), dst)
		SUBQ(U8(4), R10)
	}
	if seal {
		Comment("GHASH stays one group behind, so that the cipher does not wait for it")
		emit(mid.cipher())
		emit(mid.text())
		advance()
		JB(LabelRef("drain"))
		Label("loop")
		emit(merge(mid.cipher(), mid.hash(dst, -128)))
		emit(mid.text())
		advance()
		JAE(LabelRef("loop"))
		Label("drain")
		emit(mid.hash(dst, -128))
	} else {
		Label("loop")
		mid.emit()
		advance()
		JAE(LabelRef("loop"))
	}
	Label("rest")
	CMPQ(R10, I8(-3))
	JB(LabelRef("last1"))
	JE(LabelRef("last2"))
	CMPQ(R10, I8(-2))
	JE(LabelRef("last3"))
	for _, n := range []int{4, 3, 2, 1} {
		Label("last" + string(rune('0'+n)))
		g := ngroup{seal: seal, rounds: rounds, n: n, last: true}
		g.emit()
		if n > 1 {
			ADDQ(U8(32*(n-1)), dst)
			JMP(LabelRef("store"))
		}
	}
	Label("store")
	storeBlock(X10, dst, R13)

	Label("end")
	Comment("Sum of the lanes")
	VMOVDQU(at(key, offH2), yPow)
	VPCLMULQDQ(U8(0x00), yPow, yAcc, yLo)
	VPCLMULQDQ(U8(0x11), yPow, yAcc, yHi)
	VPCLMULQDQ(U8(0x01), yPow, yAcc, yMid)
	VPCLMULQDQ(U8(0x10), yPow, yAcc, yTmp)
	VPXOR(yTmp, yMid, yMid)
	reduceNarrow(yLo, yMid, yHi, yPoly, yTmp)
	VEXTRACTI128(U8(1), yHi, X4)
	VPXOR(X4, X6, X12)
	VPSHUFB(shared.bswap, X12, X12)
	VPXOR(X11, X12, X12)
	finish(seal)
}

// reduceNarrow leaves in hi what hi, mid and lo stand for, modulo the polynomial.
func reduceNarrow(lo, mid, hi, poly, t VecPhysical) {
	VPCLMULQDQ(U8(0x01), lo, poly, t)
	VPSHUFD(U8(0x4e), lo, lo)
	VPXOR(t, lo, lo)
	VPXOR(lo, mid, mid)
	VPCLMULQDQ(U8(0x01), mid, poly, t)
	VPSHUFD(U8(0x4e), mid, mid)
	VPXOR(t, hi, hi)
	VPXOR(mid, hi, hi)
}

// loadBlock loads n bytes at p, 1 to 16, and nothing beyond; the rest of x
// becomes zero. RCX, R8, R11 and RBX are overwritten.
func loadBlock(p, n Register, x VecPhysical) {
	CMPQ(n, U8(16))
	JNE(LabelRef("load15"))
	VMOVDQU(at(p, 0), x)
	JMP(LabelRef("loaded"))
	Label("load15")
	XORL(R11.As32(), R11.As32())
	MOVQ(n, RCX)
	CMPQ(n, U8(8))
	JB(LabelRef("load7"))
	MOVQ(at(p, 0), R8)
	JEQ(LabelRef("loadGP"))
	MOVQ(Mem{Base: p, Index: n, Scale: 1, Disp: -8}, R11)
	NEGQ(RCX)
	SHLQ(U8(3), RCX) // 8 * (16 - n), modulo 64
	SHRQ(CL, R11)
	JMP(LabelRef("loadGP"))
	Label("load7")
	CMPQ(n, U8(4))
	JB(LabelRef("load3"))
	MOVL(at(p, 0), R8.As32())
	MOVL(Mem{Base: p, Index: n, Scale: 1, Disp: -4}, EBX)
	SUBQ(U8(4), RCX)
	SHLQ(U8(3), RCX)
	SHLQ(CL, RBX)
	ORQ(RBX, R8)
	JMP(LabelRef("loadGP"))
	Label("load3")
	MOVBLZX(at(p, 0), R8.As32())
	CMPQ(n, U8(1))
	JEQ(LabelRef("loadGP"))
	MOVWLZX(Mem{Base: p, Index: n, Scale: 1, Disp: -2}, EBX)
	SUBQ(U8(2), RCX)
	SHLQ(U8(3), RCX)
	SHLQ(CL, RBX)
	ORQ(RBX, R8)
	Label("loadGP")
	VMOVQ(R8, x)
	VPINSRQ(U8(1), R11, x, x)
	Label("loaded")
}

// storeBlock stores the first n bytes of x, 1 to 16, at p.
func storeBlock(x VecPhysical, p, n Register) {
	CMPQ(n, U8(16))
	JNE(LabelRef("store15"))
	VMOVDQU(x, at(p, 0))
	JMP(LabelRef("stored"))
	Label("store15")
	VMOVQ(x, R8)
	MOVQ(n, RCX)
	CMPQ(n, U8(8))
	JB(LabelRef("store7"))
	VPEXTRQ(U8(1), x, R11)
	MOVQ(R8, at(p, 0))
	JEQ(LabelRef("stored"))
	Comment("The last 8 bytes straddle the halves")
	SHLQ(U8(3), RCX) // 8 * (n - 8), modulo 64
	SHRQ(CL, R8)
	NEGQ(RCX)
	SHLQ(CL, R11)
	ORQ(R8, R11)
	MOVQ(R11, Mem{Base: p, Index: n, Scale: 1, Disp: -8})
	JMP(LabelRef("stored"))
	Label("store7")
	CMPQ(n, U8(4))
	JB(LabelRef("store3"))
	MOVL(R8.As32(), at(p, 0))
	SUBQ(U8(4), RCX)
	SHLQ(U8(3), RCX)
	SHRQ(CL, R8)
	MOVL(R8.As32(), Mem{Base: p, Index: n, Scale: 1, Disp: -4})
	JMP(LabelRef("stored"))
	Label("store3")
	MOVB(R8.As8(), at(p, 0))
	CMPQ(n, U8(1))
	JEQ(LabelRef("stored"))
	SUBQ(U8(2), RCX)
	SHLQ(U8(3), RCX)
	SHRQ(CL, R8)
	MOVW(R8.As16(), Mem{Base: p, Index: n, Scale: 1, Disp: -2})
	Label("stored")
}

// ngroup is the work on 1 to 4 vectors at src. The last vector of the last group
// holds the last block of data and the lengths.
type ngroup struct {
	seal      bool
	rounds, n int
	last      bool
}

var yRegs = []VecPhysical{Y0, Y1, Y2, Y3}

func (g *ngroup) emit() {
	if g.seal {
		emit(g.cipher())
		emit(g.text())
		emit(g.hash(nil, 0))
		return
	}
	emit(merge(g.cipher(), g.hash(src, 0)))
	emit(g.text())
}

// cipher makes the key stream in Y0 to Y3.
func (g *ngroup) cipher() (s []func()) {
	for j := range g.n {
		s = append(s,
			func() { VPSHUFB(shared.bswap, yCtr, yRegs[j]) },
			func() { VPADDD(shared.inc2, yCtr, yCtr) })
	}
	for r := range g.rounds + 1 {
		s = append(s, func() { VBROADCASTI128(at(key, offKeys+16*r), yRound) })
		for j := range g.n {
			y := yRegs[j]
			s = append(s, func() {
				switch r {
				case 0:
					VPXOR(yRound, y, y)
				case g.rounds:
					VAESENCLAST(yRound, y, y)
				default:
					VAESENC(yRound, y, y)
				}
			})
		}
	}
	return s
}

// text adds the data to the key stream and stores the result, which stays in Y0
// to Y3; the last block is left in yText.
func (g *ngroup) text() (s []func()) {
	for j := range g.n {
		y := yRegs[j]
		if g.last && j == g.n-1 {
			x := y.AsX().(VecPhysical)
			s = append(s, func() { VPXOR(yLast.AsX(), x, x) })
			if g.seal {
				s = append(s, func() { VPAND(at(mask, 0), x, x) })
			}
			s = append(s, func() { VMOVDQA(x, yText.AsX()) })
			continue
		}
		s = append(s,
			func() { VPXOR(at(src, 32*j), y, y) },
			func() { VMOVDQU(y, at(dst, 32*j)) })
	}
	return s
}

// hash takes the ciphertext into the accumulator, from memory (and yLast) or, if
// base is nil, from Y0 to Y3.
func (g *ngroup) hash(base Register, disp int) (s []func()) {
	offs := []int{offH2, offH4, offH6, offH8}
	product := func(v VecPhysical, off int, set bool) {
		s = append(s, func() { VBROADCASTI128(at(key, off), yPow) })
		for _, p := range []struct {
			imm uint8
			sum VecPhysical
			add bool
		}{{0x00, yLo, !set}, {0x11, yHi, !set}, {0x01, yMid, !set}, {0x10, yMid, true}} {
			if !p.add {
				s = append(s, func() { VPCLMULQDQ(U8(p.imm), yPow, v, p.sum) })
				continue
			}
			s = append(s,
				func() { VPCLMULQDQ(U8(p.imm), yPow, v, yTmp) },
				func() { VPXOR(yTmp, p.sum, p.sum) })
		}
	}
	product(yAcc, offs[g.n-1], true)
	for j := range g.n {
		v := yRegs[j]
		if base != nil {
			v = yText
		}
		if g.last && j == g.n-1 {
			x := v.AsX().(VecPhysical)
			in := x
			if base != nil {
				in = yLast.AsX().(VecPhysical)
			}
			s = append(s,
				func() { VPSHUFB(shared.bswap, in, x) },
				func() { VMOVQ(size, yTmp.AsX()) },
				func() { VPINSRQ(U8(1), aad, yTmp.AsX(), yTmp.AsX()) },
				func() { VINSERTI128(U8(1), yTmp.AsX(), v, v) })
		} else {
			if base != nil {
				s = append(s, func() { VMOVDQU(at(base, disp+32*j), v) })
			}
			s = append(s, func() { VPSHUFB(shared.bswap, v, v) })
		}
		if j < g.n-1 {
			product(v, offs[g.n-2-j], false)
		} else {
			s = append(s, func() { VPXOR(v, yHi, yHi) })
		}
	}
	s = append(s,
		func() { VPCLMULQDQ(U8(0x01), yLo, yPoly, yTmp) },
		func() { VPSHUFD(U8(0x4e), yLo, yLo) },
		func() { VPXOR(yTmp, yLo, yLo) },
		func() { VPXOR(yLo, yMid, yMid) },
		func() { VPCLMULQDQ(U8(0x01), yMid, yPoly, yTmp) },
		func() { VPSHUFD(U8(0x4e), yMid, yMid) },
		func() { VPXOR(yTmp, yHi, yHi) },
		func() { VPXOR(yMid, yHi, yAcc) })
	return s
}
