// The CUDA kernels of conv_bn_relu, emulated: against the CPU's kernels, and their statistics and
// sums against long double arithmetic.
#include <algorithm>
#include <cmath>
#include <string>

#include "batch_norm_problem.h"

using namespace torchweld::kernels;
using namespace torchweld::kernels::cuda;

namespace {

double value(DType dtype, const void* data, int64_t i) { return read_channel({data, dtype, 0}, i); }

// --- the CPU's kernels on the same tensor: channels one by one -----------------------------------
// `slopes`: of the sums, else statistics are constants.
void run_on_cpu(const Problem& p, const double* sum_g, const double* sum_g_xhat, Results& out) {
  const auto& kernels = *table(Capability::scalar).conv_bn_relu;
  const size_t dtype = static_cast<size_t>(p.shape.dtype),
               activation = static_cast<size_t>(p.bn.activation);
  const int64_t bytes = static_cast<int64_t>(size_of(p.shape.dtype));
  const bool wide = p.shape.dtype == DType::float64;
  for (int64_t c = 0; c < p.c.channels; ++c) {
    const ChannelNorm norm = norm_of(p.bn, c);
    const double lost = wide ? norm.lost<double>() : norm.lost<float>();
    const double count = static_cast<double>(p.shape.values());
    const double slope = sum_g ? norm.slope(sum_g_xhat[c], count) : 0;
    const double values[] = {norm.mean, norm.scale(), norm.shift(lost), slope,
                             sum_g ? norm.offset(sum_g[c], slope, count, lost) : 0};
    float narrow[5][2 * kColumnGroup] = {};
    double broad[5][2 * kColumnGroup] = {};
    const void* at[5];
    for (int i = 0; i < 5; ++i) {
      narrow[i][0] = static_cast<float>(values[i]);
      broad[i][0] = values[i];
      at[i] = wide ? static_cast<const void*>(broad[i]) : narrow[i];
    }
    NormalizeArguments a{};
    const bool columns = p.c.layout == Layout::columns;
    a.runs = columns ? Runs{p.shape.values(), 1, p.c.channels}
                     : Runs{p.c.batch, p.c.pixels, p.c.channels * p.c.pixels};
    const int64_t begin = (columns ? c : c * p.c.pixels) * bytes;
    a.columns = {at[0], at[1], at[2], sum_g ? at[3] : nullptr, at[4]};
    a.x = p.x.data + begin;
    a.residual = p.c.residual ? p.residual.data + begin : nullptr;
    a.grad_y = p.grad_y.data + begin;
    a.negative_slope = p.bn.negative_slope;
    a.out = out.y.data + begin;
    const size_t layout = static_cast<size_t>(Layout::planes);
    if (columns) {
      // A column by itself: as wide as it is, which planes of one pixel are.
      a.runs.size = 1;
    }
    kernels.normalize[layout][dtype][activation](a);
    a.out = out.grad_x.data + begin;
    a.grad_residual = out.grad_residual.data + begin;
    kernels.apply[layout][dtype][activation](a);
  }
}

// --- checks --------------------------------------------------------------------------------------
void check_statistics(const Problem& p) {
  const size_t channels = static_cast<size_t>(p.c.channels);
  std::vector<double> scratch = p.scratch(), mean(channels), m2(channels), var(channels),
                      invstd(channels);
  double count = -1;
  ok(launch_batch_norm_statistics({.shape = p.shape,
                                   .x = p.x.data,
                                   .scratch = scratch.data(),
                                   .eps = 1e-3,
                                   .count = &count,
                                   .mean = mean.data(),
                                   .m2 = m2.data(),
                                   .var = var.data(),
                                   .invstd = invstd.data()},
                                  nullptr));
  const double values = static_cast<double>(p.shape.values());
  CHECK(count == values, "%s: count %g", p.name.c_str(), count);
  std::vector<long double> sums(channels), squares(channels);
  for (int64_t i = 0; i < p.x.size; ++i) sums[p.channel_of(i)] += p.x[i];
  for (int64_t i = 0; i < p.x.size; ++i) {
    const long double d = p.x[i] - sums[p.channel_of(i)] / values;
    squares[p.channel_of(i)] += d * d;
  }
  const double roundoff = p.shape.dtype == DType::float64 ? 0x1p-50 : 0x1p-22;
  for (int64_t c = 0; c < p.c.channels; ++c) {
    check_near(p, "mean", c, mean[c], sums[c] / values, roundoff);
    check_near(p, "m2", c, m2[c], squares[c], roundoff * (squares[c] + 1e-3L));
    CHECK(var[c] == m2[c] / values && invstd[c] == 1 / std::sqrt(var[c] + 1e-3), "%s: %ld",
          p.name.c_str(), static_cast<long>(c));
  }
}

void check_passes(const Problem& p, bool frozen) {
  const size_t channels = static_cast<size_t>(p.c.channels);
  const DType dtype = p.shape.dtype;
  Results expected(p), got(p);
  ok(launch_batch_norm_relu({p.shape, p.bn, p.x.data, p.residual_or_null(), got.y.data}, nullptr));

  std::vector<double> scratch = p.scratch(), sum_g(channels), sum_g_xhat(channels);
  std::vector<float> grad_weight(channels), grad_shift(channels);
  ok(launch_batch_norm_relu_reduce({.shape = p.shape,
                                    .bn = p.bn,
                                    .x = p.x.data,
                                    .residual = p.residual_or_null(),
                                    .grad_y = p.grad_y.data,
                                    .scratch = scratch.data(),
                                    .sum_g = sum_g.data(),
                                    .sum_g_xhat = sum_g_xhat.data(),
                                    .grad_weight = {grad_weight.data(), DType::float32},
                                    .grad_bias = {nullptr, DType::float32},
                                    .grad_shift = {grad_shift.data(), DType::float32}},
                                   nullptr));
  ok(launch_batch_norm_relu_apply({.shape = p.shape,
                                   .bn = p.bn,
                                   .x = p.x.data,
                                   .residual = p.residual_or_null(),
                                   .grad_y = p.grad_y.data,
                                   .sum_g = frozen ? nullptr : sum_g.data(),
                                   .sum_g_xhat = frozen ? nullptr : sum_g_xhat.data(),
                                   .count = nullptr,
                                   .grad_x = got.grad_x.data,
                                   .grad_residual = got.grad_residual.data},
                                  nullptr));
  run_on_cpu(p, frozen ? nullptr : sum_g.data(), sum_g_xhat.data(), expected);
  check_same(p, "y", got.y, expected.y);
  check_same(p, "grad_x", got.grad_x, expected.grad_x);
  check_same(p, "grad_residual", got.grad_residual, expected.grad_residual);

  // Sums of the very g, so of float; those of 16-bit elements differ from what was rounded.
  if (size_of(dtype) == 2) return;
  std::vector<long double> g(channels), g_xhat(channels), size(channels);
  for (int64_t i = 0; i < p.x.size; ++i) {
    const int64_t c = p.channel_of(i);
    const ChannelNorm norm = norm_of(p.bn, c);
    const long double term =
        static_cast<long double>(got.grad_residual[i]) * (p.x[i] - norm.mean) * norm.invstd;
    g[c] += got.grad_residual[i];
    g_xhat[c] += term;
    size[c] += std::fabs(got.grad_residual[i]) + std::fabs(static_cast<double>(term));
  }
  const double roundoff = dtype == DType::float64 ? 0x1p-50 : 0x1p-22;
  for (int64_t c = 0; c < p.c.channels; ++c) {
    const double bound = roundoff * static_cast<double>(size[c]);
    check_near(p, "sum_g", c, sum_g[c], g[c], bound);
    check_near(p, "sum_g_xhat", c, sum_g_xhat[c], g_xhat[c], bound);
    CHECK(grad_weight[c] == static_cast<float>(sum_g_xhat[c]), "%s", p.name.c_str());
    CHECK(grad_shift[c] == static_cast<float>(norm_of(p.bn, c).scale() * sum_g[c]), "%s",
          p.name.c_str());
  }
}

// Neither statistics nor weight: what follows a folded convolution, in place.
void check_bias(const Problem& p) {
  Memory y(p.x.size, p.shape.dtype, p.c.offset, 1), expected(p.x.size, p.shape.dtype, 0);
  BatchNormInput bn{};
  bn.invstd.otherwise = bn.weight.otherwise = 1;
  bn.bias = p.bn.bias;
  bn.activation = Activation::identity;
  ok(launch_batch_norm_relu({p.shape, bn, y.data, nullptr, y.data}, nullptr));
  for (int64_t i = 0; i < y.size; ++i) {
    const double sum = p.x[i] + value(p.shape.dtype, p.bias.data.get(), p.channel_of(i));
    write_channel({expected.data, p.shape.dtype}, i, sum);
    CHECK(y[i] == expected[i], "%s: bias: %g, expected %g", p.name.c_str(), y[i], expected[i]);
  }
}

// A mean far above the deviation costs nothing, in tensors of several blocks and partial results.
void check_far_mean(Layout layout) {
  const BatchNormShape shape{4, 3, 3001, layout, DType::float32};
  std::vector<float> x(static_cast<size_t>(shape.size()));
  std::mt19937 random(0);
  std::normal_distribution<float> normal(1000, 1);
  for (float& v : x) v = normal(random);
  std::vector<double> scratch(static_cast<size_t>(batch_norm_scratch(shape))), mean(3), m2(3);
  CHECK(walk_to_reduce(shape, 1).chunks > 1, "one block only");
  const StatisticsParams params{shape,       x.data(),  scratch.data(), 0,      nullptr,
                                mean.data(), m2.data(), nullptr,        nullptr};
  ok(launch_batch_norm_statistics(params, nullptr));
  for (int64_t c = 0; c < 3; ++c) {
    const auto each = [&](const auto& f) {
      for (int64_t i = 0; i < shape.size(); ++i) {
        if ((layout == Layout::columns ? i % 3 : i / 3001 % 3) == c) f(x[i]);
      }
    };
    long double sum = 0, squares = 0;
    each([&](long double v) { sum += v; });
    const long double center = sum / shape.values();
    each([&](long double v) { squares += (v - center) * (v - center); });
    CHECK(std::fabs(mean[c] - center) <= 1e-9 * center, "mean %.17g", mean[c]);
    CHECK(std::fabs(m2[c] - squares) <= 1e-6 * squares, "m2 %.17g", m2[c]);
  }
}

// 1e6 everywhere: the deviation is exactly 0, and z exactly the bias.
void check_constant() {
  const BatchNormShape shape{2, 8, 300, Layout::columns, DType::float32};
  std::vector<float> x(static_cast<size_t>(shape.size()), 1e6f);
  std::vector<double> scratch(static_cast<size_t>(batch_norm_scratch(shape))), m2(8, 1);
  const StatisticsParams params{shape,   x.data(),  scratch.data(), 0,      nullptr,
                                nullptr, m2.data(), nullptr,        nullptr};
  ok(launch_batch_norm_statistics(params, nullptr));
  CHECK(std::count(m2.begin(), m2.end(), 0) == 8, "m2 %g", m2[0]);
}

void check_nothing() {
  double count = 7;
  std::vector<double> mean(3, 7), scratch(1);
  const BatchNormShape shape{0, 3, 4, Layout::planes, DType::float32};
  StatisticsParams params{shape,       nullptr, scratch.data(), 0,      &count,
                          mean.data(), nullptr, nullptr,        nullptr};
  ok(launch_batch_norm_statistics(params, nullptr));
  CHECK(count == 0 && mean[0] == 0 && mean[2] == 0, "%g %g", count, mean[0]);
  params.shape = {2, 0, 4, Layout::planes, DType::float32};
  ok(launch_batch_norm_statistics(params, nullptr));
  CHECK(count == 8, "%g", count);
  ok(launch_batch_norm_relu({shape, {}, nullptr, nullptr, nullptr}, nullptr));
}

void check_running() {
  const int64_t channels = 300;
  const Buffer mean(channels, DType::float64, 1), var(channels, DType::float64, 2);
  for (size_t i = 0; i < kDTypeCount; ++i) {
    const DType dtype = static_cast<DType>(i);
    const Buffer before(channels, dtype, 3), running_mean(channels, dtype, 3),
        running_var(channels, dtype, 3), expected(2, dtype);
    ok(launch_update_running_stats({.channels = channels,
                                    .running_mean = {running_mean.data.get(), dtype},
                                    .running_var = {running_var.data.get(), dtype},
                                    .mean = mean.as<double>(),
                                    .var = var.as<double>(),
                                    .correction = 1.5,
                                    .momentum = 0.1},
                                   nullptr));
    for (int64_t c = 0; c < channels; ++c) {
      const double old = 0.9 * value(dtype, before.data.get(), c);
      write_channel({expected.data.get(), dtype}, 0, old + 0.1 * mean.as<double>()[c]);
      write_channel({expected.data.get(), dtype}, 1, old + 0.1 * (1.5 * var.as<double>()[c]));
      CHECK(value(dtype, running_mean.data.get(), c) == value(dtype, expected.data.get(), 0) &&
                value(dtype, running_var.data.get(), c) == value(dtype, expected.data.get(), 1),
            "channel %ld", static_cast<long>(c));
    }
  }
}

}  // namespace

int main() {
  each_problem([](const Problem& p, bool frozen) {
    check_statistics(p);
    check_bias(p);
    check_passes(p, frozen);
  });
  check_far_mean(Layout::planes);
  check_far_mean(Layout::columns);
  check_constant();
  check_nothing();
  check_running();
}
