// The backward of normalize + residual + activation in two passes, with the activation's derivative
// recomputed: one sums g and g * xhat, the other writes the gradients of input and residual.
#include "kernels/cuda/batch_norm_passes.h"

namespace torchweld::kernels::cuda {
namespace {

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads, 2) reduce(ReduceParams params, Walk walk) {
  // From the end, which was written last: it may still be in cache.
  const Walker<kCount> walker(walk, gridDim.x - 1 - blockIdx.x);
  Partial<kCount> mine{};
  add_gradients<T>(params, walker, mine);
  write_partial(walker, params.shape.channels, mine, params.scratch, AddSums{});
}

__global__ void __launch_bounds__(kThreads) finish_reduce(ReduceParams params, int64_t chunks) {
  const int64_t channels = params.shape.channels;
  const int64_t c = blockIdx.x * static_cast<int64_t>(kFinishChannels) +
                    threadIdx.x % static_cast<unsigned>(kFinishChannels);
  const Partial<1> total = total_of(params.scratch, chunks, channels, c, AddSums{});
  if (threadIdx.x >= kFinishChannels || c >= channels) return;
  write_sums(params, c, total.first[0], total.second[0]);
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads, 2) apply(ApplyParams params, Walk walk) {
  const Walker<kCount> walker(walk, blockIdx.x);
  write_gradients<T>(params, walker);
}

}  // namespace

cudaError_t launch_batch_norm_relu_reduce(const ReduceParams& params, cudaStream_t stream) {
  const int count = group_of(params.shape, params.x, params.residual, params.grad_y);
  const Walk walk = walk_to_reduce(params.shape, count);
  const cudaError_t error = dispatch(params.shape.dtype, count, [&]<class T, int kCount>() {
    return launch(reduce<T, kCount>, walk.blocks(), walk.threads(), stream, params, walk);
  });
  if (error != cudaSuccess) return error;
  return launch(finish_reduce, divide_up(params.shape.channels, kFinishChannels), kThreads, stream,
                params, walk.chunks);
}

cudaError_t launch_batch_norm_relu_apply(const ApplyParams& params, cudaStream_t stream) {
  const int count = group_of(params.shape, params.x, params.residual, params.grad_y, params.grad_x,
                             params.grad_residual);
  const Walk walk = walk_to_map(params.shape, count);
  return dispatch(params.shape.dtype, count, [&]<class T, int kCount>() {
    return launch(apply<T, kCount>, walk.blocks(), walk.threads(), stream, params, walk);
  });
}

}  // namespace torchweld::kernels::cuda
