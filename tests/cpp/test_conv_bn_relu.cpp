// Statistics, normalize, and its backward: every instruction set against the scalar one, over spans
// with ragged ends and strides, with all activations; and the scalar one against double arithmetic.
#include <algorithm>
#include <cmath>

#include "buffer.h"
#include "check.h"

using namespace torchweld::kernels;

namespace {

struct Case {
  Layout layout;
  Runs runs;
  int64_t columns() const { return layout == Layout::columns ? runs.size : 1; }
  int64_t elements() const { return (runs.count - 1) * runs.stride + runs.size; }
};

constexpr Case kCases[] = {
    {Layout::planes, {1, 1, 1}},       {Layout::planes, {3, 7, 20}},
    {Layout::planes, {2, 49, 98}},     {Layout::planes, {2, 65, 65}},
    {Layout::planes, {1, 3000, 3000}}, {Layout::columns, {1, 1, 1}},
    {Layout::columns, {5, 3, 3}},      {Layout::columns, {40, 16, 33}},
    {Layout::columns, {33, 50, 50}},   {Layout::columns, {70, 256, 300}},
    {Layout::planes, {3, 49, 64}},     {Layout::columns, {9, 50, 64}},
};

struct Outputs {
  Outputs(const Case& c, DType dtype)
      : y(c.elements(), dtype),
        grad_x(c.elements(), dtype),
        grad_residual(c.elements(), dtype),
        mean(c.columns(), DType::float64),
        m2(c.columns(), DType::float64),
        first(c.columns(), DType::float64),
        second(c.columns(), DType::float64) {}
  Buffer y, grad_x, grad_residual, mean, m2, first, second;
};

// Everything the table offers, on one span.
Outputs run(Capability capability, const Case& c, DType dtype, size_t activation) {
  const auto& table = *torchweld::kernels::table(capability).conv_bn_relu;
  const size_t layout = static_cast<size_t>(c.layout), type = static_cast<size_t>(dtype);
  const Buffer x(c.elements(), dtype, 1, true), residual(c.elements(), dtype, 2, true),
      grad(c.elements(), dtype, 3, true);
  // Coefficients are padded by contract.
  const DType arithmetic = dtype == DType::float64 ? DType::float64 : DType::float32;
  const int64_t padded = c.columns() + kColumnGroup;
  const Buffer mean(padded, arithmetic, 4), scale(padded, arithmetic, 5),
      shift(padded, arithmetic, 6), slope(padded, arithmetic, 7), offset(padded, arithmetic, 8);
  Outputs out(c, dtype);

  NormalizeArguments a{};
  a.runs = c.runs;
  a.columns = {mean.data.get(), scale.data.get(), shift.data.get(), slope.data.get(),
               offset.data.get()};
  a.x = x.data.get();
  a.residual = residual.data.get();
  a.negative_slope = 0.1;
  a.out = out.y.data.get();
  table.normalize[layout][type][activation](a);
  a.streamed = true;
  for (const int64_t shift : {0, 8}) {
    const Aligned streamed(out.y, shift);
    a.out = streamed.data;
    table.normalize[layout][type][activation](a);
    CHECK(streamed == out.y, "%s: streamed", name(capability));
  }

  a.grad_y = grad.data.get();
  table.reduce[layout][type][activation](a, out.first.as<double>(), out.second.as<double>());
  a.out = out.grad_x.data.get();
  a.grad_residual = out.grad_residual.data.get();
  table.apply[layout][type][activation](a);
  // In two parts, the second added to the first.
  std::fill_n(out.mean.as<double>(), c.columns(), 0);
  std::fill_n(out.m2.as<double>(), c.columns(), 0);
  const int64_t first = c.runs.count / 3, values = c.layout == Layout::columns ? 1 : c.runs.size;
  const Runs parts[] = {{first, c.runs.size, c.runs.stride},
                        {c.runs.count - first, c.runs.size, c.runs.stride}};
  if (first > 0) {
    table.statistics[layout][type](x.data.get(), parts[0], 0, out.mean.as<double>(),
                                   out.m2.as<double>());
  }
  table.statistics[layout][type](
      x.data.get() + first * c.runs.stride * static_cast<int64_t>(size_of(dtype)), parts[1],
      static_cast<double>(first * values), out.mean.as<double>(), out.m2.as<double>());
  return out;
}

void check_isas(const Case& c, DType dtype, size_t activation) {
  const Outputs expected = run(Capability::scalar, c, dtype, activation);
  for (Capability capability : available_capabilities()) {
    const Outputs out = run(capability, c, dtype, activation);
    const bool same = out.y == expected.y && out.grad_x == expected.grad_x &&
                      out.grad_residual == expected.grad_residual && out.mean == expected.mean &&
                      out.m2 == expected.m2 && out.first == expected.first &&
                      out.second == expected.second;
    CHECK(same, "%s: layout %d, runs %ld x %ld, dtype %d, activation %zu", name(capability),
          static_cast<int>(c.layout), static_cast<long>(c.runs.count),
          static_cast<long>(c.runs.size), static_cast<int>(dtype), activation);
  }
}

// The mean and m2 of each column in long double.
void check_statistics(const Case& c) {
  const Outputs out = run(Capability::scalar, c, DType::float32, 0);
  const Buffer x(c.elements(), DType::float32, 1, true);
  for (int64_t k = 0; k < c.columns(); ++k) {
    const bool planes = c.layout == Layout::planes;
    long double sum = 0, squares = 0, count = 0;
    const auto each = [&](const auto& f) {
      for (int64_t r = 0; r < c.runs.count; ++r) {
        for (int64_t i = planes ? 0 : k; i < (planes ? c.runs.size : k + 1); ++i) {
          f(x.as<float>()[r * c.runs.stride + i]);
        }
      }
    };
    each([&](long double v) { sum += v, ++count; });
    const long double mean = sum / count;
    each([&](long double v) { squares += (v - mean) * (v - mean); });
    CHECK(std::fabs(out.mean.as<double>()[k] - mean) < 1e-7, "mean of column %ld",
          static_cast<long>(k));
    CHECK(std::fabs(out.m2.as<double>()[k] - squares) <= 1e-5 * (squares + 1e-6L),
          "m2 of column %ld", static_cast<long>(k));
  }
}

}  // namespace

int main() {
  for (const Case& c : kCases) {
    check_statistics(c);
    for (size_t dtype = 0; dtype < kDTypeCount; ++dtype) {
      for (size_t activation = 0; activation < kActivationCount; ++activation) {
        check_isas(c, static_cast<DType>(dtype), activation);
      }
    }
  }
}
