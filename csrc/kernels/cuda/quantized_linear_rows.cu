// Quantization of activations: one pass over memory, a block to a row or a warp to a group.
#include "kernels/cuda/quantize_row.h"
#include "kernels/cuda/quantized_linear.h"

namespace torchweld::kernels::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) quantize_rows(QuantizeRows rows) {
  using Quantizer = RowQuantizer<T, kThreads>;
  __shared__ typename Quantizer::Shared shared;
  const int64_t row = blockIdx.x;
  const float scale = Quantizer::run(static_cast<const T*>(rows.input) + row * rows.input_stride,
                                     rows.in_features, rows.quantized + row * rows.quantized_stride,
                                     rows.quantized_stride, static_cast<int>(threadIdx.x), &shared);
  if (threadIdx.x == 0) rows.scale[row] = scale;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_groups(QuantizeRows rows, int64_t groups, int64_t count) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (item >= count) return;
  const int64_t row = item / groups, group = item % groups, first = group * rows.group_size;
  const int64_t size = rows.in_features - first, padded = rows.quantized_stride - first;
  const bool is_last = group == groups - 1;
  const float scale = RowQuantizer<T, 32>::run(
      static_cast<const T*>(rows.input) + row * rows.input_stride + first,
      is_last ? size : rows.group_size, rows.quantized + row * rows.quantized_stride + first,
      is_last ? padded : rows.group_size, static_cast<int>(threadIdx.x % 32), nullptr);
  if (threadIdx.x % 32 == 0) rows.scale[item] = scale;
}

template <class T>
cudaError_t launch_for(const QuantizeRows& rows, cudaStream_t stream) {
  if (rows.group_size == 0 || rows.in_features == 0) {
    return launch(quantize_rows<T>, rows.rows, kThreads, stream, rows);
  }
  const int64_t groups = (rows.in_features + rows.group_size - 1) / rows.group_size;
  const int64_t count = rows.rows * groups, warps = kThreads / 32;
  return launch(quantize_groups<T>, (count + warps - 1) / warps, kThreads, stream, rows, groups,
                count);
}

}  // namespace

cudaError_t launch_quantize_rows(DType dtype, const QuantizeRows& rows, cudaStream_t stream) {
  if (dtype == DType::float32) return launch_for<float>(rows, stream);
  if (dtype == DType::bfloat16) return launch_for<BFloat16>(rows, stream);
  if (dtype == DType::float16) return launch_for<Float16>(rows, stream);
  return cudaErrorInvalidValue;
}

}  // namespace torchweld::kernels::cuda
