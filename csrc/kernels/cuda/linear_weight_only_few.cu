// The weight-only product of few rows, as fast as the weight comes from memory. A block has 32
// columns; its warps take spans of K in turn, and ask for the next span before they multiply this
// one: 4 KB a warp are on their way. The sums of the warps are added in their order.
#include "kernels/cuda/linear_epilogue.h"
#include "kernels/cuda/linear_units.h"
#include "kernels/cuda/linear_weight_only.h"

namespace torchweld::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSteps = 4;  // of a span
constexpr int kSpanUnits = kSteps * kUnitsOfStep;
constexpr int kRowStride = 36;  // no conflicts

// Activations of a unit, and their product.
template <class T>
struct Activations {
  static constexpr int kWords = 2;
  using Weights = Int8Weights<T>;
  static TORCHWELD_INLINE void load(const T* from, bool exists, uint32_t (&to)[kWords]) {
    load_unit(from, exists, to);
  }
  static TORCHWELD_INLINE void multiply(const StepWeights<Weights>& step,
                                        const uint32_t (&b)[kWords], StepSums<float>& sums) {
    step.multiply(b, sums);
  }
};

// float32 x = first + second + third, each cut off behind the eight bits of a bfloat16.
template <>
struct Activations<float> {
  static constexpr int kWords = 4;
  using Weights = Int8Weights<BFloat16>;
  static TORCHWELD_INLINE void load(const float* from, bool exists, uint32_t (&to)[kWords]) {
    const Word words = exists ? *reinterpret_cast<const Word*>(from) : Word{0, 0, 0, 0};
    to[0] = words.x;
    to[1] = words.y;
    to[2] = words.z;
    to[3] = words.w;
  }
  static TORCHWELD_INLINE void multiply(const StepWeights<Weights>& step,
                                        const uint32_t (&x)[kWords], StepSums<float>& sums) {
    float rest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) rest[i] = float_of(x[i]);
#pragma unroll
    for (int part = 0; part < 3; ++part) {
      uint32_t b[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) b[i] = take_pair(rest[2 * i], rest[2 * i + 1]);
      step.multiply(b, sums);
    }
  }
};

template <class T, int kTiles>
__global__ void __launch_bounds__(kThreads, 2) few_rows(WeightOnlyParams p) {
  using Of = Activations<T>;
  __shared__ float shared[kWarps * kTiles * kTokens * kRowStride];
  const StepLane lane;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t panels = (p.columns + kPanelColumns - 1) / kPanelColumns, pairs = (panels + 1) / 2;
  const int64_t pair = blockIdx.x % pairs, row = blockIdx.x / pairs * (kTiles * kTokens);
  const int64_t left = p.rows - row;
  const int rows = left < kTiles * kTokens ? static_cast<int>(left) : kTiles * kTokens;
  const int quads = static_cast<int>((p.in_features + kQuad - 1) / kQuad);
  const int64_t panel = 2 * pair + lane.panel;
  const int8_t* weights = p.panels + panel * quads * kUnitBytes + lane.chunk * 16;
  const T* input = static_cast<const T*>(p.input) + row * p.input_stride;

  const auto ask = [&](int span, Word(&words)[kSteps]) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int unit = span * kSpanUnits + i * kUnitsOfStep + lane.t;
      words[i] = load_weights(weights + int64_t{kUnitBytes} * unit, unit < quads && panel < panels);
    }
  };
  StepSums<float> sums[kTiles];
  Word words[kSteps];
  ask(warp, words);
  const int rounds = (quads + kWarps * kSpanUnits - 1) / (kWarps * kSpanUnits);
  for (int round = 0; round < rounds; ++round) {
    const int span = round * kWarps + warp;
    Word next[kSteps];
    ask(span + kWarps, next);
    uint32_t b[kSteps][kTiles][Of::kWords];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int unit = span * kSpanUnits + i * kUnitsOfStep + lane.t;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int token = n * kTokens + lane.g;
        Of::load(input + token * p.input_stride + kQuad * unit, unit < quads && token < rows,
                 b[i][n]);
      }
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const StepWeights<typename Of::Weights> step(words[i]);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) Of::multiply(step, b[i][n], sums[n]);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) words[i] = next[i];
  }

  const auto place = [&](int of_warp, int of_row) {
    return shared + (of_warp * kTiles * kTokens + of_row) * kRowStride;
  };
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      float four[4];
      sums[n].row(which, four);
      store_four(place(warp, n * kTokens + 2 * lane.t + which) + 4 * lane.g, 4, four);
    }
  }
  __syncthreads();
  const int my_row = static_cast<int>(threadIdx.x) / 8, quarter = static_cast<int>(threadIdx.x) % 8;
  const FourColumns four(p.end, pair * kStepColumns + 4 * quarter, p.columns);
  if (my_row >= rows || four.count <= 0) return;
  float total[4] = {};
  for (int i = 0; i < kWarps; ++i) {
    float part[4];
    memcpy(part, place(i, my_row) + 4 * quarter, sizeof part);
#pragma unroll
    for (int j = 0; j < 4; ++j) total[j] += part[j];
  }
  four.finish(p.end, row + my_row, total);
}

template <class T, int kTiles>
cudaError_t launch_for(const WeightOnlyParams& p, cudaStream_t stream) {
  const int64_t panels = (p.columns + kPanelColumns - 1) / kPanelColumns;
  const int64_t tiles = (p.rows + kTiles * kTokens - 1) / (kTiles * kTokens);
  return launch(few_rows<T, kTiles>, (panels + 1) / 2 * tiles, kThreads, stream, p);
}

template <class T>
cudaError_t launch_of(const WeightOnlyParams& p, cudaStream_t stream) {
  return p.rows <= kTokens ? launch_for<T, 1>(p, stream) : launch_for<T, 2>(p, stream);
}

}  // namespace

cudaError_t launch_weight_only_few_rows(const WeightOnlyParams& p, cudaStream_t stream) {
  if (p.dtype == DType::float32) return launch_of<float>(p, stream);
  if (p.dtype == DType::bfloat16) return launch_of<BFloat16>(p, stream);
  if (p.dtype == DType::float16) return launch_of<Float16>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace torchweld::kernels::cuda
