// The CUDA kernels of conv_bn_relu, emulated: against the CPU's kernels, and their statistics and
// sums against long double arithmetic.
#include <algorithm>
#include <cmath>
#include <string>

#include "buffer.h"
#include "check.h"
#include "kernels/cuda/batch_norm.h"
#include "kernels/cuda/batch_norm_walk.h"

using namespace torchweld::kernels;
using namespace torchweld::kernels::cuda;

namespace {

void ok(cudaError_t error) { CHECK(error == cudaSuccess, "error %d", error); }

struct Case {
  int64_t batch, channels, pixels;
  Layout layout;
  int64_t offset = 0;  // elements that memory begins behind an aligned address
  bool residual = true;
};

constexpr Case kCases[] = {
    {1, 1, 1, Layout::planes},           {3, 1, 49, Layout::planes},
    {1, 3, 5, Layout::planes},           {5, 7, 49, Layout::planes},
    {2, 33, 1, Layout::planes},          {2, 3, 1000, Layout::planes},
    {1, 2, 4500, Layout::planes},        {40, 64, 4, Layout::planes, 1},
    {2, 2, 16, Layout::planes, 8},       {1, 1, 1, Layout::columns},
    {1, 3, 5, Layout::columns},          {4, 7, 49, Layout::columns},
    {1, 33, 300, Layout::columns},       {2, 64, 9, Layout::columns},
    {1, 64, 5, Layout::columns, 1},      {2, 130, 49, Layout::columns},
    {1, 264, 50, Layout::columns, 0, 0}, {1, 8, 1000, Layout::columns, 0, 0},
};

std::string describe(const Case& c, DType dtype, Activation activation) {
  return std::to_string(c.batch) + " x " + std::to_string(c.channels) + " x " +
         std::to_string(c.pixels) + " layout " + std::to_string(static_cast<int>(c.layout)) +
         " offset " + std::to_string(c.offset) + " dtype " +
         std::to_string(static_cast<int>(dtype)) + " activation " +
         std::to_string(static_cast<int>(activation));
}

double value(DType dtype, const void* data, int64_t i) { return read_channel({data, dtype, 0}, i); }

// A tensor's memory, of the exact size and `offset` elements into an allocation.
struct Memory {
  Memory(const Case& c, DType dtype, unsigned seed, bool fill = true)
      : dtype(dtype),
        size(c.batch * c.channels * c.pixels),
        buffer(fill ? Buffer(size + c.offset, dtype, seed, true) : Buffer(size + c.offset, dtype)),
        data(buffer.data.get() + c.offset * static_cast<int64_t>(size_of(dtype))) {}
  double operator[](int64_t i) const { return value(dtype, data, i); }

  DType dtype;
  int64_t size;
  Buffer buffer;
  char* data;
};

struct Problem {
  Problem(const Case& c, DType dtype, Activation activation)
      : c(c),
        shape{c.batch, c.channels, c.pixels, c.layout, dtype},
        name(describe(c, dtype, activation)),
        x(c, dtype, 1),
        residual(c, dtype, 2),
        grad_y(c, dtype, 3),
        mean(c.channels, DType::float64, 4, true),
        invstd(c.channels, DType::float64, 5),
        weight(c.channels, DType::float32, 6, true),
        bias(c.channels, dtype, 7, true) {
    bn = {{mean.data.get(), DType::float64, 0},
          {invstd.data.get(), DType::float64, 1},
          {weight.data.get(), DType::float32, 1},
          {bias.data.get(), dtype, 0},
          false,
          0,
          activation,
          0.1};
  }

  int64_t channel_of(int64_t i) const {
    return c.layout == Layout::columns ? i % c.channels : i / c.pixels % c.channels;
  }
  const void* residual_or_null() const { return c.residual ? residual.data : nullptr; }
  std::vector<double> scratch() const {
    return std::vector<double>(static_cast<size_t>(batch_norm_scratch(shape)));
  }

  Case c;
  BatchNormShape shape;
  std::string name;
  Memory x, residual, grad_y;
  Buffer mean, invstd, weight, bias;
  BatchNormInput bn;
};

// --- the CPU's kernels on the same tensor: channels one by one -----------------------------------
struct Expected {
  explicit Expected(const Case& c, DType dtype)
      : y(c, dtype, 0, false), grad_x(c, dtype, 0, false), grad_residual(c, dtype, 0, false) {}
  Memory y, grad_x, grad_residual;
};

// `slopes`: of the sums, else statistics are constants.
void run_on_cpu(const Problem& p, const double* sum_g, const double* sum_g_xhat, Expected& out) {
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

// The same bits, or where the device's own exponential function is inside, almost.
void check_same(const Problem& p, const char* what, const Memory& got, const Memory& expected) {
  const bool exact = p.bn.activation != Activation::silu || p.shape.dtype == DType::float32;
  const double roundoff[] = {0x1p-21, 0x1p-49, 0x1p-7, 0x1p-10};
  for (int64_t i = 0; i < got.size; ++i) {
    const double a = got[i], b = expected[i];
    const double bound =
        exact ? 0 : roundoff[static_cast<int>(p.shape.dtype)] * (std::fabs(b) + 0.25);
    CHECK(std::fabs(a - b) <= bound, "%s: %s of element %ld: %g, expected %g", p.name.c_str(), what,
          static_cast<long>(i), a, b);
  }
}

void check_near(const Problem& p, const char* what, int64_t c, double got, long double expected,
                double bound) {
  CHECK(std::fabs(got - static_cast<double>(expected)) <= bound,
        "%s: %s of channel %ld: %.17g, expected %.17g", p.name.c_str(), what, static_cast<long>(c),
        got, static_cast<double>(expected));
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
  Expected expected(p.c, dtype), got(p.c, dtype);
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

// Small tensors in one launch: what the launches by themselves give, but for other partial sums.
void check_small(const Problem& p, bool frozen) {
  if (!batch_norm_is_small(p.shape)) return;
  const size_t channels = static_cast<size_t>(p.c.channels);
  const DType dtype = p.shape.dtype;
  Expected got(p.c, dtype), expected(p.c, dtype);
  std::vector<double> scratch = p.scratch(), mean(channels), var(channels), invstd(channels);
  BatchNormReLUParams params{p.shape, p.bn, p.x.data, p.residual_or_null(), got.y.data};
  params.bn.mean.data = mean.data(), params.bn.invstd.data = invstd.data();
  const auto statistics_into = [&](double* m, double* i) {
    return StatisticsParams{p.shape, p.x.data, scratch.data(), 1e-3, nullptr,
                            m,       nullptr,  var.data(),     i};
  };
  ok(launch_batch_norm_relu_train(statistics_into(mean.data(), invstd.data()), params, nullptr));
  std::vector<double> other_mean(channels), other_invstd(channels);
  ok(launch_batch_norm_statistics(statistics_into(other_mean.data(), other_invstd.data()),
                                  nullptr));
  const double roundoff = dtype == DType::float64 ? 0x1p-50 : 0x1p-21;
  for (int64_t c = 0; c < p.c.channels; ++c) {
    check_near(p, "mean", c, mean[c], other_mean[c], roundoff);
    check_near(p, "invstd", c, invstd[c], other_invstd[c], roundoff * (1 + other_invstd[c]));
  }
  // With the very statistics it found.
  params.y = expected.y.data;
  ok(launch_batch_norm_relu(params, nullptr));
  check_same(p, "y of a small tensor", got.y, expected.y);

  std::vector<double> sum_g(channels), sum_g_xhat(channels);
  std::vector<float> grad_weight(channels);
  ReduceParams sums{.shape = p.shape,
                    .bn = params.bn,
                    .x = p.x.data,
                    .residual = p.residual_or_null(),
                    .grad_y = p.grad_y.data,
                    .scratch = scratch.data(),
                    .sum_g = sum_g.data(),
                    .sum_g_xhat = sum_g_xhat.data(),
                    .grad_weight = {grad_weight.data(), DType::float32},
                    .grad_bias = {nullptr, DType::float32},
                    .grad_shift = {nullptr, DType::float32}};
  ApplyParams apply{.shape = p.shape,
                    .bn = params.bn,
                    .x = p.x.data,
                    .residual = p.residual_or_null(),
                    .grad_y = p.grad_y.data,
                    .sum_g = frozen ? nullptr : sum_g.data(),
                    .sum_g_xhat = frozen ? nullptr : sum_g_xhat.data(),
                    .count = nullptr,
                    .grad_x = got.grad_x.data,
                    .grad_residual = got.grad_residual.data};
  ok(launch_batch_norm_relu_backward(sums, apply, nullptr));
  apply.grad_x = expected.grad_x.data, apply.grad_residual = expected.grad_residual.data;
  ok(launch_batch_norm_relu_apply(apply, nullptr));
  check_same(p, "grad_x of a small tensor", got.grad_x, expected.grad_x);
  check_same(p, "grad_residual of a small tensor", got.grad_residual, expected.grad_residual);
  std::vector<double> other_g(channels), other_g_xhat(channels);
  sums.sum_g = other_g.data(), sums.sum_g_xhat = other_g_xhat.data();
  ok(launch_batch_norm_relu_reduce(sums, nullptr));
  const double bound = roundoff * 16 * (1 + static_cast<double>(p.shape.values()));
  for (int64_t c = 0; c < p.c.channels; ++c) {
    check_near(p, "sum_g", c, sum_g[c], other_g[c], bound);
    check_near(p, "sum_g_xhat", c, sum_g_xhat[c], other_g_xhat[c], bound * (1 + invstd[c]));
    CHECK(grad_weight[c] == static_cast<float>(other_g_xhat[c]) ||
              std::fabs(grad_weight[c] - other_g_xhat[c]) <= bound * (1 + invstd[c]),
          "%s", p.name.c_str());
  }
}

void check_what_is_small() {
  CHECK(batch_norm_is_small({8, 512, 49, Layout::columns, DType::bfloat16}), "8 images of 7 x 7");
  CHECK(!batch_norm_is_small({256, 64, 3136, Layout::columns, DType::bfloat16}), "256 of 56 x 56");
  CHECK(batch_norm_is_small({1, 256, 196, Layout::planes, DType::float32}), "an image of 14 x 14");
  CHECK(!batch_norm_is_small({256, 64, 3136, Layout::planes, DType::float32}), "256 of 56 x 56");
  CHECK(!batch_norm_is_small({0, 8, 49, Layout::columns, DType::float32}), "nothing");
}

// Neither statistics nor weight: what follows a folded convolution, in place.
void check_bias(const Problem& p) {
  Memory y(p.c, p.shape.dtype, 1), expected(p.c, p.shape.dtype, 0, false);
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
  // Every activation on a small tensor; of the others, one after the other. Of large ones, one
  // dtype.
  size_t next = 0;
  for (const Case& c : kCases) {
    for (size_t i = 0; i < kDTypeCount; ++i) {
      const DType dtype = static_cast<DType>(i);
      const bool is_large = c.batch * c.channels * c.pixels > 4000;
      if (is_large && i != static_cast<size_t>(&c - kCases) % kDTypeCount) continue;
      check_statistics(Problem(c, dtype, Activation::relu));
      check_bias(Problem(c, dtype, Activation::relu));
      const size_t activations = c.batch == 2 && c.pixels < 50 ? kActivationCount : 1;
      for (size_t k = 0; k < activations; ++k, ++next) {
        check_passes(Problem(c, dtype, static_cast<Activation>(next % kActivationCount)), next % 2);
        check_small(Problem(c, dtype, static_cast<Activation>(next % kActivationCount)), next % 2);
      }
    }
  }
  check_far_mean(Layout::planes);
  check_far_mean(Layout::columns);
  check_constant();
  check_nothing();
  check_running();
  check_what_is_small();
}
