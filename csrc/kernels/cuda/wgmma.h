// The products of a warpgroup, four warps of a block whose first is a multiple of four, on sm_90a:
// D += A B, exactly, int8 in and int32 out, 64 x N. They go on while the threads do other work. As
// the PTX manual has it (asynchronous warpgroup level matrix instructions), with g = lane / 4 and
// t = lane % 4, warp w of the four has
//
//   A 64 x 32 in registers: rows 16 w + g and + 8, as mma_s8's (mma.h)
//   B 32 x N in shared memory, where a descriptor says
//   D 64 x N: d[4 j + i] = D[16 w + g + i / 2 * 8][8 j + 2 t + i % 2]
//
// What is not said to the hardware is undefined:
//
//   fence_registers()        before a product, if d or a was written since the last one
//   commit_products()        closes a group
//   wait_for_products<n>()   until at most n groups are under way. Before that, d may be neither
//                            read nor written, a and what B holds not written; settle(d) goes
//                            between it and the first use of d
//   fence_shared()           by every thread that wrote B, copies awaited, before the barrier
//   behind
//                            which products read it
#pragma once

#include "kernels/cuda/lane.h"

// The architecture a source is compiled for has these instructions: sm_90a alone.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TORCHWELD_HAS_WGMMA 1
#else
#define TORCHWELD_HAS_WGMMA 0
#endif

namespace torchweld::kernels::cuda {

inline constexpr int kWarpgroup = 128;  // threads
inline constexpr int kProductK = 32;

// B as rows of 128 bytes, 128 k of a column each, in blocks of 8 rows that lie at multiples of 1024
// bytes one behind the other; of a row, the 16 bytes i are at i ^ (row % 8). A product reads 32 of
// the 128 k, those from `address` on.
inline constexpr int kSwizzledRow = 128;
inline constexpr int kSwizzledRows = 1024;
TORCHWELD_INLINE int swizzled(int row, int piece) {
  return row * kSwizzledRow + (piece ^ (row & 7)) * 16;
}
TORCHWELD_INLINE uint64_t swizzled_rows(uint32_t address) {
  constexpr uint64_t kBetweenRows = kSwizzledRows >> 4, kSwizzle128 = 1;
  return uint64_t{(address & 0x3ffffu) >> 4} | kBetweenRows << 32 | kSwizzle128 << 62;
}

}  // namespace torchweld::kernels::cuda

#if defined(__CUDACC__)

namespace torchweld::kernels::cuda {

TORCHWELD_INLINE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

TORCHWELD_INLINE void fence_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
TORCHWELD_INLINE void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
TORCHWELD_INLINE void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kGroups>
TORCHWELD_INLINE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}
template <int kSize>
TORCHWELD_INLINE void settle(int32_t (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

#define TORCHWELD_SUMS_4(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define TORCHWELD_SUMS_16(d, i)                                                   \
  TORCHWELD_SUMS_4(d, i), TORCHWELD_SUMS_4(d, i + 4), TORCHWELD_SUMS_4(d, i + 8), \
      TORCHWELD_SUMS_4(d, i + 12)
#define TORCHWELD_SUMS(d, i) TORCHWELD_SUMS_16(d, i), TORCHWELD_SUMS_16(d, i + 16)

TORCHWELD_INLINE void multiply_async(int32_t (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, 1, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63},"
      " {%64, %65, %66, %67}, %68, p;}"
      : TORCHWELD_SUMS(d, 0), TORCHWELD_SUMS(d, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

TORCHWELD_INLINE void multiply_async(int32_t (&d)[128], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, 1, 0; "
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, "
      "%104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, "
      "%120, %121, %122, %123, %124, %125, %126, %127},"
      " {%128, %129, %130, %131}, %132, p;}"
      : TORCHWELD_SUMS(d, 0), TORCHWELD_SUMS(d, 32), TORCHWELD_SUMS(d, 64), TORCHWELD_SUMS(d, 96)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef TORCHWELD_SUMS
#undef TORCHWELD_SUMS_16
#undef TORCHWELD_SUMS_4

}  // namespace torchweld::kernels::cuda

#else
#include <emulated_wgmma.h>
#endif
