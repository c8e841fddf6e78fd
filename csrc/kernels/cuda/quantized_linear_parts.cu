// The second half of a product whose K was split: integers are added, and the layer finished.
#include "kernels/cuda/quantized_linear_parts.h"

#include "kernels/cuda/linear_epilogue.h"

namespace torchweld::kernels::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) join_parts(QuantizedLinearParams params) {
  const int64_t fours = tiles_of(params.columns, 4);
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = item / fours;
  if (row >= params.rows) return;
  const FourColumns columns(params.end, item % fours * 4, params.columns);
  int32_t sum[4] = {};
#pragma unroll 4
  for (int64_t split = 0; split < params.splits; ++split) {
    int32_t part[4];
    load_group(params.parts + (split * params.rows + row) * params.columns + columns.column,
               columns.count, part);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += part[i];
  }
  columns.finish(params.end, row, sum);
}

}  // namespace

cudaError_t launch_join_parts(const QuantizedLinearParams& params, cudaStream_t stream) {
  const int64_t items = params.rows * tiles_of(params.columns, 4);
  return launch(join_parts, tiles_of(items, kThreads), kThreads, stream, params);
}

}  // namespace torchweld::kernels::cuda
