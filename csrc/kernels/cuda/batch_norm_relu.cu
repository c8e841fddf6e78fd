// Normalize + residual + activation in one pass. Without statistics and weight it is what follows a
// folded convolution: bias + residual + activation.
#include "kernels/cuda/batch_norm_walk.h"

namespace torchweld::kernels::cuda {
namespace {

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads, 3) normalize(BatchNormReLUParams params, Walk walk) {
  using Vec = typename Math<T>::Vec;
  const Walker<kCount> walker(walk, blockIdx.x);
  const Coefficients<T, kCount> coefficients(params.bn, walker);
  const T* residual = static_cast<const T*>(params.residual);
  constexpr int kSteps = kUnroll<T, kCount>;
  for (int64_t row = walker.row; row < walker.end; row += kSteps * walk.height) {
    int64_t offset[kSteps];
    bool found[kSteps];
    T x[kSteps][kCount], r[kSteps][kCount] = {};
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      found[u] = walker.find(row + u * static_cast<int64_t>(walk.height), offset[u]);
      if (!found[u]) continue;
      load(static_cast<const T*>(params.x) + offset[u], x[u]);
      if (residual != nullptr) load(residual + offset[u], r[u]);
    }
    with_activation<T>(params.bn, [&](auto activate) {
#pragma unroll
      for (int u = 0; u < kSteps; ++u) {
        if (!found[u]) continue;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          Vec d, z = coefficients.normalized(j, x[u][j], d);
          if (residual != nullptr) z = z + to_vec(r[u][j]);
          x[u][j] = from_vec<T>(activate.value(z));
        }
        store(static_cast<T*>(params.y) + offset[u], x[u]);
      }
    });
  }
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
