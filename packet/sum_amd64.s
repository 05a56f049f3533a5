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

// The same with vectors of 64 bytes, the last of which is masked.
#define ADDW(V, T, EVEN, ODD) \
	VPSRLQ $32, V, T     \
	VPANDQ Z15, V, V     \
	VPADDQ T, ODD, ODD   \
	VPADDQ V, EVEN, EVEN

#define SUMW(DISP, V, T, EVEN, ODD) \
	VMOVDQU64 DISP(SI), V \
	ADDW(V, T, EVEN, ODD)

#define COPYW(DISP, V, T, EVEN, ODD) \
	VMOVDQU64 DISP(SI), V \
	VMOVDQU64 V, DISP(DI) \
	ADDW(V, T, EVEN, ODD)

// WIDE clears the sums and sets the mask of even words.
#define WIDE \
	VPTERNLOGQ $0xff, Z15, Z15, Z15 \
	VPSRLQ $32, Z15, Z15            \
	VPXORQ Z0, Z0, Z0               \
	VPXORQ Z1, Z1, Z1               \
	VPXORQ Z2, Z2, Z2               \
	VPXORQ Z3, Z3, Z3

// TAIL sets K1 to the mask of CX bytes, of which there are less than 64.
#define TAIL \
	MOVQ $-1, AX     \
	SHLQ CX, AX      \
	NOTQ AX          \
	KMOVQ AX, K1

// TOTAL adds up the sums, to X0.
#define TOTAL \
	VPADDQ Z1, Z0, Z0           \
	VPADDQ Z3, Z2, Z2           \
	VPADDQ Z2, Z0, Z0           \
	VEXTRACTI64X4 $1, Z0, Y1    \
	VPADDQ Y1, Y0, Y0           \
	VEXTRACTI128 $1, Y0, X1     \
	VPADDQ X1, X0, X0           \
	VPSHUFD $0x4e, X0, X1       \
	VPADDQ X1, X0, X0

// func sumWide(p *byte, n int) uint64
TEXT ·sumWide(SB), NOSPLIT, $0-24
	MOVQ p+0(FP), SI
	MOVQ n+8(FP), CX
	WIDE
	SUBQ $256, CX
	JB rest
	PCALIGN $32
loop:
	SUMW(0, Z4, Z8, Z0, Z1)
	SUMW(64, Z5, Z9, Z2, Z3)
	SUMW(128, Z6, Z10, Z0, Z1)
	SUMW(192, Z7, Z11, Z2, Z3)
	ADDQ $256, SI
	SUBQ $256, CX
	JAE loop
rest:
	ADDQ $192, CX
	JL tail
each:
	SUMW(0, Z4, Z8, Z0, Z1)
	ADDQ $64, SI
	SUBQ $64, CX
	JGE each
tail:
	ADDQ $64, CX
	TAIL
	VMOVDQU8.Z (SI), K1, Z4
	ADDW(Z4, Z8, Z0, Z1)
	TOTAL
	VMOVQ X0, ret+16(FP)
	VZEROUPPER
	RET

// func copySumWide(dst, src *byte, n int) uint64
TEXT ·copySumWide(SB), NOSPLIT, $0-32
	MOVQ dst+0(FP), DI
	MOVQ src+8(FP), SI
	MOVQ n+16(FP), CX
	WIDE
	SUBQ $256, CX
	JB rest
	PCALIGN $32
loop:
	COPYW(0, Z4, Z8, Z0, Z1)
	COPYW(64, Z5, Z9, Z2, Z3)
	COPYW(128, Z6, Z10, Z0, Z1)
	COPYW(192, Z7, Z11, Z2, Z3)
	ADDQ $256, SI
	ADDQ $256, DI
	SUBQ $256, CX
	JAE loop
rest:
	ADDQ $192, CX
	JL tail
each:
	COPYW(0, Z4, Z8, Z0, Z1)
	ADDQ $64, SI
	ADDQ $64, DI
	SUBQ $64, CX
	JGE each
tail:
	ADDQ $64, CX
	TAIL
	VMOVDQU8.Z (SI), K1, Z4
	VMOVDQU8 Z4, K1, (DI)
	ADDW(Z4, Z8, Z0, Z1)
	TOTAL
	VMOVQ X0, ret+24(FP)
	VZEROUPPER
	RET
