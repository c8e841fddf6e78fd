// The weight-only product of many rows, and which rows must be laid out for it.
#include "kernels/cuda/linear_rows.h"
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
cudaError_t launch_of(const WeightOnlyParams& p, const TileSource& source, cudaStream_t stream) {
  return p.path == LinearPath::small_tiles ? launch_for<T, SmallTile>(p, source, stream)
                                           : launch_for<T, LargeTile>(p, source, stream);
}

constexpr int64_t kWordElements = 8;  // 16-bit elements of a word of 16 bytes
constexpr int kParts = 3;             // of a float

constexpr int64_t laid_out(int64_t in_features) {
  return (in_features + kWordElements - 1) / kWordElements * kWordElements;
}

bool is_few(const WeightOnlyParams& p) { return p.path == LinearPath::few_rows; }

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

cudaError_t launch_weight_only_tiles(const WeightOnlyParams& p, int planes, cudaStream_t stream) {
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
  return p.dtype == DType::float16 ? launch_of<Float16>(p, source, stream)
                                   : launch_of<BFloat16>(p, source, stream);
}

cudaError_t launch_linear_weight_only(const WeightOnlyParams& params, cudaStream_t stream) {
  if (params.rows == 0 || params.columns == 0) return cudaSuccess;
  WeightOnlyParams p = params;
  const bool splits = p.dtype == DType::float32 && !is_few(p);
  if (weight_only_scratch(p) > 0) {
    const cudaError_t error = launch_lay_out_rows({.input = p.input,
                                                   .dtype = p.dtype,
                                                   .stride = p.input_stride,
                                                   .rows = p.rows,
                                                   .columns = p.in_features,
                                                   .output = p.scratch,
                                                   .output_stride = laid_out(p.in_features),
                                                   .parts = splits ? kParts : 1},
                                                  stream);
    if (error != cudaSuccess) return error;
    p.input = p.scratch;
    p.input_stride = laid_out(p.in_features);
  }
  if (is_few(p)) return launch_weight_only_few_rows(p, stream);
  return launch_weight_only_tiles(p, splits ? kParts : 1, stream);
}

}  // namespace torchweld::kernels::cuda
