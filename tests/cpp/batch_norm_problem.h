// Tensors and arguments of batch norm on CUDA, for the tests of its kernels.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "check.h"
#include "device_memory.h"

namespace torchweld::kernels::cuda {

inline void ok(cudaError_t error) { CHECK(error == cudaSuccess, "error %d", error); }

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

inline std::string describe(const Case& c, DType dtype, Activation activation) {
  return std::to_string(c.batch) + " x " + std::to_string(c.channels) + " x " +
         std::to_string(c.pixels) + " layout " + std::to_string(static_cast<int>(c.layout)) +
         " offset " + std::to_string(c.offset) + " dtype " +
         std::to_string(static_cast<int>(dtype)) + " activation " +
         std::to_string(static_cast<int>(activation));
}

struct Problem {
  Problem(const Case& c, DType dtype, Activation activation)
      : c(c),
        shape{c.batch, c.channels, c.pixels, c.layout, dtype},
        name(describe(c, dtype, activation)),
        x(shape.size(), dtype, c.offset, 1),
        residual(shape.size(), dtype, c.offset, 2),
        grad_y(shape.size(), dtype, c.offset, 3),
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

// What the kernels write.
struct Results {
  explicit Results(const Problem& p)
      : y(p.shape.size(), p.shape.dtype, p.c.offset),
        grad_x(p.shape.size(), p.shape.dtype, p.c.offset),
        grad_residual(p.shape.size(), p.shape.dtype, p.c.offset) {}
  Memory y, grad_x, grad_residual;
};

// The same bits, or where the device's own exponential function is inside, almost.
inline void check_same(const Problem& p, const char* what, const Memory& got,
                       const Memory& expected) {
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

inline void check_near(const Problem& p, const char* what, int64_t c, double got,
                       long double expected, double bound) {
  CHECK(std::fabs(got - static_cast<double>(expected)) <= bound,
        "%s: %s of channel %ld: %.17g, expected %.17g", p.name.c_str(), what, static_cast<long>(c),
        got, static_cast<double>(expected));
}

// f(problem, whether statistics are constants): every activation on a small tensor; of the others,
// one after the other. Of large ones, one dtype.
template <class F>
void each_problem(const F& f) {
  size_t next = 0;
  for (const Case& c : kCases) {
    for (size_t i = 0; i < kDTypeCount; ++i) {
      const bool is_large = c.batch * c.channels * c.pixels > 4000;
      if (is_large && i != static_cast<size_t>(&c - kCases) % kDTypeCount) continue;
      const size_t activations = c.batch == 2 && c.pixels < 50 ? kActivationCount : 1;
      for (size_t k = 0; k < activations; ++k, ++next) {
        const auto activation = static_cast<Activation>(next % kActivationCount);
        f(Problem(c, static_cast<DType>(i), activation), next % 2 != 0);
      }
    }
  }
}

}  // namespace torchweld::kernels::cuda
