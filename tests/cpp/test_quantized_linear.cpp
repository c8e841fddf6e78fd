#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "check.h"

using namespace torchweld::kernels;

namespace {

constexpr int64_t kSizes[] = {0, 1, 3, 4, 5, 15, 16, 17, 47, 48, 49, 65, 130};
constexpr int64_t kRows[] = {1, 2, 3, 7, 8, 9, 17};

constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Exactly `size` elements on the heap, so that AddressSanitizer sees any access beyond them.
template <class T>
std::unique_ptr<T[]> array(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]());
}

// One layer and its input, in float32, packed as the documentation of the layout says.
struct Layer {
  Layer(int64_t m, int64_t n, int64_t k) : m(m), n(n), k(k), quads(round_up(k, kQuad) / kQuad) {
    const int64_t columns = round_up(n, kPanelColumns);
    x = array<float>(m * k);
    weight = array<int8_t>(n * k);
    packed = array<int8_t>(columns * quads * kQuad);
    sum = array<int32_t>(columns);
    scale = array<float>(n);
    bias = array<float>(n);
    residual = array<float>(m * n);
    std::mt19937 random(1);
    std::uniform_real_distribution<float> uniform(-2, 2);
    for (int64_t i = 0; i < m * k; ++i) x[i] = uniform(random);
    for (int64_t i = 0; i < m * n; ++i) residual[i] = uniform(random);
    for (int64_t j = 0; j < n; ++j) {
      scale[j] = std::abs(uniform(random)) * 0.01f;
      bias[j] = uniform(random);
      for (int64_t i = 0; i < k; ++i) {
        const int8_t q = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
        weight[j * k + i] = q;
        sum[j] += q;
        packed[((j / 16 * quads + i / 4) * 16 + j % 16) * 4 + i % 4] = q;
      }
    }
  }
  int64_t m, n, k, quads;
  std::unique_ptr<float[]> x, scale, bias, residual;
  std::unique_ptr<int8_t[]> weight, packed;
  std::unique_ptr<int32_t[]> sum;
};

struct Result {
  std::unique_ptr<int32_t[]> sums;
  std::unique_ptr<float[]> scale, output;
};

// With a scale for every group of k; 0: for every row.
Result run(Capability capability, const Layer& layer, LinearActivation activation,
           int64_t group_size) {
  const QuantizedLinearKernels& kernels = *table(capability).quantized_linear;
  const int64_t m = layer.m, n = layer.n, k = layer.k;
  const int64_t stride = round_up(k, kQuad);
  const int64_t groups = group_size && k ? (k + group_size - 1) / group_size : 1;
  const auto quantized = array<int8_t>(m * stride);
  Result result{array<int32_t>(m * n), array<float>(m * groups), array<float>(m * n)};
  kernels.quantize[0]({.input = layer.x.get(),
                       .input_stride = k,
                       .rows = m,
                       .in_features = k,
                       .quantized = quantized.get(),
                       .quantized_stride = stride,
                       .scale = result.scale.get(),
                       .group_size = group_size});
  QuantizedLinearBlock block{.quantized = quantized.get(),
                             .quantized_stride = stride,
                             .rows = m,
                             .panels = layer.packed.get(),
                             .weight_sum = layer.sum.get(),
                             .quads = layer.quads,
                             .columns = n,
                             .group_quads = group_size / kQuad,
                             .group_scale = result.scale.get(),
                             .epilogue = {.input_scale = group_size ? nullptr : result.scale.get(),
                                          .weight_scale = layer.scale.get(),
                                          .bias = layer.bias.get(),
                                          .activation = activation,
                                          .residual = layer.residual.get(),
                                          .residual_stride = n,
                                          .residual_is_float = false,
                                          .output = result.output.get(),
                                          .output_stride = n}};
  kernels.multiply[0](block);
  if (group_size == 0 && k <= kMaxSummed) {
    block.epilogue.output = result.sums.get();
    kernels.accumulate(block);
  }
  return result;
}

int64_t exact_sum(const Layer& layer, const Result& result, int64_t row, int64_t column) {
  const float inverse = 1.0f / result.scale[row];
  int64_t sum = 0;
  for (int64_t i = 0; i < layer.k; ++i) {
    sum += std::lrintf(layer.x[row * layer.k + i] * inverse) * layer.weight[column * layer.k + i];
  }
  return sum;
}

void check(int64_t m, int64_t n, int64_t k, LinearActivation activation, int64_t group_size = 0) {
  const Layer layer(m, n, k);
  const int64_t groups = group_size && k ? (k + group_size - 1) / group_size : 1;
  const Result expected = run(Capability::scalar, layer, activation, group_size);
  for (Capability capability : available_capabilities()) {
    const Result result = run(capability, layer, activation, group_size);
    const auto same = [&](const auto& a, const auto& b, int64_t size) {
      CHECK(std::memcmp(a.get(), b.get(), size * sizeof a[0]) == 0, "%s: %ld x %ld x %ld",
            name(capability), static_cast<long>(m), static_cast<long>(n), static_cast<long>(k));
    };
    same(result.scale, expected.scale, m * groups);
    same(result.sums, expected.sums, m * n);
    same(result.output, expected.output, m * n);
  }
  if (group_size || k > kMaxSummed) return;
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t column = 0; column < n; ++column) {
      CHECK(expected.sums[row * n + column] == exact_sum(layer, expected, row, column),
            "sum at %ld, %ld of %ld x %ld x %ld", static_cast<long>(row), static_cast<long>(column),
            static_cast<long>(m), static_cast<long>(n), static_cast<long>(k));
    }
  }
}

}  // namespace

int main() {
  for (int64_t m : kRows) {
    for (int64_t n : kSizes) {
      for (int64_t k : kSizes) {
        check(m, n, k, static_cast<LinearActivation>((m + n + k) % 5));
        check(m, n, k, LinearActivation::identity, 8);
      }
    }
  }
  check(2, 17, kMaxSummed + 1, LinearActivation::identity);
}
