// Normalize + residual + activation in one pass. Without statistics and weight it is what follows a
// folded convolution: bias + residual + activation.
#include "kernels/cuda/batch_norm_passes.h"

namespace torchweld::kernels::cuda {
namespace {

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads, 3) normalize(BatchNormReLUParams params, Walk walk) {
  const Walker<kCount> walker(walk, blockIdx.x);
  normalize_rows<T>(params, walker);
}

}  // namespace

cudaError_t launch_batch_norm_relu(const BatchNormReLUParams& params, cudaStream_t stream) {
  const int count = group_of(params.shape, params.x, params.residual, params.y);
  const Walk walk = walk_to_map(params.shape, count);
  return dispatch(params.shape.dtype, count, [&]<class T, int kCount>() {
    return launch(normalize<T, kCount>, walk.blocks(), walk.threads(), stream, params, walk);
  });
}

}  // namespace torchweld::kernels::cuda
