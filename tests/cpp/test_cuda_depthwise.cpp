// The CUDA kernels of depthwise convolution, emulated, against sums in double.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "check.h"
#include "device_memory.h"
#include "kernels/cuda/depthwise.h"

using namespace torchweld::kernels;
using namespace torchweld::kernels::cuda;

namespace {

struct Window {
  int taps, stride, padding, dilation;
};

struct Case {
  int64_t batch, channels;
  int height, width;
  Window rows, columns;
  int64_t offset = 0;  // elements that memory begins behind an aligned address
};

constexpr Window k3{3, 1, 1, 1}, k3s2{3, 2, 1, 1}, k5{5, 1, 2, 1}, k5s2{5, 2, 2, 1};
constexpr Case kCases[] = {
    {2, 16, 7, 9, k3, k3},
    {1, 24, 8, 13, k3s2, k3s2},
    {1, 136, 6, 5, k5, k5},
    {2, 8, 9, 10, k5s2, k5s2},
    {1, 8, 1, 1, k3, k3},
    {1, 40, 5, 6, k3, k3, 1},                      // not aligned
    {3, 7, 5, 6, k3s2, k3},                        // no multiple of anything
    {1, 1, 6, 7, k3, k3},                          // of one channel
    {1, 33, 4, 9, {2, 1, 0, 1}, {4, 3, 2, 2}},     // any window
    {1, 16, 9, 9, {3, 2, 0, 2}, {3, 2, 0, 1}},     // strips from column 0
    {1, 16, 6, 11, {3, 1, 4, 1}, {3, 2, 5, 1}},    // more padding than taps
    {1, 16, 8, 12, {1, 2, 0, 1}, {1, 1, 0, 1}},    // a row of taps, and one
    {1, 16, 12, 14, {5, 1, 0, 1}, {3, 1, 1, 2}},   // dilated
    {1, 16, 13, 15, {7, 1, 3, 1}, {7, 1, 3, 1}},   //
    {1, 8, 21, 22, {15, 1, 7, 1}, {16, 1, 7, 1}},  // taps for several blocks' worth of threads
    {2, 16, 40, 41, k3, k3},                       // several rows a thread, several blocks
    {1, 8, 64, 300, {3, 1, 1, 1}, {3, 1, 1, 1}},   // blocks side by side
};

DepthwiseAxis axis_of(int size, const Window& w) {
  return {size,      (size + 2 * w.padding - w.dilation * (w.taps - 1) - 1) / w.stride + 1,
          w.taps,    w.stride,
          w.padding, w.dilation};
}

struct Problem {
  Problem(const Case& c, DType dtype)
      : shape{c.batch, c.channels, axis_of(c.height, c.rows), axis_of(c.width, c.columns), dtype},
        in(c.batch * c.height * c.width * c.channels),
        out(c.batch * shape.rows.out_size * shape.columns.out_size * c.channels),
        weights(c.channels * c.rows.taps * c.columns.taps),
        x(in, dtype, c.offset, 1),
        weight(weights, dtype, c.offset, 2),
        bias(c.channels, dtype, 0, 3),
        residual(out, dtype, c.offset, 4),
        grad_y(out, dtype, c.offset, 5) {
    name = "depthwise " + std::to_string(&c - kCases) + " dtype " +
           std::to_string(static_cast<int>(dtype));
  }

  // f(output element, input element, weight element) for all products.
  template <class F>
  void each(const F& f) const {
    const DepthwiseAxis &h = shape.rows, &w = shape.columns;
    for (int64_t i = 0; i < out; ++i) {
      const int64_t c = i % shape.channels, q = i / shape.channels % w.out_size;
      const int64_t p = i / shape.channels / w.out_size % h.out_size;
      const int64_t n = i / shape.channels / w.out_size / h.out_size;
      for (int r = 0; r < h.taps; ++r) {
        for (int s = 0; s < w.taps; ++s) {
          const int64_t y = p * h.stride + r * h.dilation - h.padding;
          const int64_t x = q * w.stride + s * w.dilation - w.padding;
          if (y < 0 || y >= h.size || x < 0 || x >= w.size) continue;
          f(i, ((n * h.size + y) * w.size + x) * shape.channels + c, (c * h.taps + r) * w.taps + s);
        }
      }
    }
  }

  DepthwiseShape shape;
  int64_t in, out, weights;
  Memory x, weight, bias, residual, grad_y;
  std::string name;
};

// A sum of products, and of their sizes.
struct Sums {
  explicit Sums(int64_t size) : values(static_cast<size_t>(size)), sizes(values.size()) {}
  void add(int64_t i, double value) {
    values[static_cast<size_t>(i)] += value;
    sizes[static_cast<size_t>(i)] += std::fabs(value);
  }
  std::vector<double> values, sizes;
};

// Rounded once, of sums of at most a thousand terms in float32.
void check_sums(const Problem& p, const char* what, const Memory& got, const Sums& expected) {
  const double last[] = {0x1p-23, 0, 0x1p-8, 0x1p-11};
  for (size_t i = 0; i < expected.values.size(); ++i) {
    const double value = expected.values[i];
    const double bound = last[static_cast<size_t>(p.shape.dtype)] * std::fabs(value) +
                         0x1p-20 * expected.sizes[i] + 0x1p-24;
    CHECK(std::fabs(got[static_cast<int64_t>(i)] - value) <= bound, "%s: %s[%zu]: %g, expected %g",
          p.name.c_str(), what, i, got[static_cast<int64_t>(i)], value);
  }
}

void check_forward(const Problem& p, bool all) {
  const DType dtype = p.shape.dtype;
  Memory y(p.out, dtype, 0);
  CHECK(launch_depthwise({.shape = p.shape,
                          .x = p.x.data,
                          .weight = p.weight.data,
                          .bias = {all ? p.bias.data : nullptr, dtype, 0},
                          .residual = all ? p.residual.data : nullptr,
                          .activation = all ? Activation::leaky_relu : Activation::identity,
                          .negative_slope = 0.25,
                          .y = y.data},
                         nullptr) == cudaSuccess,
        "%s", p.name.c_str());
  Sums sums(p.out);
  p.each([&](int64_t o, int64_t i, int64_t w) { sums.add(o, p.x[i] * p.weight[w]); });
  for (int64_t i = 0; all && i < p.out; ++i) {
    sums.add(i, p.bias[i % p.shape.channels]);
    sums.add(i, p.residual[i]);
    double& z = sums.values[static_cast<size_t>(i)];
    if (z < 0) z *= 0.25;
  }
  check_sums(p, "y", y, sums);
}

void check_gradients(const Problem& p) {
  const DType dtype = p.shape.dtype;
  Memory grad_x(p.in, dtype, 0), grad_weight(p.weights, dtype, 0);
  CHECK(launch_depthwise_input_gradient({p.shape, p.grad_y.data, p.weight.data, grad_x.data},
                                        nullptr) == cudaSuccess,
        "%s", p.name.c_str());
  std::vector<double> scratch(static_cast<size_t>(depthwise_scratch(p.shape)));
  CHECK(launch_depthwise_weight_gradient(
            {p.shape, p.x.data, p.grad_y.data, scratch.data(), grad_weight.data}, nullptr) ==
            cudaSuccess,
        "%s", p.name.c_str());
  Sums of_x(p.in), of_weight(p.weights);
  p.each([&](int64_t o, int64_t i, int64_t w) {
    of_x.add(i, p.grad_y[o] * p.weight[w]);
    of_weight.add(w, p.grad_y[o] * p.x[i]);
  });
  check_sums(p, "grad_x", grad_x, of_x);
  check_sums(p, "grad_weight", grad_weight, of_weight);
}

void check_can() {
  DepthwiseShape shape{1, 8, axis_of(64, {31, 1, 15, 1}), axis_of(64, {9, 1, 4, 1}),
                       DType::float32};
  CHECK(depthwise_can(shape), "31 x 9 taps");
  shape.columns = axis_of(64, {31, 1, 15, 1});
  CHECK(!depthwise_can(shape), "31 x 31 taps");
  shape.rows = shape.columns = axis_of(1 << 16, {1 << 16, 1, 0, 1});
  CHECK(!depthwise_can(shape), "2^32 taps");
  shape = {1, 8, axis_of(9, k3), axis_of(9, k3), DType::float64};
  CHECK(!depthwise_can(shape), "float64");
  shape.dtype = DType::float16;
  shape.batch = int64_t{1} << 30;
  CHECK(!depthwise_can(shape), "more rows than 2^31");
}

void check_nothing() {
  const DepthwiseShape shape{0, 8, axis_of(9, k3), axis_of(9, k3), DType::float32};
  std::vector<double> scratch(static_cast<size_t>(depthwise_scratch(shape)) + 1);
  std::vector<float> grad_weight(72, 7);
  CHECK(launch_depthwise_input_gradient({shape, nullptr, nullptr, nullptr}, nullptr) == cudaSuccess,
        "no input");
  CHECK(launch_depthwise_weight_gradient(
            {shape, nullptr, nullptr, scratch.data(), grad_weight.data()}, nullptr) == cudaSuccess,
        "no input");
  for (const float g : grad_weight) CHECK(g == 0, "%g", static_cast<double>(g));
}

}  // namespace

int main() {
  for (const Case& c : kCases) {
    const bool is_large = c.batch * c.channels * c.height * c.width > 10000;
    for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
      if (is_large && dtype == DType::float16) continue;
      const Problem p(c, dtype);
      CHECK(depthwise_can(p.shape), "%s", p.name.c_str());
      check_forward(p, false);
      check_forward(p, true);
      check_gradients(p);
    }
  }
  check_can();
  check_nothing();
}
