// The gradient of the int8 linear layer for its input. Tensor cores want neighbours along the sum,
// here the layer's columns, in one word: of the 16 bytes a lane reads, four columns by four input
// features, it makes the words of four input features. The weight becomes floats in registers only.
#include "kernels/cuda/async.h"
#include "kernels/cuda/linear_epilogue.h"
#include "kernels/cuda/mma.h"
#include "kernels/cuda/quantized_linear.h"

namespace torchweld::kernels::cuda {
namespace {

// --- the gradient in parts -----------------------------------------------------------------------

constexpr int kSplitThreads = 256;
constexpr int kSplit = 8;  // elements of a thread

// The upper parts are cut off, so that none overflows, and what is left is exact; the last is
// rounded.
template <int kParts>
TORCHWELD_INLINE void split(float x, uint16_t (&parts)[kParts]) {
  const bool is_finite = (bits_of(x) & 0x7fffffffu) < 0x7f800000u;
#pragma unroll
  for (int i = 0; i < kParts - 1; ++i) {
    parts[i] = is_finite ? static_cast<uint16_t>(bits_of(x) >> 16) : from_vec<BFloat16>(x).bits;
    x = is_finite ? x - float_of(static_cast<uint32_t>(parts[i]) << 16) : 0;
  }
  parts[kParts - 1] = from_vec<BFloat16>(x).bits;
}

template <class T, int kParts>
__global__ void __launch_bounds__(kSplitThreads) split_grad(SplitGradParams params) {
  const int64_t stride = split_stride(params.columns), in_row = stride / kSplit;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kSplitThreads + threadIdx.x;
  const int64_t row = item / in_row, column = item % in_row * kSplit;
  if (row >= params.rows) return;
  const int64_t left = params.columns - column;
  const int count = left < kSplit ? (left > 0 ? static_cast<int>(left) : 0) : kSplit;
  T grad[kSplit];
  load_group(static_cast<const T*>(params.grad) + row * params.grad_stride + column, count, grad);
  uint16_t parts[kParts][kSplit];
#pragma unroll
  for (int i = 0; i < kSplit; ++i) {
    const float x = i < count ? to_vec(grad[i]) * params.weight_scale[column + i] : 0.0f;
    uint16_t of_one[kParts];
    split(x, of_one);
#pragma unroll
    for (int part = 0; part < kParts; ++part) parts[part][i] = of_one[part];
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    Word word;
    memcpy(&word, parts[part], sizeof word);
    *reinterpret_cast<Word*>(params.parts + (row * kParts + part) * stride + column) = word;
  }
}

template <class T, int kParts>
cudaError_t launch_split(const SplitGradParams& params, cudaStream_t stream) {
  const int64_t items = params.rows * (split_stride(params.columns) / kSplit);
  return launch(split_grad<T, kParts>, (items + kSplitThreads - 1) / kSplitThreads, kSplitThreads,
                stream, params);
}

// --- the product ---------------------------------------------------------------------------------

constexpr int kThreads = 128;
constexpr int kStages = 3;
constexpr int kPanels = 2;            // in a step
constexpr int kPanelBytes = 16 * 64;  // of 64 input features
constexpr int kTileFeatures = 64;     // two by two warps, each with 32 x 32
constexpr int kTileRows = 64;
constexpr int kTiles = 4;  // of 8 rows, in a warp
constexpr int kRowBytes = kPanels * 16 * 2;

template <int kParts>
constexpr int kStageBytes = kPanels * kPanelBytes + kParts * kTileRows * kRowBytes;

// Pieces of 16 bytes of a row are kept where the lanes that read at once find all banks.
TORCHWELD_INLINE int place_of(int row, int piece) { return piece ^ ((row >> 1 & 1) << 1); }

struct Place {
  TORCHWELD_INLINE explicit Place(const QuantizedLinearBackwardParams& params) {
    const int64_t across = (params.in_features + kTileFeatures - 1) / kTileFeatures;
    row = blockIdx.x / across * kTileRows;
    feature = blockIdx.x % across * kTileFeatures;
  }
  int64_t row, feature;
};

template <int kParts>
TORCHWELD_INLINE void copy_step(const QuantizedLinearBackwardParams& params, const Place& at,
                                int64_t step, unsigned char* stage) {
  const int64_t stride = split_stride(params.columns);
  const auto thread = static_cast<int>(threadIdx.x);
  {
    const int64_t panel = step * kPanels + thread / 64, quad = at.feature / kQuad + thread % 64 / 4;
    const int8_t* from =
        params.panels + ((panel * params.quads + quad) * kPanelColumns + thread % 4 * 4) * kQuad;
    copy_async(stage + thread * 16, from,
               panel * kPanelColumns < params.columns && quad < params.quads);
  }
  static_assert(kThreads == kPanels * 64);
  stage += kPanels * kPanelBytes;
#pragma unroll
  for (int i = 0; i < kParts * kTileRows * 4 / kThreads; ++i) {
    const int piece = i * kThreads + thread, line = piece / 4, part = line / kTileRows;
    const int64_t row = at.row + line % kTileRows;
    const int64_t column = step * kPanels * kPanelColumns + piece % 4 * 8;
    copy_async(stage + line * kRowBytes + place_of(line, piece % 4) * 16,
               params.parts + (row * kParts + part) * stride + column,
               row < params.rows && column < stride);
  }
}

// The integers in byte `i` of two words, as two bfloat16. 2^23 + u is what bits u make of the float
// 2^23.
TORCHWELD_INLINE uint32_t pair_of(uint32_t low, uint32_t high, int i) {
  const auto value = [i](uint32_t word) {
    const uint32_t with_offset = word >> (8 * i) & 0xffu;
    return bits_of(float_of(0x4b000000u | with_offset) - 8388736.0f);
  };
  return value(low) >> 16 | (value(high) & 0xffff0000u);
}

template <int kParts>
TORCHWELD_INLINE void multiply(const unsigned char* stage, int feature, int row,
                               float (&sum)[kTiles][2][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    Word w = *reinterpret_cast<const Word*>(stage + panel * kPanelBytes + (feature / 4 + g) * 64 +
                                            t * 16);
    w = {w.x ^ 0x80808080u, w.y ^ 0x80808080u, w.z ^ 0x80808080u, w.w ^ 0x80808080u};
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i / 2][i % 2] = pair_of(w.x, w.y, i);
      a[i / 2][i % 2 + 2] = pair_of(w.z, w.w, i);
    }
    // Tensor cores cut off what a sum does not hold. So the least parts come first, and the sums
    // over panels are rounded ones.
    float products[kTiles][2][4] = {};
#pragma unroll
    for (int part = kParts - 1; part >= 0; --part) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int line = part * kTileRows + row + tile * 8 + g;
        const unsigned char* from = stage + kPanels * kPanelBytes + line * kRowBytes +
                                    place_of(line, panel * 2 + t / 2) * 16 + t % 2 * 8;
        uint32_t b[2];
        memcpy(b, __builtin_assume_aligned(from, 8), sizeof b);
        mma_bf16(products[tile][0], a[0], b);
        mma_bf16(products[tile][1], a[1], b);
      }
    }
#pragma unroll
    for (int i = 0; i < 8 * kTiles; ++i) {
      sum[i / 8][i / 4 % 2][i % 4] += products[i / 8][i / 4 % 2][i % 4];
    }
  }
}

template <int kParts>
__global__ void __launch_bounds__(kThreads)
    multiply_backward(QuantizedLinearBackwardParams params) {
  TORCHWELD_DYNAMIC_SHARED(memory);
  const Place at(params);
  const int64_t panels = (params.columns + kPanelColumns - 1) / kPanelColumns;
  const int64_t steps = (panels + kPanels - 1) / kPanels;
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) copy_step<kParts>(params, at, step, memory + step * kStageBytes<kParts>);
    commit_copies();
  }
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int feature = warp % 2 * 32, row = warp / 2 * 8 * kTiles;
  // Of tile j: input features 4 g + 2 i and 4 g + 2 i + 1, rows 2 t and 2 t + 1.
  float sum[kTiles][2][4] = {};
  for (int64_t step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    const int64_t next = step + kStages - 1;
    if (next < steps) {
      copy_step<kParts>(params, at, next, memory + next % kStages * kStageBytes<kParts>);
    }
    commit_copies();
    multiply<kParts>(memory + step % kStages * kStageBytes<kParts>, feature, row, sum);
  }
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t first = at.feature + feature + 4 * g;
  if (first >= params.in_features) return;
  const int64_t left = params.in_features - first;
  const int count = left < 4 ? static_cast<int>(left) : 4;
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int64_t to_row = at.row + row + i / 2 * 8 + 2 * t + i % 2;
    if (to_row >= params.rows) return;
    float four[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) four[j] = sum[i / 2][j / 2][j % 2 * 2 + i % 2];
    store_four(params.output, params.dtype, to_row * params.in_features + first, count, four);
  }
}

template <int kParts>
cudaError_t launch_product(const QuantizedLinearBackwardParams& params, cudaStream_t stream) {
  const int64_t blocks = ((params.rows + kTileRows - 1) / kTileRows) *
                         ((params.in_features + kTileFeatures - 1) / kTileFeatures);
  return launch_with_shared(multiply_backward<kParts>, blocks, kThreads,
                            kStages * kStageBytes<kParts>, stream, params);
}

}  // namespace

cudaError_t launch_split_grad(DType dtype, const SplitGradParams& params, cudaStream_t stream) {
  if (dtype == DType::float32) return launch_split<float, 3>(params, stream);
  if (dtype == DType::bfloat16) return launch_split<BFloat16, 2>(params, stream);
  if (dtype == DType::float16) return launch_split<Float16, 2>(params, stream);
  return cudaErrorInvalidValue;
}

cudaError_t launch_quantized_linear_backward(const QuantizedLinearBackwardParams& params,
                                             cudaStream_t stream) {
  return split_parts(params.dtype) == 3 ? launch_product<3>(params, stream)
                                        : launch_product<2>(params, stream);
}

}  // namespace torchweld::kernels::cuda
