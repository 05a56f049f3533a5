package main

import (
	"fmt"

	"github.com/mmcloughlin/avo/attr"
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// expand writes the function that makes a key: the key schedule by
// AESKEYGENASSIST, H, and the powers of H. Nothing in it depends on secrets but
// the values of registers.
func expand(rounds int) {
	name := fmt.Sprintf("expand%d", bits(rounds))
	TEXT(name, attr.NOSPLIT, "func(k, key *byte, wide uint64)")
	Doc(name+" fills k for the functions with wide vectors (wide = 1) or narrow ones (0)",
		fmt.Sprintf("from the %d bytes at key.", bits(rounds)/8))
	Pragma("noescape")
	Load(Param("k"), key)
	Load(Param("key"), RBX)
	VMOVDQU(at(RBX, 0), X0)
	VMOVDQU(X0, at(key, offKeys))
	Comment("X5: the encryption of zeros, round by round")
	VMOVDQA(X0, X5)
	if rounds == 14 {
		VMOVDQU(at(RBX, 16), X1)
	}
	rcon := uint8(1)
	for r := 1; r <= rounds; r++ {
		now, before := X0, X0
		switch {
		case rounds == 10:
			nextWords(X0, X0, rcon, 0xff)
			rcon = double(rcon)
		case r%2 == 0:
			nextWords(X0, X1, rcon, 0xff)
			rcon = double(rcon)
		default:
			now, before = X1, X0
			if r > 1 {
				nextWords(now, before, 0, 0xaa)
			}
		}
		VMOVDQU(now, at(key, offKeys+16*r))
		if r == rounds {
			VAESENCLAST(now, X5, X5)
		} else {
			VAESENC(now, X5, X5)
		}
	}

	Comment("H times x")
	VMOVDQU(shared.poly, X13)
	VPSHUFB(shared.bswap, X5, X5)
	VPSRAD(U8(31), X5, X2)
	VPSHUFD(U8(0xff), X2, X2)
	VPAND(X13, X2, X2)
	VPSRLQ(U8(63), X5, X3)
	VPSLLDQ(U8(8), X3, X3)
	VPSLLQ(U8(1), X5, X5)
	VPOR(X3, X5, X5)
	VPXOR(X2, X5, X5)
	VMOVDQU(X5, at(key, offH1))

	square := func(x VecPhysical, off int) { // x becomes x * x
		times(x, x, x)
		if off >= 0 {
			VMOVDQU(x, at(key, off))
		}
	}
	VMOVDQA(X5, X1)
	square(X1, offH2)
	VMOVDQA(X1, X2)
	times(X5, X1, X5)
	VMOVDQU(X5, at(key, offH4+16))
	VMOVDQA(X5, X3)
	square(X3, offH6)
	square(X2, offH4)
	square(X2, offH8)
	square(X2, offH16)
	Load(Param("wide"), RCX)
	TESTQ(RCX, RCX)
	JEQ(LabelRef("done"))
	square(X3, offH12)
	Label("done")
	Comment("No part of the key stays in registers")
	VZEROALL()
	RET()
}

func double(x uint8) uint8 { return x<<1 ^ x>>7*0x1b }

// nextWords turns x, the round key two (AES-256) or one (AES-128) rounds back,
// into the next one.
func nextWords(x, before VecPhysical, rcon, word uint8) {
	VAESKEYGENASSIST(U8(rcon), before, X2)
	VPSHUFD(U8(word), X2, X2)
	VMOVDQA(x, X3)
	for range 3 {
		VPSLLDQ(U8(4), X3, X3)
		VPXOR(X3, x, x)
	}
	VPXOR(X2, x, x)
}

// times sets out to the product of x and y; X13 is the polynomial, X4 and X6 to
// X8 are overwritten.
func times(x, y, out VecPhysical) {
	VPCLMULQDQ(U8(0x00), y, x, X6)
	VPCLMULQDQ(U8(0x01), y, x, X7)
	VPCLMULQDQ(U8(0x10), y, x, X8)
	VPCLMULQDQ(U8(0x11), y, x, out)
	VPXOR(X8, X7, X7)
	reduceNarrow(X6, X7, out, X13, X4)
}

// ghash writes the function for additional data of more than one block.
func ghash() {
	TEXT("ghash", attr.NOSPLIT, "func(k *byte, y *[2]uint64, p *byte, n uint64)")
	Doc("ghash takes n blocks at p, n > 0, into y, which is byte-reversed, the lower half first.")
	Pragma("noescape")
	Load(Param("k"), key)
	Load(Param("y"), dst)
	Load(Param("p"), src)
	Load(Param("n"), size)
	VMOVDQU(shared.poly, X13)
	VMOVDQU(at(key, offH1), X5)
	VMOVDQU(at(dst, 0), X0)
	Label("loop")
	VMOVDQU(at(src, 0), X1)
	VPSHUFB(shared.bswap, X1, X1)
	VPXOR(X1, X0, X0)
	times(X0, X5, X0)
	ADDQ(U8(16), src)
	SUBQ(U8(1), size)
	JNE(LabelRef("loop"))
	VMOVDQU(X0, at(dst, 0))
	VZEROUPPER()
	RET()
}
