#include "ops/cpu/normalize.h"

#include "ops/kernels.h"

namespace torchweld::ops {
namespace {

using kernels::NormalizeArguments;
using Task = Tiling::Task;

int64_t offset_bytes(const Tensor& tensor, const Task& task) {
  return task.offset * static_cast<int64_t>(size_of(*to_dtype(tensor.scalar_type())));
}

const void* at(const Tensor& tensor, const Task& task) {
  return static_cast<const char*>(tensor.const_data_ptr()) + offset_bytes(tensor, task);
}

void* mutable_at(const Tensor& tensor, const Task& task) {
  return static_cast<char*>(tensor.mutable_data_ptr()) + offset_bytes(tensor, task);
}

torch::headeronly::MemoryFormat format_of(const Tensor& x) {
  using torch::headeronly::MemoryFormat;
  return x.is_contiguous() ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast;
}

}  // namespace

Tensor laid_out_as(const Tensor& x, const Tensor& tensor) {
  return torch::stable::contiguous(tensor, format_of(x));
}

Tensor empty_as(const Tensor& x) {
  return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, std::nullopt, std::nullopt,
                              format_of(x));
}

Moments moments(const Tensor& x) {
  const Tiling tiling(x);
  const int64_t channels = tiling.channels();
  const auto kernel = cpu_kernels().conv_bn_relu->statistics[static_cast<size_t>(tiling.layout())]
                                                            [static_cast<size_t>(tiling.dtype())];
  std::vector<double> partials = tiling.partials();
  tiling.for_each_task([&](const Task& task) {
    kernel(at(x, task), task.runs, tiling.first(partials, task), tiling.second(partials, task));
  });

  Moments result{static_cast<double>(tiling.values_per_channel()), Channels(channels),
                 Channels(channels)};
  Channels counts(channels);
  // Chan's formula, as the kernels merge their tiles.
  tiling.merge(partials, [&](int64_t c, int64_t values, double mean, double m2) {
    const double total = counts[c] + values;
    const double weight = values / total;
    const double delta = mean - result.mean[c];
    result.mean[c] += delta * weight;
    result.m2[c] += m2 + delta * delta * counts[c] * weight;
    counts[c] = total;
  });
  return result;
}

Normalization::Normalization(const Tensor& x, const BatchNorm& bn, const OptionalTensor& residual)
    : x_(x),
      bn_(bn),
      tiling_(x),
      mean_(tiling_, [&](int64_t c) { return rounded(c); }),
      scale_(tiling_, [&](int64_t c) { return bn.scale(c); }),
      shift_(tiling_, [&](int64_t c) { return bn.bias[c] + lost(c) * bn.scale(c); }) {
  if (residual) residual_ = laid_out_as(x, *residual);
}

double Normalization::rounded(int64_t c) const {
  if (tiling_.dtype() == kernels::DType::float64) return bn_.mean[c];
  return static_cast<float>(bn_.mean[c]);
}

NormalizeArguments Normalization::arguments(const Task& task) const {
  NormalizeArguments arguments{};
  arguments.runs = task.runs;
  arguments.columns.mean = mean_.at(task.column);
  arguments.columns.scale = scale_.at(task.column);
  arguments.columns.shift = shift_.at(task.column);
  arguments.x = at(x_, task);
  arguments.residual = residual_ ? at(*residual_, task) : nullptr;
  arguments.negative_slope = bn_.negative_slope;
  return arguments;
}

void Normalization::forward(const Tensor& y) const {
  const auto kernel = pick(cpu_kernels().conv_bn_relu->normalize);
  tiling_.for_each_task([&](const Task& task) {
    NormalizeArguments a = arguments(task);
    a.out = mutable_at(y, task);
    kernel(a);
  });
}

Sums Normalization::reduce(const Tensor& grad_y) const {
  const auto kernel = pick(cpu_kernels().conv_bn_relu->reduce);
  std::vector<double> partials = tiling_.partials();
  tiling_.for_each_task([&](const Task& task) {
    NormalizeArguments a = arguments(task);
    a.grad_y = at(grad_y, task);
    kernel(a, tiling_.first(partials, task), tiling_.second(partials, task));
  });

  Sums sums{Channels(tiling_.channels()), Channels(tiling_.channels())};
  tiling_.merge(partials, [&](int64_t c, int64_t, double g, double g_d) {
    sums.g[c] += g;
    sums.g_xhat[c] += g_d;
  });
  for (int64_t c = 0; c < tiling_.channels(); ++c) {
    sums.g_xhat[c] = bn_.invstd[c] * (sums.g_xhat[c] + lost(c) * sums.g[c]);
  }
  return sums;
}

void Normalization::apply(const Tensor& grad_y, const Sums* sums, double count,
                          const Tensor* grad_x, const Tensor* grad_residual) const {
  // grad_x = scale * (g - mean(g) - xhat * mean(g * xhat)), with xhat = (d + lost) * invstd.
  const auto slope = [&](int64_t c) {
    return sums ? -bn_.scale(c) * bn_.invstd[c] * sums->g_xhat[c] / count : 0.0;
  };
  const auto offset = [&](int64_t c) {
    return sums ? slope(c) * lost(c) - bn_.scale(c) * sums->g[c] / count : 0.0;
  };
  const Tiling::Coefficients slopes(tiling_, slope), offsets(tiling_, offset);
  const auto kernel = pick(cpu_kernels().conv_bn_relu->apply);
  tiling_.for_each_task([&](const Task& task) {
    NormalizeArguments a = arguments(task);
    a.columns.slope = sums ? slopes.at(task.column) : nullptr;
    a.columns.offset = offsets.at(task.column);
    a.grad_y = at(grad_y, task);
    a.out = grad_x ? mutable_at(*grad_x, task) : nullptr;
    a.grad_residual = grad_residual ? mutable_at(*grad_residual, task) : nullptr;
    kernel(a);
  });
}

}  // namespace torchweld::ops
