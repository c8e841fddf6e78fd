// The tensor cores' products of a warp, D += A B, and where the elements lie in the lanes'
// registers: with g = lane / 4 and t = lane % 4, as the PTX manual has it (warp-level matrix
// instructions),
//
//   mma_s8   A 16 x 32, four k to a word: a[0] = A[g][4t..], a[1] = A[g + 8][4t..],
//            a[2] = A[g][16 + 4t..], a[3] = A[g + 8][16 + 4t..]; B 32 x 8: b[0] = B[4t..][g],
//            b[1] = B[16 + 4t..][g]
//   mma_bf16 and mma_f16: A 16 x 16, two k to a word, the lower in the low bits: a[0] = A[g][2t..],
//            a[1] = A[g + 8][2t..], a[2] = A[g][8 + 2t..], a[3] = A[g + 8][8 + 2t..]; B 16 x 8:
//            b[0] = B[2t..][g], b[1] = B[8 + 2t..][g]
//   D 16 x 8: d[0], d[1] = D[g][2t], D[g][2t + 1]; d[2], d[3] = D[g + 8][2t], D[g + 8][2t + 1]
//
// mma_s8 is exact. The others multiply exactly, add in an order that is the hardware's, and cut off
// what the sum does not hold, toward zero: see https://doi.org/10.7717/peerj-cs.330.
#pragma once

#include "kernels/cuda/lane.h"

#if defined(__CUDACC__)

// Volatile, so that none is moved to where not all lanes of the warp come.
namespace torchweld::kernels::cuda {

TORCHWELD_INLINE void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

TORCHWELD_INLINE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

TORCHWELD_INLINE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace torchweld::kernels::cuda

#else
#include <emulated_mma.h>
#endif
