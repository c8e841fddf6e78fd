#include "ops/cpu/normalize.h"

#include "ops/cpu/past_cache.h"
#include "ops/kernels.h"
#include "ops/memory.h"

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

}  // namespace

Tensor empty_as(const Tensor& x) { return empty(shape_of(x), x.scalar_type(), format_of(x)); }

Moments moments_of(const Tensor& x) {
  const Tiling tiling(x);
  const int64_t channels = tiling.channels();
  const auto kernel = cpu_kernels().conv_bn_relu->statistics[static_cast<size_t>(tiling.layout())]
                                                            [static_cast<size_t>(tiling.dtype())];
  std::vector<double> partials = tiling.partials();
  tiling.for_each_task([&](const Task& task) {
    kernel(at(x, task), task.runs, 0, tiling.first(partials, task), tiling.second(partials, task));
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
      mean_(tiling_, [&](int64_t c) { return bn.mean[c]; }),
      scale_(tiling_, [&](int64_t c) { return bn.scale(c); }),
      shift_(tiling_, [&](int64_t c) { return bn.channel(c).shift(lost(c)); }) {
  if (residual) residual_ = laid_out_as(x, *residual);
}

double Normalization::lost(int64_t c) const {
  const kernels::ChannelNorm channel = bn_.channel(c);
  return tiling_.dtype() == kernels::DType::float64 ? channel.lost<double>()
                                                    : channel.lost<float>();
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
  // In place, y is in the cache already.
  const bool in_place = y.const_data_ptr() == x_.const_data_ptr();
  const bool streamed =
      !in_place && leaves_cache(y.numel() * static_cast<int64_t>(size_of(tiling_.dtype())));
  tiling_.for_each_task([&](const Task& task) {
    NormalizeArguments a = arguments(task);
    a.out = mutable_at(y, task);
    a.streamed = streamed;
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
    sums.g_xhat[c] = bn_.channel(c).sum_g_xhat(sums.g[c], sums.g_xhat[c], lost(c));
  }
  return sums;
}

Normalization::Gradient::Gradient(const Normalization& normalization, const Tensor& grad_y,
                                  const Sums* sums, double count, const Tensor* grad_residual)
    : of_(normalization),
      grad_y_(grad_y),
      grad_residual_(grad_residual),
      frozen_(sums == nullptr),
      slopes_(
          of_.tiling_,
          [&](int64_t c) { return sums ? of_.bn_.channel(c).slope(sums->g_xhat[c], count) : 0.0; }),
      offsets_(of_.tiling_,
               [&](int64_t c) {
                 if (!sums) return 0.0;
                 const kernels::ChannelNorm channel = of_.bn_.channel(c);
                 const double slope = channel.slope(sums->g_xhat[c], count);
                 return channel.offset(sums->g[c], slope, count, of_.lost(c));
               }),
      kernel_(of_.pick(cpu_kernels().conv_bn_relu->apply)) {}

NormalizeArguments Normalization::Gradient::arguments(const Task& task) const {
  NormalizeArguments a = of_.arguments(task);
  a.columns.slope = frozen_ ? nullptr : slopes_.at(task.column);
  a.columns.offset = offsets_.at(task.column);
  a.grad_y = at(grad_y_, task);
  a.grad_residual = grad_residual_ ? mutable_at(*grad_residual_, task) : nullptr;
  return a;
}

void Normalization::Gradient::rows(int64_t first, int64_t count, float* out) const {
  const int64_t begin = first * of_.tiling_.channels();
  of_.tiling_.for_each_span(count, [&](Task task) {
    float* to = out + task.offset;
    task.offset += begin;
    NormalizeArguments a = arguments(task);
    a.out = to;
    kernel_(a);
  });
}

Tensor Normalization::Gradient::all() const {
  const Tensor grad_x = empty_as(of_.x_);
  of_.tiling_.for_each_task([&](const Task& task) {
    NormalizeArguments a = arguments(task);
    a.out = mutable_at(grad_x, task);
    kernel_(a);
  });
  return grad_x;
}

void Normalization::Gradient::residual() const {
  of_.tiling_.for_each_task([&](const Task& task) { kernel_(arguments(task)); });
}

}  // namespace torchweld::ops
