// Statistics and normalization, or both passes of the backward, of small tensors in one launch. A
// block has its channels to itself: what it found out about them, it left in memory and reads
// again.
#include "kernels/cuda/batch_norm_passes.h"

namespace torchweld::kernels::cuda {
namespace {

// Groups a thread reads one after the other, in either pass. A launch costs two to four
// microseconds, as do eight groups that come from memory four at a time, and again from the cache.
constexpr int64_t kMostSteps = 16;

// f(channel, first, second) for the totals of the block's channels.
template <int kCount, class Add, class F>
TORCHWELD_INLINE void with_totals(const Walker<kCount>& walker, int64_t channels,
                                  Partial<kCount>& mine, double* scratch, const Add& add,
                                  const F& f) {
  write_partial(walker, channels, mine, scratch, add);
  __syncthreads();
  for (int k = static_cast<int>(threadIdx.x); k < walker.channels();
       k += static_cast<int>(blockDim.x)) {
    const int64_t c = walker.first_channel() + k;
    f(c, scratch[1 + c], scratch[1 + channels + c]);
  }
  __syncthreads();
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads, 2)
    train(StatisticsParams statistics, BatchNormReLUParams params, Walk walk) {
  const Walker<kCount> walker(walk, blockIdx.x);
  Partial<kCount> mine{};
  add_statistics(walker, static_cast<const T*>(params.x), mine);
  const double count = static_cast<double>(params.shape.batch * params.shape.pixels);
  with_totals(
      walker, params.shape.channels, mine, statistics.scratch, MergeStatistics{},
      [&](int64_t c, double mean, double m2) { write_statistics(statistics, c, count, mean, m2); });
  normalize_rows<T>(params, walker);
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads, kCount == 8 ? 1 : 2)
    backward(ReduceParams sums, ApplyParams params, Walk walk) {
  const Walker<kCount> walker(walk, blockIdx.x);
  Partial<kCount> mine{};
  add_gradients<T>(sums, walker, mine);
  with_totals(
      walker, params.shape.channels, mine, sums.scratch, AddSums{},
      [&](int64_t c, double sum_g, double sum_g_d) { write_sums(sums, c, sum_g, sum_g_d); });
  write_gradients<T>(params, walker);
}

}  // namespace

bool batch_norm_is_small(const BatchNormShape& shape) {
  const Walk walk = walk_alone(shape, group_of(shape));
  return walk.chunks == 1 && walk.rows <= kMostSteps * walk.height;
}

cudaError_t launch_batch_norm_relu_train(const StatisticsParams& statistics,
                                         const BatchNormReLUParams& params, cudaStream_t stream) {
  const int count = group_of(params.shape, params.x, params.residual, params.y);
  const Walk walk = walk_alone(params.shape, count);
  return dispatch(params.shape.dtype, count, [&]<class T, int kCount>() {
    return launch(train<T, kCount>, walk.blocks(), walk.threads(), stream, statistics, params,
                  walk);
  });
}

cudaError_t launch_batch_norm_relu_backward(const ReduceParams& sums, const ApplyParams& params,
                                            cudaStream_t stream) {
  const int count = group_of(params.shape, params.x, params.residual, params.grad_y, params.grad_x,
                             params.grad_residual);
  const Walk walk = walk_alone(params.shape, count);
  return dispatch(params.shape.dtype, count, [&]<class T, int kCount>() {
    return launch(backward<T, kCount>, walk.blocks(), walk.threads(), stream, sums, params, walk);
  });
}

}  // namespace torchweld::kernels::cuda
