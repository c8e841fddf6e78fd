#include "kernels/cuda/linear_rows.h"

#include "kernels/cuda/linear_units.h"

namespace torchweld::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSize = 8;  // neighbours of a row for each thread

template <class T>
struct Group {
  TORCHWELD_INLINE explicit Group(const LayOutRows& p) {
    const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t in_row = p.output_stride / kSize, row = item / in_row;
    const int64_t column = item % in_row * kSize, left = p.columns - column;
    exists = row < p.rows;
    if (!exists) return;
    at = row * p.output_stride + column;
    load_group(static_cast<const T*>(p.input) + row * p.stride + column,
               left >= kSize ? kSize
               : left > 0    ? static_cast<int>(left)
                             : 0,
               x);
  }
  bool exists;
  int64_t at;  // in the output
  T x[kSize];  // zeros behind the last column
};

template <class T>
__global__ void __launch_bounds__(kThreads) copy_rows(LayOutRows p) {
  const Group<T> group(p);
  if (group.exists) store_group(static_cast<T*>(p.output) + group.at, kSize, group.x);
}

template <class T>
__global__ void __launch_bounds__(kThreads) split_rows(LayOutRows p) {
  const Group<T> group(p);
  if (!group.exists) return;
  float rest[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) rest[i] = to_vec(group.x[i]);
  for (int part = 0; part < p.parts; ++part) {
    Word word;
    word.x = take_pair(rest[0], rest[1]);
    word.y = take_pair(rest[2], rest[3]);
    word.z = take_pair(rest[4], rest[5]);
    word.w = take_pair(rest[6], rest[7]);
    auto* const to = static_cast<uint16_t*>(p.output) + part * p.rows * p.output_stride;
    *reinterpret_cast<Word*>(to + group.at) = word;
  }
}

}  // namespace

cudaError_t launch_lay_out_rows(const LayOutRows& p, cudaStream_t stream) {
  const int64_t items = p.rows * (p.output_stride / kSize);
  const auto run = [&](auto* kernel) {
    return launch(kernel, (items + kThreads - 1) / kThreads, kThreads, stream, p);
  };
  if (p.parts == 1)
    return p.dtype == DType::float32 ? run(copy_rows<float>) : run(copy_rows<uint16_t>);
  if (p.dtype == DType::float32) return run(split_rows<float>);
  return p.dtype == DType::float16 ? run(split_rows<Float16>) : cudaErrorInvalidValue;
}

}  // namespace torchweld::kernels::cuda
