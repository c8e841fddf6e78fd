#include "kernels/cuda/linear_rows.h"

#include "kernels/cuda/linear_units.h"

namespace torchweld::kernels::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) copy_rows(LayOutRows p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = i / p.output_stride, column = i % p.output_stride;
  if (row >= p.rows) return;
  static_cast<T*>(p.output)[i] =
      column < p.columns ? static_cast<const T*>(p.input)[row * p.stride + column] : T{};
}

template <class T>
__global__ void __launch_bounds__(kThreads) split_rows(LayOutRows p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t pairs = p.output_stride / 2, row = i / pairs, column = i % pairs * 2;
  if (row >= p.rows) return;
  const T* from = static_cast<const T*>(p.input) + row * p.stride + column;
  float x = column < p.columns ? to_vec(from[0]) : 0.0f;
  float y = column + 1 < p.columns ? to_vec(from[1]) : 0.0f;
  for (int part = 0; part < p.parts; ++part) {
    static_cast<uint32_t*>(p.output)[part * p.rows * pairs + i] = take_pair(x, y);
  }
}

}  // namespace

cudaError_t launch_lay_out_rows(const LayOutRows& p, cudaStream_t stream) {
  const int64_t items = p.rows * p.output_stride / (p.parts == 1 ? 1 : 2);
  const auto run = [&](auto* kernel) {
    return launch(kernel, (items + kThreads - 1) / kThreads, kThreads, stream, p);
  };
  if (p.parts == 1)
    return p.dtype == DType::float32 ? run(copy_rows<float>) : run(copy_rows<uint16_t>);
  if (p.dtype == DType::float32) return run(split_rows<float>);
  return p.dtype == DType::float16 ? run(split_rows<Float16>) : cudaErrorInvalidValue;
}

}  // namespace torchweld::kernels::cuda
