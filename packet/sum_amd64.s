#include "textflag.h"

// The 32-bit words of a vector are added as 64-bit numbers, the even and the odd
// ones apart, so that no carry is lost.
#define ADD(V, EVEN, ODD) \
	VPSRLQ $32, V, Y14    \
	VPAND  Y15, V, V      \
	VPADDQ Y14, ODD, ODD  \
	VPADDQ V, EVEN, EVEN

#define SUM(DISP, V, EVEN, ODD) \
	VMOVDQU DISP(SI), V \
	ADD(V, EVEN, ODD)

#define COPY(DISP, V, EVEN, ODD) \
	VMOVDQU DISP(SI), V \
	VMOVDQU V, DISP(DI) \
	ADD(V, EVEN, ODD)

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
	SUM(0, Y4, Y0, Y1)
	SUM(32, Y5, Y2, Y3)
	SUM(64, Y6, Y0, Y1)
	SUM(96, Y7, Y2, Y3)
	SUBQ $-128, SI
	SUBQ $128, CX
	JAE loop
rest:
	ADDQ $128, CX
	JEQ done
last:
	SUM(0, Y4, Y0, Y1)
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

// func copySumVector(dst, src *byte, n int) uint64
TEXT ·copySumVector(SB), NOSPLIT, $0-32
	MOVQ dst+0(FP), DI
	MOVQ src+8(FP), SI
	MOVQ n+16(FP), CX
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
	COPY(0, Y4, Y0, Y1)
	COPY(32, Y5, Y2, Y3)
	COPY(64, Y6, Y0, Y1)
	COPY(96, Y7, Y2, Y3)
	SUBQ $-128, SI
	SUBQ $-128, DI
	SUBQ $128, CX
	JAE loop
rest:
	ADDQ $128, CX
	JEQ done
last:
	COPY(0, Y4, Y0, Y1)
	ADDQ $32, SI
	ADDQ $32, DI
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
	VMOVQ X0, ret+24(FP)
	VZEROUPPER
	RET
