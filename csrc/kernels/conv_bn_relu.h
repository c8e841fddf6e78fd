// Everything around a convolution that trains with batch norm: statistics, normalize + residual +
// activation, and its backward, on raw memory.
//
// A dense 4-D tensor is cut into spans. In a channels_last tensor neighbours in memory belong to
// neighbouring channels: one coefficient per element ("columns"). In a contiguous tensor a run of
// pixels belongs to one channel: one coefficient per span ("planes"). The two differ in nothing
// else, so each kernel is written once.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace torchweld::kernels {

enum class Activation { identity, relu, relu6, leaky_relu, silu, hardswish };
inline constexpr std::size_t kActivationCount = 6;

// `count` runs of `size` contiguous elements, the first elements of neighbouring runs `stride`
// elements apart.
struct Runs {
  int64_t count;
  int64_t size;
  int64_t stride;
};

// The longest run a "columns" kernel takes; callers cut wider tensors into panels.
inline constexpr int64_t kMaxColumns = 256;
// Runs of a "columns" kernel may end in a part of a register; its coefficients are read up to this
// many elements past a multiple of it, so their arrays are padded to one.
inline constexpr int64_t kColumnGroup = 16;

// One channel of batch norm, in double: xhat = (x - mean) * invstd, z = weight * xhat + bias. What
// the kernels compute with, in arithmetic type T, is below; `lost` is what rounding the mean loses.
struct ChannelNorm {
  double mean, invstd, weight, bias;

  template <class T>
  constexpr double rounded_mean() const {
    return static_cast<T>(mean);
  }
  template <class T>
  constexpr double lost() const {
    return rounded_mean<T>() - mean;
  }
  constexpr double scale() const { return weight * invstd; }
  constexpr double shift(double lost) const { return bias + lost * scale(); }

  // Backward, from sums over `count` values of g and of g * (x - rounded mean), g * xhat.
  constexpr double sum_g_xhat(double sum_g, double sum_g_d, double lost) const {
    return invstd * (sum_g_d + lost * sum_g);
  }
  constexpr double slope(double sum_g_xhat, double count) const {
    return -scale() * invstd * sum_g_xhat / count;
  }
  constexpr double offset(double sum_g, double slope, double count, double lost) const {
    return slope * lost - scale() * sum_g / count;
  }
};

// Per column, in the arithmetic type: float, or double for float64 storage. With d = x - mean:
//   z = scale * d + shift [+ residual],  y = activation(z),
//   grad_x = scale * g + slope * d + offset,  where g = grad_y * activation'(z).
// `mean` is the channel's mean rounded to the arithmetic type, and `shift` and `offset` carry what
// the rounding lost, so a mean far larger than the deviation costs no accuracy.
struct ChannelCoefficients {
  const void* mean;
  const void* scale;
  const void* shift;
  const void* slope;   // backward apply only; null where statistics are frozen, both terms 0
  const void* offset;  // backward apply only
};

struct NormalizeArguments {
  Runs runs;
  ChannelCoefficients columns;
  const void* x;
  const void* residual;  // or null
  const void* grad_y;    // backward only
  void* out;             // y, or grad_x; may be x itself
  void* grad_residual;   // g, or null; backward apply only
  double negative_slope;
  bool streamed;  // y goes past the caches, where all runs of it begin on 64 bytes
};

// Writes y.
using NormalizeKernel = void (*)(const NormalizeArguments& arguments);
// Sums g and g * d over the runs, in double, per column: first[k] and second[k].
using ReduceKernel = void (*)(const NormalizeArguments& arguments, double* first, double* second);
// Writes grad_x (`out`, unless null) and g (`grad_residual`, unless null).
using ApplyKernel = void (*)(const NormalizeArguments& arguments);
// Adds the runs to statistics of `count` values per column: their mean, and the sum of squared
// deviations from it. mean[k] and m2[k] begin as 0, with a count of 0.
using StatisticsKernel = void (*)(const void* x, const Runs& runs, double count, double* mean,
                                  double* m2);

enum class Layout { planes, columns };
inline constexpr std::size_t kLayoutCount = 2;

// Reductions add in an order fixed by the runs alone: the same bits on every instruction set.
struct ConvBNReLUKernels {
  NormalizeKernel normalize[kLayoutCount][kDTypeCount][kActivationCount];
  ReduceKernel reduce[kLayoutCount][kDTypeCount][kActivationCount];
  ApplyKernel apply[kLayoutCount][kDTypeCount][kActivationCount];
  StatisticsKernel statistics[kLayoutCount][kDTypeCount];
};

}  // namespace torchweld::kernels
