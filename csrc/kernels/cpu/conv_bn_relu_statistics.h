// Sums over the values of a channel: tile by tile, and its mean and squared deviations.
#pragma once

#include "kernels/conv_bn_relu_math.h"
#include "kernels/cpu/loop.h"

namespace torchweld::kernels::TORCHWELD_ISA {

// Runs that are summed in the arithmetic type before they are merged in double: few enough for
// accuracy, and small enough to stay in cache for a second sweep.
inline constexpr int64_t kTileRuns = 32;

template <class T, Layout kLayout>
int64_t runs_per_tile(const Runs& runs) {
  if (kLayout == Layout::columns) return kTileRuns;
  const int64_t count = 2048 / runs.size;
  return count > 0 ? count : 1;
}

// f(first run, tile) over the tiles of a span. A plane longer than a tile is cut by the caller.
template <class T, Layout kLayout, class F>
void for_each_tile(const Runs& runs, const F& f) {
  const int64_t step = runs_per_tile<T, kLayout>(runs);
  for (int64_t first = 0; first < runs.count; first += step) {
    const int64_t rest = runs.count - first;
    f(first, Runs{rest < step ? rest : step, runs.size, runs.stride});
  }
}

// The sum over a plane's registers, in double.
template <class T>
double total(const typename Math<T>::Vec (&sums)[kGroup]) {
  double total = 0;
  for (int p = 0; p < kGroup; ++p) {
    for (int lane = 0; lane < Math<T>::kLanes; ++lane) total += sums[p][lane];
  }
  return total;
}

// The statistics of kRegisters of columns. Deviations are taken from the mean of the tiles before:
// should it be far off, the merge adds more to m2 than the squares have lost. The first tile, which
// has none before it, is read twice.
template <class T, int kRegisters, class P>
__attribute__((noinline)) void column_statistics(const T* data, const Runs& runs, double count,
                                                 double* mean, double* m2, P part) {
  using Vec = typename Math<T>::Vec;
  using Scalar = typename Math<T>::Scalar;
  constexpr int kLanes = Math<T>::kLanes, kWide = kLanes / kLanesD;
  for_each_tile<T, Layout::columns>(runs, [&](int64_t first, const Runs& tile) {
    const T* begin = data + first * tile.stride;
    const Merge merge{count, (double)tile.count};
    Vec centers[kRegisters], sums[kRegisters], squares[kRegisters];
#pragma GCC unroll 4
    for (int j = 0; j < kRegisters; ++j) sums[j] = squares[j] = Vec{};
    if (count == 0) {
      for (int64_t run = 0; run < tile.count; ++run) {
#pragma GCC unroll 4
        for (int j = 0; j < kRegisters; ++j) {
          sums[j] += load(begin + run * tile.stride + j * kLanes, part);
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < kRegisters; ++j) {
        centers[j] = sums[j] * (Scalar)merge.inverse;
        sums[j] = Vec{};
      }
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < kRegisters; ++j) {
        VecD wide[kWide];
#pragma GCC unroll 4
        for (int h = 0; h < kWide; ++h) wide[h] = load(mean + j * kLanes + h * kLanesD);
        centers[j] = narrow(wide);
      }
    }
    for (int64_t run = 0; run < tile.count; ++run) {
      const T* row = begin + run * tile.stride;
#pragma GCC unroll 4
      for (int j = 0; j < kRegisters; ++j) {
        __builtin_prefetch(row + kTileRuns * tile.stride + j * kLanes);
        const Vec d = load(row + j * kLanes, part) - centers[j];
        sums[j] += d;
        squares[j] = fma(d, d, squares[j]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kRegisters; ++j) {
      VecD center[kWide], deviations[kWide], square[kWide];
      widen(centers[j], center);
      widen(sums[j], deviations);
      widen(squares[j], square);
#pragma GCC unroll 4
      for (int h = 0; h < kWide; ++h) {
        const int64_t k = j * kLanes + h * kLanesD;
        VecD new_mean = load(mean + k), new_m2 = load(m2 + k);
        merge(center[h], deviations[h], square[h], new_mean, new_m2);
        store(mean + k, new_mean);
        store(m2 + k, new_m2);
      }
    }
    count += merge.size;
  });
}

template <class T>
void statistics_of_columns(const void* data, const Runs& runs, double count, double* mean,
                           double* m2) {
  constexpr int kLanes = Math<T>::kLanes;
  const T* x = static_cast<const T*>(data);
  int64_t k = 0;
  for (; k + 4 * kLanes <= runs.size; k += 4 * kLanes) {
    column_statistics<T, 4>(x + k, runs, count, mean + k, m2 + k, Whole{});
  }
  for (; k + kLanes <= runs.size; k += kLanes) {
    column_statistics<T, 1>(x + k, runs, count, mean + k, m2 + k, Whole{});
  }
  if (k == runs.size) return;
  const int64_t left = runs.size - k;
  double means[kLanes] = {}, m2s[kLanes] = {};
  for (int64_t i = 0; i < left; ++i) means[i] = mean[k + i], m2s[i] = m2[k + i];
  column_statistics<T, 1>(x + k, runs, count, means, m2s, Part{left});
  for (int64_t i = 0; i < left; ++i) mean[k + i] = means[i], m2[k + i] = m2s[i];
}

// A plane's tile is summed about its own mean.
template <class T>
void statistics_of_planes(const void* data, const Runs& runs, double count, double* mean,
                          double* m2) {
  using Vec = typename Math<T>::Vec;
  using Scalar = typename Math<T>::Scalar;
  constexpr int kLanes = Math<T>::kLanes;
  const T* x = static_cast<const T*>(data);
  for_each_tile<T, Layout::planes>(runs, [&](int64_t first, const Runs& tile) {
    const T* begin = x + first * runs.stride;
    const Merge merge{count, (double)(tile.count * tile.size)};
    Vec sums[kGroup] = {}, squares[kGroup] = {};
    for (int64_t run = 0; run < tile.count; ++run) {
      for_each_register<kLanes>(tile.size, [&](int64_t i, int p, auto part) {
        prefetch(begin + run * tile.stride + i);
        sums[p] += load(begin + run * tile.stride + i, part);
      });
    }
    const Scalar center = (Scalar)(total<T>(sums) / merge.size);

    for (int p = 0; p < kGroup; ++p) sums[p] = Vec{};
    for (int64_t run = 0; run < tile.count; ++run) {
      for_each_register<kLanes>(tile.size, [&](int64_t i, int p, auto part) {
        const Vec d =
            keep(load(begin + run * tile.stride + i, part) - broadcast<Vec>(center), part);
        sums[p] += d;
        squares[p] = fma(d, d, squares[p]);
      });
    }
    const double deviations = total<T>(sums);
    const double inside = total<T>(squares);
    merge((double)center, deviations, inside, *mean, *m2);
    count += merge.size;
  });
}

}  // namespace torchweld::kernels::TORCHWELD_ISA
