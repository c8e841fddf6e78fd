// Batch statistics, and normalize + residual + activation with its backward, over whole tensors.
#pragma once

#include "ops/conv_bn_relu.h"
#include "ops/cpu/block_moments.h"
#include "ops/cpu/tiling.h"

namespace torchweld::ops {

// What normalize and its backward need besides tensors of the output's size.
struct BatchNorm {
  Channels mean, invstd, weight, bias;
  kernels::Activation activation;
  double negative_slope;

  kernels::ChannelNorm channel(int64_t c) const { return {mean[c], invstd[c], weight[c], bias[c]}; }
  double scale(int64_t c) const { return channel(c).scale(); }
};

Moments moments_of(const Tensor& x);

// Per channel, what a backward pass sums: g, and g * (x - mean) * invstd.
struct Sums {
  Channels g, g_xhat;
};

// An uninitialized tensor of x's shape, dtype and memory order. Where x could be called contiguous
// as well as channels_last it is contiguous, as batch norm's output is in torch.
Tensor empty_as(const Tensor& x);

// One normalization of a dense tensor. Holds references: x and bn must outlive it.
class Normalization {
 public:
  Normalization(const Tensor& x, const BatchNorm& bn, const OptionalTensor& residual);

  // Writes y, which may be x. Tensors given to these functions are in x's memory order.
  void forward(const Tensor& y) const;
  Sums reduce(const Tensor& grad_y) const;

  // The gradient for x: scale * (g - mean(g) - xhat * mean(g * xhat)), of which the means are 0
  // where the statistics are constants, without `sums`. Also writes g, the gradient for the
  // residual, where that is asked for. Holds references, as the class around it.
  class Gradient {
   public:
    Gradient(const Normalization& normalization, const Tensor& grad_y, const Sums* sums,
             double count, const Tensor* grad_residual);

    // Of `count` pixels of a channels_last tensor from pixel `first` on, densely at `out`.
    void rows(int64_t first, int64_t count, float* out) const;
    // Whether rows() can be called: the tensor is in channels_last memory.
    bool has_rows() const { return of_.tiling_.layout() == kernels::Layout::columns; }
    // What rows() reads, beside a residual.
    const Tensor& grad_y() const { return grad_y_; }
    const Tensor& x() const { return of_.x_; }
    // Of the whole tensor.
    Tensor all() const;
    // Only the residual's gradient.
    void residual() const;

   private:
    kernels::NormalizeArguments arguments(const Tiling::Task& task) const;

    const Normalization& of_;
    const Tensor& grad_y_;
    const Tensor* grad_residual_;
    bool frozen_;
    Tiling::Coefficients slopes_, offsets_;
    kernels::ApplyKernel kernel_;
  };

 private:
  // What rounding the mean to the arithmetic type loses.
  double lost(int64_t c) const;
  kernels::NormalizeArguments arguments(const Tiling::Task& task) const;
  template <class Table>
  auto pick(const Table& table) const {
    return table[static_cast<size_t>(tiling_.layout())][static_cast<size_t>(tiling_.dtype())]
                [static_cast<size_t>(bn_.activation)];
  }

  const Tensor& x_;
  const BatchNorm& bn_;
  OptionalTensor residual_;
  Tiling tiling_;
  Tiling::Coefficients mean_, scale_, shift_;
};

}  // namespace torchweld::ops
