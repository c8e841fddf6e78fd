// The transforms of Winograd's minimal filtering F(4x4, 3x3): a 3x3 convolution in 36 products per
// 16 outputs instead of 144.
//
// A tile is 4x4 pixels of the output, which depend on a patch of 6x6 pixels of the input. Each
// transform multiplies a small square by a constant matrix from both sides, for many channels at
// once; what lies between the transforms are 36 matrix products, one for each point:
//   forward          output      = A^T [ sum over c of (G weight G^T) * (B^T input B) ] A
//   input gradient   the same of the output's gradient, with the weight turned and transposed
//   weight gradient  grad_weight = G^T [ sum over tiles of (A grad A^T) * (B^T input B) ] G
//
// The points of the interpolation are 0, +-3/4, +-3/2 and infinity: as many operations as the usual
// 0, +-1, +-2, all coefficients of A and B still exact in float32, and a third of the error
// (Barabasz, Anderson, Soodhalter, Gregg, "Error analysis and improving the accuracy of Winograd
// convolution for deep neural networks", 2020, on the choice of points).
#pragma once

#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/gemm.h"

namespace torchweld::kernels {

inline constexpr int64_t kWinogradTile = 4;  // pixels of a tile, each way
inline constexpr int64_t kWinogradPoints = 36;

// A square of an image of `height` x `width` pixels. What lies outside is read as zeros and not
// written.
struct WinogradWindow {
  int64_t height, width;
  int64_t pixel;  // values from one pixel to the next
  int64_t y, x;   // of the square's first pixel
};

// points[p * point + c] = the transform of channel c in the window.
template <class T>
using WinogradGatherKernel = void (*)(const T* image, const WinogradWindow& window,
                                      int64_t channels, float* points, int64_t point);
// The window = epilogue(the transform of the points). The residual is laid out as the image.
template <class T>
using WinogradScatterKernel = void (*)(const float* points, int64_t point, int64_t channels,
                                       T* image, const WinogradWindow& window,
                                       const EpilogueOf<T>& epilogue);

// Where a weight's values lie: its taps, and what a row is (an input or an output channel). The
// columns are contiguous.
struct WinogradTaps {
  int64_t vertical, horizontal;  // floats from one tap to the next; negative turns the weight
  int64_t row;
};
// points[p * point + r * width + j] = the transform of the weight in row r and column j; zero from
// `columns` to `width`, a multiple of kPanelGroup.
using WinogradWeightKernel = void (*)(const float* weight, const WinogradTaps& taps, int64_t rows,
                                      int64_t columns, float* points, int64_t point, int64_t width);
// The weight's gradient in `rows` x `columns` from points[p * point + r * columns + j].
using WinogradGradWeightKernel = void (*)(const float* points, int64_t point, int64_t rows,
                                          int64_t columns, float* weight, const WinogradTaps& taps);

struct WinogradKernels {
  WinogradGatherKernel<float> input;  // from a patch
  WinogradGatherKernel<BFloat16> input_bf16;
  WinogradGatherKernel<float> grad_output;  // from a tile
  WinogradScatterKernel<float> output;      // to a tile
  WinogradScatterKernel<BFloat16> output_bf16;
  WinogradWeightKernel weight;
  WinogradGradWeightKernel grad_weight;
};

}  // namespace torchweld::kernels
