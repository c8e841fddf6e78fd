// What the batch norm kernels do with the rows a block walks over, each pass by itself; a kernel is
// one of them, or for a small tensor several.
#pragma once

#include "kernels/cuda/batch_norm_walk.h"

namespace torchweld::kernels::cuda {

// Values of a column that a thread sums up before it goes on in double.
inline constexpr int kTileRows = 32;

// Of a thread's columns: tiles about a center near their mean in the arithmetic type, merged in
// double.
template <class T, int kCount>
TORCHWELD_INLINE void add_statistics(const Walker<kCount>& walker, const T* data,
                                     Partial<kCount>& mine) {
  using Vec = typename Math<T>::Vec;
  for (int64_t row = walker.row; row < walker.end; row += kTileRows * walker.walk.height) {
    Vec centers[kCount], sums[kCount] = {}, squares[kCount] = {};
    int size = 0;
#pragma unroll
    for (int j = 0; j < kCount; ++j) centers[j] = static_cast<Vec>(mine.first[j]);
    for (int64_t i = row, last = row + kTileRows * walker.walk.height; i < last && i < walker.end;
         i += kUnroll<T, kCount> * walker.walk.height) {
      T x[kUnroll<T, kCount>][kCount];
      bool found[kUnroll<T, kCount>];
#pragma unroll
      for (int u = 0; u < kUnroll<T, kCount>; ++u) {
        int64_t offset;
        found[u] = walker.find(i + u * static_cast<int64_t>(walker.walk.height), offset);
        if (found[u]) load(data + offset, x[u]);
      }
#pragma unroll
      for (int u = 0; u < kUnroll<T, kCount>; ++u) {
        if (!found[u]) continue;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const Vec value = to_vec(x[u][j]);
          // The first tile has no mean before it: about its first value.
          if (mine.count == 0 && size == 0) centers[j] = value;
          const Vec d = value - centers[j];
          sums[j] += d;
          squares[j] = fma(d, d, squares[j]);
        }
        ++size;
      }
    }
    if (size == 0) continue;
    const Merge merge{mine.count, static_cast<double>(size)};
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      merge(static_cast<double>(centers[j]), static_cast<double>(sums[j]),
            static_cast<double>(squares[j]), mine.first[j], mine.second[j]);
    }
    mine.count += size;
  }
}

// Of a channel; `c` is one.
TORCHWELD_INLINE void write_statistics(const StatisticsParams& params, int64_t c, double count,
                                       double mean, double m2) {
  const double var = count > 0 ? m2 / count : 0;
  if (params.mean != nullptr) params.mean[c] = mean;
  if (params.m2 != nullptr) params.m2[c] = m2;
  if (params.var != nullptr) params.var[c] = var;
  if (params.invstd != nullptr) params.invstd[c] = inverse_std(var, params.eps);
}

// Normalize + residual + activation. All threads of the block must come.
template <class T, int kCount>
TORCHWELD_INLINE void normalize_rows(const BatchNormReLUParams& params,
                                     const Walker<kCount>& walker) {
  using Vec = typename Math<T>::Vec;
  const Coefficients<T, kCount> coefficients(params.bn, walker);
  const T* residual = static_cast<const T*>(params.residual);
  constexpr int kSteps = kUnroll<T, kCount>;
  for (int64_t row = walker.row; row < walker.end; row += kSteps * walker.walk.height) {
    int64_t offset[kSteps];
    bool found[kSteps];
    T x[kSteps][kCount], r[kSteps][kCount] = {};
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      found[u] = walker.find(row + u * static_cast<int64_t>(walker.walk.height), offset[u]);
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

// --- backward ------------------------------------------------------------------------------------
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

// Sums of g and g * d over a thread's columns.
template <class T, int kCount>
TORCHWELD_INLINE void add_gradients(const ReduceParams& params, const Walker<kCount>& walker,
                                    Partial<kCount>& mine) {
  using Vec = typename Math<T>::Vec;
  const Coefficients<T, kCount> coefficients(params.bn, walker);
  for (int64_t row = walker.row; row < walker.end; row += kTileRows * walker.walk.height) {
    Vec sums[kCount] = {}, products[kCount] = {};
    for (int64_t i = row, last = row + kTileRows * walker.walk.height; i < last && i < walker.end;
         i += kSteps<T, kCount> * walker.walk.height) {
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
}

// Of a channel, from its sums over all rows.
TORCHWELD_INLINE void write_sums(const ReduceParams& params, int64_t c, double sum_g,
                                 double sum_g_d) {
  const ChannelNorm norm = norm_of(params.bn, c);
  const double lost =
      params.shape.dtype == DType::float64 ? norm.lost<double>() : norm.lost<float>();
  const double sum_g_xhat = norm.sum_g_xhat(sum_g, sum_g_d, lost);
  if (params.sum_g != nullptr) params.sum_g[c] = sum_g;
  if (params.sum_g_xhat != nullptr) params.sum_g_xhat[c] = sum_g_xhat;
  write_channel(params.grad_weight, c, sum_g_xhat);
  write_channel(params.grad_bias, c, sum_g);
  write_channel(params.grad_shift, c, norm.scale() * sum_g);
}

// The gradients of input and residual. All threads of the block must come.
template <class T, int kCount>
TORCHWELD_INLINE void write_gradients(const ApplyParams& params, const Walker<kCount>& walker) {
  using Vec = typename Math<T>::Vec;
  __shared__ Vec shared[2][kSliceColumns];
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
  for (int64_t row = walker.row; row < walker.end; row += kSteps<T, kCount> * walker.walk.height) {
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

}  // namespace torchweld::kernels::cuda
