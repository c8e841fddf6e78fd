// The product of gemm.h in bfloat16, two steps of a run at a time: the instruction multiplies
// pairs.
#pragma once

#include "kernels/dtype.h"
#include "kernels/gemm.h"

namespace torchweld::kernels {

// c[i * c_row + j] = epilogue(sum over r, k of a[r][i * a_row + k] * weight(r, k, j)), all in
// float32 and rounded once, on its way to memory. Each element is one chain in the order of r, then
// k, whatever else is computed with it. Subnormal numbers count as zero, as the instruction has it.
struct GemmBF16Arguments {
  int64_t rows;     // of c
  int64_t columns;  // of c, at most kPanel
  const BFloat16* const* a;
  int64_t runs;   // pointers in a
  int64_t depth;  // steps of a run
  int64_t a_row;
  // A packed panel: for every run and pair of steps [width][2], where an odd depth ends in a pair
  // of one step and zeros.
  const BFloat16* b;
  int64_t width;  // columns rounded up to kPanelGroup, zeros beyond them
  BFloat16* c;    // only `columns` of a row are written
  int64_t c_row;
  EpilogueOf<BFloat16> epilogue;
};

struct GemmBF16Kernels {
  void (*gemm)(const GemmBF16Arguments& arguments);
};

}  // namespace torchweld::kernels
