// Batch statistics, and the running ones that follow them.
#include "kernels/cuda/batch_norm_passes.h"

namespace torchweld::kernels::cuda {
namespace {

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads, 2)
    statistics(BatchNormShape shape, Walk walk, const T* data, double* scratch) {
  // From the end, which the convolution wrote last: it may still be in cache.
  const Walker<kCount> walker(walk, gridDim.x - 1 - blockIdx.x);
  Partial<kCount> mine{};
  add_statistics(walker, data, mine);
  write_partial(walker, shape.channels, mine, scratch, MergeStatistics{});
}

__global__ void __launch_bounds__(kThreads)
    finish_statistics(StatisticsParams params, int64_t chunks) {
  const int64_t channels = params.shape.channels;
  const int64_t c = blockIdx.x * static_cast<int64_t>(kFinishChannels) +
                    threadIdx.x % static_cast<unsigned>(kFinishChannels);
  const Partial<1> total = total_of(params.scratch, chunks, channels, c, MergeStatistics{});
  if (params.count != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
    *params.count = static_cast<double>(params.shape.batch * params.shape.pixels);
  }
  if (threadIdx.x >= kFinishChannels || c >= channels) return;
  write_statistics(params, c, total.count, total.first[0], total.second[0]);
}

__global__ void __launch_bounds__(kThreads) update_running(UpdateParams params) {
  const int64_t c = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (c >= params.channels) return;
  const auto move = [&](const ChannelResult& running, double batch) {
    const double old = read_channel({running.data, running.dtype, 0}, c);
    write_channel(running, c, (1 - params.momentum) * old + params.momentum * batch);
  };
  move(params.running_mean, params.mean[c]);
  move(params.running_var, params.var[c] * params.correction);
}

}  // namespace

int64_t batch_norm_scratch(const BatchNormShape& shape) {
  const int64_t one = walk_to_reduce(shape, 1).chunks;
  const int64_t words = walk_to_reduce(shape, group_of(shape)).chunks;
  return (one > words ? one : words) * (2 * shape.channels + 1);
}

cudaError_t launch_batch_norm_statistics(const StatisticsParams& params, cudaStream_t stream) {
  const BatchNormShape& shape = params.shape;
  const int count = group_of(shape, params.x);
  const Walk walk = walk_to_reduce(shape, count);
  const cudaError_t error = dispatch(shape.dtype, count, [&]<class T, int kCount>() {
    return launch(statistics<T, kCount>, walk.blocks(), walk.threads(), stream, shape, walk,
                  static_cast<const T*>(params.x), params.scratch);
  });
  if (error != cudaSuccess) return error;
  // Also of no channels, for the count.
  const int64_t blocks = shape.channels == 0 ? 1 : divide_up(shape.channels, kFinishChannels);
  return launch(finish_statistics, blocks, kThreads, stream, params, walk.chunks);
}

cudaError_t launch_update_running_stats(const UpdateParams& params, cudaStream_t stream) {
  return launch(update_running, divide_up(params.channels, kThreads), kThreads, stream, params);
}

}  // namespace torchweld::kernels::cuda
