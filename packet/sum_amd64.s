#include "textflag.h"

// The 32-bit words of a vector are added as 64-bit numbers, the even and the odd
// ones apart, so that no carry is lost.
#define WORDS(MEM, LOAD, EVEN, ODD) \
	VMOVDQU MEM, LOAD         \
	VPSRLQ  $32, LOAD, Y14    \
	VPAND   Y15, LOAD, LOAD   \
	VPADDQ  Y14, ODD, ODD     \
	VPADDQ  LOAD, EVEN, EVEN

// func sumVector(p *byte, n int) uint64
TEXT ·sumVector(SB), NOSPLIT, $0-24
	MOVQ p+0(FP), SI
	MOVQ n+8(FP), CX
	VPCMPEQD Y15, Y15, Y15
	VPSRLQ $32, Y15, Y15
	VPXOR Y0, Y0, Y0
	VPXOR Y1, Y1, Y1
	VPXOR Y2, Y2, Y2
	VPXOR Y3, Y3, Y3
	SUBQ $128, CX
	JB rest
	PCALIGN $32
loop:
	WORDS(0(SI), Y4, Y0, Y1)
	WORDS(32(SI), Y5, Y2, Y3)
	WORDS(64(SI), Y6, Y0, Y1)
	WORDS(96(SI), Y7, Y2, Y3)
	SUBQ $-128, SI
	SUBQ $128, CX
	JAE loop
rest:
	ADDQ $128, CX
	JEQ done
last:
	WORDS(0(SI), Y4, Y0, Y1)
	ADDQ $32, SI
	SUBQ $32, CX
	JNE last
done:
	VPADDQ Y1, Y0, Y0
	VPADDQ Y3, Y2, Y2
	VPADDQ Y2, Y0, Y0
	VEXTRACTI128 $1, Y0, X1
	VPADDQ X1, X0, X0
	VPSHUFD $0x4e, X0, X1
	VPADDQ X1, X0, X0
	VMOVQ X0, ret+16(FP)
	VZEROUPPER
	RET
