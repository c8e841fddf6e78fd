// The backward of normalize + residual + activation in two passes, with the activation's derivative
// recomputed: one sums g and g * xhat, the other writes the gradients of input and residual.
#include "kernels/cuda/batch_norm_walk.h"

namespace torchweld::kernels::cuda {
namespace {

// Groups loaded at a time, of two or three tensors.
template <class T, int kCount>
inline constexpr int kSteps = kUnroll<T, kCount> / 2;

// Some rows of a thread: loaded, then turned into g and d.
template <class T, int kCount>
struct Gradients {
  using Vec = typename Math<T>::Vec;

  template <class Params>
  TORCHWELD_INLINE Gradients(const Params& params, const Walker<kCount>& walker, int64_t row) {
    const T* residual = static_cast<const T*>(params.residual);
#pragma unroll
    for (int u = 0; u < kSteps<T, kCount>; ++u) {
      found[u] = walker.find(row + u * static_cast<int64_t>(walker.walk.height), offset[u]);
      if (!found[u]) continue;
      load(static_cast<const T*>(params.x) + offset[u], x[u]);
      load(static_cast<const T*>(params.grad_y) + offset[u], grad[u]);
      if (residual != nullptr) load(residual + offset[u], r[u]);
    }
  }

  template <class Activate>
  TORCHWELD_INLINE Vec gradient(const Coefficients<T, kCount>& coefficients,
                                const Activate& activate, bool residual, int u, int j,
                                Vec& d) const {
    Vec z = coefficients.normalized(j, x[u][j], d);
    if (residual) z = z + to_vec(r[u][j]);
    // As the next layer saw it: rounded.
    return activate.gradient(to_vec(grad[u][j]), to_vec(from_vec<T>(z)));
  }

  int64_t offset[kSteps<T, kCount>];
  bool found[kSteps<T, kCount>];
  T x[kSteps<T, kCount>][kCount], grad[kSteps<T, kCount>][kCount],
      r[kSteps<T, kCount>][kCount] = {};
};

// Values of a column that a thread adds up before it adds them to a sum in double.
constexpr int kTileRows = 32;

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads, 2) reduce(ReduceParams params, Walk walk) {
  using Vec = typename Math<T>::Vec;
  // From the end, which was written last: it may still be in cache.
  const Walker<kCount> walker(walk, gridDim.x - 1 - blockIdx.x);
  const Coefficients<T, kCount> coefficients(params.bn, walker);
  Partial<kCount> mine{};
  for (int64_t row = walker.row; row < walker.end; row += kTileRows * walk.height) {
    Vec sums[kCount] = {}, products[kCount] = {};
    for (int64_t i = row, last = row + kTileRows * walk.height; i < last && i < walker.end;
         i += kSteps<T, kCount> * walk.height) {
      const Gradients<T, kCount> some(params, walker, i);
      with_activation<T>(params.bn, [&](auto activate) {
#pragma unroll
        for (int u = 0; u < kSteps<T, kCount>; ++u) {
          if (!some.found[u]) continue;
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            Vec d;
            const Vec g =
                some.gradient(coefficients, activate, params.residual != nullptr, u, j, d);
            sums[j] += g;
            products[j] = fma(g, d, products[j]);
          }
        }
      });
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      mine.first[j] += static_cast<double>(sums[j]);
      mine.second[j] += static_cast<double>(products[j]);
    }
  }
  write_partial(walker, params.shape.channels, mine, params.scratch, AddSums{});
}

__global__ void __launch_bounds__(kThreads) finish_reduce(ReduceParams params, int64_t chunks) {
  const int64_t channels = params.shape.channels;
  const int64_t c = blockIdx.x * static_cast<int64_t>(kFinishChannels) +
                    threadIdx.x % static_cast<unsigned>(kFinishChannels);
  const Partial<1> total = total_of(params.scratch, chunks, channels, c, AddSums{});
  if (threadIdx.x >= kFinishChannels || c >= channels) return;
  const ChannelNorm norm = norm_of(params.bn, c);
  const double lost =
      params.shape.dtype == DType::float64 ? norm.lost<double>() : norm.lost<float>();
  const double sum_g = total.first[0];
  const double sum_g_xhat = norm.sum_g_xhat(sum_g, total.second[0], lost);
  if (params.sum_g != nullptr) params.sum_g[c] = sum_g;
  if (params.sum_g_xhat != nullptr) params.sum_g_xhat[c] = sum_g_xhat;
  write_channel(params.grad_weight, c, sum_g_xhat);
  write_channel(params.grad_bias, c, sum_g);
  write_channel(params.grad_shift, c, norm.scale() * sum_g);
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads, 2) apply(ApplyParams params, Walk walk) {
  using Vec = typename Math<T>::Vec;
  __shared__ Vec shared[2][kSliceColumns];
  const Walker<kCount> walker(walk, blockIdx.x);
  const bool frozen = params.sum_g == nullptr;
  for (int k = static_cast<int>(threadIdx.x); !frozen && k < walker.channels();
       k += static_cast<int>(blockDim.x)) {
    const int64_t c = walker.first_channel() + k;
    const ChannelNorm norm = norm_of(params.bn, c);
    const double count = params.count != nullptr
                             ? *params.count
                             : static_cast<double>(params.shape.batch * params.shape.pixels);
    const double slope = norm.slope(params.sum_g_xhat[c], count);
    shared[0][k] = static_cast<Vec>(slope);
    shared[1][k] =
        static_cast<Vec>(norm.offset(params.sum_g[c], slope, count, norm.template lost<Vec>()));
  }
  const Coefficients<T, kCount> coefficients(params.bn, walker);  // waits for all of the block
  Vec slope[kCount], offset[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    slope[j] = shared[0][walker.place(j)];
    offset[j] = shared[1][walker.place(j)];
  }
  T* grad_x = static_cast<T*>(params.grad_x);
  T* grad_residual = static_cast<T*>(params.grad_residual);
  for (int64_t row = walker.row; row < walker.end; row += kSteps<T, kCount> * walk.height) {
    Gradients<T, kCount> some(params, walker, row);
    with_activation<T>(params.bn, [&](auto activate) {
#pragma unroll
      for (int u = 0; u < kSteps<T, kCount>; ++u) {
        if (!some.found[u]) continue;
        T result[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          Vec d;
          const Vec g = some.gradient(coefficients, activate, params.residual != nullptr, u, j, d);
          some.grad[u][j] = from_vec<T>(g);
          const Vec scale = coefficients.scale[j];
          // Of frozen statistics: no 0 * d, which would carry an infinite x into the gradient.
          result[j] = from_vec<T>(frozen ? scale * g : fma(scale, g, fma(slope[j], d, offset[j])));
        }
        if (grad_x != nullptr) store(grad_x + some.offset[u], result);
        if (grad_residual != nullptr) store(grad_residual + some.offset[u], some.grad[u]);
      }
    });
  }
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
