// The weight-only product of many rows, and how rows are laid out for it.
#include "kernels/cuda/linear_tile.h"
#include "kernels/cuda/linear_weight_only.h"

namespace torchweld::kernels::cuda {
namespace {

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    tiles(LinearEnd end, int64_t columns, TileSource source) {
  TORCHWELD_DYNAMIC_SHARED(memory);
  Tile<Shape> tile(source, memory);
  StepSums<float> sums[Shape::kSets][Shape::kTiles];
  tile.for_each_step([&](const Word(&weights)[Shape::kSets], const uint32_t(&b)[Shape::kTiles][2]) {
#pragma unroll
    for (int set = 0; set < Shape::kSets; ++set) {
      const StepWeights<Int8Weights<T>> step(weights[set]);
#pragma unroll
      for (int n = 0; n < Shape::kTiles; ++n) step.multiply(b[n], sums[set][n]);
    }
  });
  tile.finish(end, columns,
              [&](int set, int n, int which, float(&four)[4]) { sums[set][n].row(which, four); });
}

template <class T, class Shape>
cudaError_t launch_for(const WeightOnlyParams& p, const TileSource& source, cudaStream_t stream) {
  return launch_with_shared(tiles<T, Shape>, Tile<Shape>::blocks(source), Shape::kThreads,
                            Shape::kSharedBytes, stream, p.end, p.columns, source);
}

template <class T>
cudaError_t launch_of(const WeightOnlyParams& p, const TileSource& source, int multiprocessors,
                      cudaStream_t stream) {
  return wants_large_tiles(source, multiprocessors) ? launch_for<T, LargeTile>(p, source, stream)
                                                    : launch_for<T, SmallTile>(p, source, stream);
}

// --- rows ----------------------------------------------------------------------------------------
constexpr int kThreads = 256;
constexpr int64_t kWordElements = 8;  // 16-bit elements of a word of 16 bytes
constexpr int kParts = 3;             // of a float

constexpr int64_t laid_out(int64_t in_features) {
  return (in_features + kWordElements - 1) / kWordElements * kWordElements;
}

// Rows with zeros behind them.
template <class T>
__global__ void __launch_bounds__(kThreads) copy_rows(WeightOnlyParams p, int64_t stride) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = i / stride, k = i % stride;
  if (row >= p.rows) return;
  static_cast<T*>(p.scratch)[i] =
      k < p.in_features ? static_cast<const T*>(p.input)[row * p.input_stride + k] : T{};
}

// Pairs of floats as pairs of bfloat16, in three planes.
__global__ void __launch_bounds__(kThreads) split_rows(WeightOnlyParams p, int64_t stride) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t pairs = stride / 2, row = i / pairs, k = i % pairs * 2;
  if (row >= p.rows) return;
  const float* from = static_cast<const float*>(p.input) + row * p.input_stride;
  float x = k < p.in_features ? from[k] : 0.0f, y = k + 1 < p.in_features ? from[k + 1] : 0.0f;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    static_cast<uint32_t*>(p.scratch)[part * p.rows * pairs + i] = take_pair(x, y);
  }
}

cudaError_t lay_out(const WeightOnlyParams& p, bool splits, cudaStream_t stream) {
  const int64_t stride = laid_out(p.in_features);
  const auto blocks = [&](int64_t items) { return (items + kThreads - 1) / kThreads; };
  if (splits) {
    return launch(split_rows, blocks(p.rows * stride / 2), kThreads, stream, p, stride);
  }
  return p.dtype == DType::float32
             ? launch(copy_rows<float>, blocks(p.rows * stride), kThreads, stream, p, stride)
             : launch(copy_rows<uint16_t>, blocks(p.rows * stride), kThreads, stream, p, stride);
}

bool is_few(const WeightOnlyParams& p) { return p.rows <= kFewWeightOnlyRows; }

}  // namespace

int64_t weight_only_scratch(const WeightOnlyParams& p) {
  const bool splits = p.dtype == DType::float32 && !is_few(p);
  const auto size = static_cast<int64_t>(size_of(p.dtype));
  const int64_t whole = is_few(p) ? kQuad : kWordElements;
  const bool lies_so = p.in_features % whole == 0 && p.input_stride % whole == 0 &&
                       reinterpret_cast<uintptr_t>(p.input) % (whole * size) == 0;
  if (!splits && lies_so) return 0;
  return p.rows * laid_out(p.in_features) * (splits ? 2 * kParts : size);
}

cudaError_t launch_weight_only_tiles(const WeightOnlyParams& p, int planes, int multiprocessors,
                                     cudaStream_t stream) {
  TileSource source{};
  source.panels = p.panels;
  source.panel_count = (p.columns + kPanelColumns - 1) / kPanelColumns;
  source.units = (p.in_features + kQuad - 1) / kQuad;
  source.rows = p.input;
  source.row_count = p.rows;
  source.row_bytes = p.input_stride * 2;
  source.row_words = laid_out(p.in_features) / kWordElements;
  source.plane_bytes = p.rows * source.row_bytes;
  source.planes = planes;
  return p.dtype == DType::float16 ? launch_of<Float16>(p, source, multiprocessors, stream)
                                   : launch_of<BFloat16>(p, source, multiprocessors, stream);
}

cudaError_t launch_linear_weight_only(const WeightOnlyParams& params, int multiprocessors,
                                      cudaStream_t stream) {
  if (params.rows == 0 || params.columns == 0) return cudaSuccess;
  WeightOnlyParams p = params;
  const bool splits = p.dtype == DType::float32 && !is_few(p);
  if (weight_only_scratch(p) > 0) {
    const cudaError_t error = lay_out(p, splits, stream);
    if (error != cudaSuccess) return error;
    p.input = p.scratch;
    p.input_stride = laid_out(p.in_features);
  }
  if (is_few(p)) return launch_weight_only_few_rows(p, stream);
  return launch_weight_only_tiles(p, splits ? kParts : 1, multiprocessors, stream);
}

}  // namespace torchweld::kernels::cuda
