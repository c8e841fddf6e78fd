// The product every dense convolution comes down to: rows of activations times a panel of columns.
//
// Forward, its gradients and Winograd's 36 products differ only in what the strides mean:
//   1x1 forward      c = output pixels,   a = input pixels (step 1),         b = packed weights
//   k x k forward    one run per kernel row: its pixels and channels are contiguous in memory
//   weight gradient  c = weights,         a = input pixels across (row 1),   b = output gradients
#pragma once

#include <cstdint>

namespace torchweld::kernels {

// Columns of a full panel. Packed weights are panels of this width, the last one as wide as is left
// rounded up to kPanelGroup, with zeros: the same bytes for every instruction set.
inline constexpr int64_t kPanel = 64;
inline constexpr int64_t kPanelGroup = 16;

// What is done to a result on its way to memory as T: + bias, + residual, then clamped to
// [low, high]. A NaN passes the clamp. Without a clamp the bounds are infinite.
template <class T>
struct EpilogueOf {
  const float* bias = nullptr;  // per column, or null
  const T* residual = nullptr;  // laid out as c, or null
  float low = -__builtin_inff();
  float high = __builtin_inff();
};
using Epilogue = EpilogueOf<float>;

// Memory that will be read next. The products before that fetch it, a line a step, so that memory
// is not idle while they compute.
struct Ahead {
  struct Stretch {
    const float* data;
    int64_t size;  // floats
  };
  Stretch stretches[9];  // what is left of them, the next one last
  int64_t count = 0;

  void add(const float* data, int64_t size) { stretches[count++] = {data, size}; }
};

// c[i * c_row + j] = epilogue(sum over r, k of a[r][i * a_row + k * a_step]
//                                              * b[(r * depth + k) * b_row + j])
// where epilogue begins by adding c where `accumulate`: the sum of products cut into pieces errs
// less. Each sum is one chain of fused multiply-adds in the order of r, then k: the same bits on
// every instruction set.
struct GemmArguments {
  int64_t rows;     // of c
  int64_t columns;  // of c, at most kPanel
  const float* const* a;
  int64_t runs;   // pointers in a
  int64_t depth;  // steps of a run
  int64_t a_row;
  int64_t a_step;
  const float* b;  // only `columns` of a row are read
  int64_t b_row;
  float* c;  // only `columns` of a row are written
  int64_t c_row;
  bool accumulate;
  // Rows 3 * i, 3 * i + 1 and 3 * i + 2 read a[i * runs + r] as if they were rows 0, 1 and 2. The
  // few rows of a product alone would wait for each other.
  bool by_threes = false;
  Epilogue epilogue{};
  Ahead* ahead = nullptr;  // what is fetched is taken off it; or null
};

using GemmKernel = void (*)(const GemmArguments& arguments);

// packed[k * width + j] = weight[j * row + k] for k < depth, j < columns; zero for j < width beyond
// them. A panel of packed weights from a matrix whose rows lie along the depth.
using PackKernel = void (*)(const float* weight, int64_t row, int64_t columns, int64_t depth,
                            float* packed, int64_t width);

// sums[i] = the sum of parts[p * stride + i] over p < count, in double and in that order.
using AddUpKernel = void (*)(const float* parts, int64_t count, int64_t stride, int64_t size,
                             float* sums);

// to[i] += from[0][i] + from[1][i] + ... of `count` rows, for i < size rounded up to kPanelGroup.
using AddRowsKernel = void (*)(const float* const* from, int64_t count, int64_t size, float* to);

struct GemmKernels {
  GemmKernel gemm;
  PackKernel pack;
  AddUpKernel add_up;
  AddRowsKernel add_rows;
};

}  // namespace torchweld::kernels
