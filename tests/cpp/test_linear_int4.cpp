#include "kernels/linear_int4.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "buffer.h"
#include "check.h"

using namespace torchweld::kernels;

namespace {

constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Exactly `size` elements on the heap, so that AddressSanitizer sees any access beyond them.
template <class T>
std::unique_ptr<T[]> array(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]());
}

// One layer and its input, packed as the documentation of the layout says.
struct Layer {
  Layer(int64_t m, int64_t n, int64_t k, int64_t group_size)
      : m(m), n(n), k(k), group_size(group_size), groups(round_up(k, group_size) / group_size) {
    const int64_t columns = round_up(n, kPanelColumns), octets = groups * group_size / kOctet;
    x = array<float>(m * k);
    u = array<int>(n * k);
    packed = array<uint8_t>(columns * groups * group_size / 2);
    scale = array<BFloat16>(columns * groups);
    zero = array<uint8_t>(columns * groups);
    bias = array<float>(n);
    std::mt19937 random(1);
    std::uniform_real_distribution<float> uniform(-2, 2);
    for (int64_t i = 0; i < m * k; ++i) x[i] = uniform(random);
    for (int64_t j = 0; j < n; ++j) {
      bias[j] = uniform(random);
      for (int64_t g = 0; g < groups; ++g) {
        scale[at(j, g)].bits = round_to_bfloat16(std::abs(uniform(random)) * 0.01f);
        zero[at(j, g)] = static_cast<uint8_t>(random() % 16);
      }
      for (int64_t i = 0; i < k; ++i) {
        u[j * k + i] = static_cast<int>(random() % 16);
        const int64_t byte = ((j / 16 * octets + i / 8) * 16 + j % 16) * 4 + i % 4;
        packed[byte] |= static_cast<uint8_t>(u[j * k + i] << (i % 8 >= 4 ? 4 : 0));
      }
    }
  }
  int64_t at(int64_t column, int64_t group) const {
    return (column / 16 * groups + group) * 16 + column % 16;
  }
  int value(int64_t column, int64_t i) const {
    return u[column * k + i] - zero[at(column, i / group_size)];
  }
  int64_t m, n, k, group_size, groups;
  std::unique_ptr<float[]> x, bias;
  std::unique_ptr<int[]> u;
  std::unique_ptr<uint8_t[]> packed, zero;
  std::unique_ptr<BFloat16[]> scale;
};

struct Result {
  std::unique_ptr<int32_t[]> sums;
  std::unique_ptr<float[]> scale, output;
};

Result run(Capability capability, const Layer& layer, LinearActivation activation) {
  const KernelTable& kernels = table(capability);
  const int64_t m = layer.m, n = layer.n, k = layer.k;
  const int64_t stride = layer.groups * layer.group_size;
  const auto quantized = array<int8_t>(m * stride);
  const auto group_sum = array<int32_t>(m * layer.groups);
  Result result{array<int32_t>(m * layer.groups * n), array<float>(m), array<float>(m * n)};
  kernels.quantized_linear->quantize[0]({.input = layer.x.get(),
                                         .input_stride = k,
                                         .rows = m,
                                         .in_features = k,
                                         .quantized = quantized.get(),
                                         .quantized_stride = stride,
                                         .scale = result.scale.get(),
                                         .group_size = 0});
  kernels.linear_int4->prepare({.quantized = quantized.get(),
                                .quantized_stride = stride,
                                .rows = m,
                                .in_features = k,
                                .groups = layer.groups,
                                .group_size = layer.group_size,
                                .group_sum = group_sum.get()});
  LinearInt4Block block{.quantized = quantized.get(),
                        .quantized_stride = stride,
                        .group_sum = group_sum.get(),
                        .rows = m,
                        .panels = layer.packed.get(),
                        .weight_scale = layer.scale.get(),
                        .weight_zero = layer.zero.get(),
                        .groups = layer.groups,
                        .group_size = layer.group_size,
                        .columns = n,
                        .epilogue = {}};
  kernels.linear_int4->accumulate(block, result.sums.get(), n);
  block.epilogue.input_scale = result.scale.get();
  block.epilogue.bias = layer.bias.get();
  block.epilogue.activation = activation;
  block.epilogue.output = result.output.get();
  block.epilogue.output_stride = n;
  kernels.linear_int4->multiply[0](block);
  return result;
}

// The sums as integers, and the output of a layer without activation as the documentation has it.
void check_values(const Layer& layer, const Result& result, bool is_linear) {
  for (int64_t row = 0; row < layer.m; ++row) {
    const float inverse = 1.0f / result.scale[row];
    for (int64_t column = 0; column < layer.n; ++column) {
      float total = 0;
      for (int64_t g = 0; g < layer.groups; ++g) {
        int64_t sum = 0;
        for (int64_t i = g * layer.group_size; i < std::min(layer.k, (g + 1) * layer.group_size);
             ++i) {
          sum += std::lrintf(layer.x[row * layer.k + i] * inverse) * layer.value(column, i);
        }
        CHECK(result.sums[(row * layer.groups + g) * layer.n + column] == sum,
              "sum at %ld, %ld, group %ld", static_cast<long>(row), static_cast<long>(column),
              static_cast<long>(g));
        total =
            std::fma(static_cast<float>(sum), widen(layer.scale[layer.at(column, g)].bits), total);
      }
      const float expected = total * result.scale[row] + layer.bias[column];
      CHECK(!is_linear || result.output[row * layer.n + column] == expected,
            "output at %ld, %ld: %g, not %g", static_cast<long>(row), static_cast<long>(column),
            result.output[row * layer.n + column], expected);
    }
  }
}

void check(int64_t m, int64_t n, int64_t k, int64_t group_size) {
  const auto activation = static_cast<LinearActivation>((m + n + k) % 5);
  const Layer layer(m, n, k, group_size);
  const Result expected = run(Capability::scalar, layer, activation);
  check_values(layer, expected, activation == LinearActivation::identity);
  for (Capability capability : available_capabilities()) {
    const Result result = run(capability, layer, activation);
    const auto same = [&](const auto& a, const auto& b, int64_t size) {
      CHECK(std::memcmp(a.get(), b.get(), size * sizeof a[0]) == 0, "%s: %ld x %ld x %ld by %ld",
            name(capability), static_cast<long>(m), static_cast<long>(n), static_cast<long>(k),
            static_cast<long>(group_size));
    };
    same(result.sums, expected.sums, m * layer.groups * n);
    same(result.output, expected.output, m * n);
  }
}

// A tile of the gradient's product against the weight itself.
void check_dequantize(int64_t n, int64_t k, int64_t group_size) {
  const Layer layer(1, n, k, group_size);
  for (Capability capability : available_capabilities()) {
    for (int64_t first = 0; first < k; first += kPanel) {
      const auto tile = array<float>(n * kPanel);
      table(capability)
          .dequantize->int4_backward({.panels = layer.packed.get(),
                                      .weight_scale = layer.scale.get(),
                                      .weight_zero = layer.zero.get(),
                                      .groups = layer.groups,
                                      .group_size = group_size,
                                      .first = first,
                                      .columns = n,
                                      .output = tile.get()});
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = first; i < std::min(k, first + kPanel); ++i) {
          const float scale = widen(layer.scale[layer.at(j, i / group_size)].bits);
          const float expected = static_cast<float>(layer.value(j, i)) * scale;
          CHECK(tile[j * kPanel + i - first] == expected, "%s: %ld, %ld: %g, not %g",
                name(capability), static_cast<long>(j), static_cast<long>(i),
                tile[j * kPanel + i - first], expected);
        }
      }
    }
  }
}

}  // namespace

int main() {
  for (int64_t m : {1, 2, 3, 4, 5, 9}) {
    for (int64_t n : {0, 1, 16, 17, 33, 100}) {
      for (int64_t k : {0, 1, 7, 8, 33, 130}) {
        for (int64_t group_size : {8, 24, 32, 128}) check(m, n, k, group_size);
      }
    }
  }
  for (int64_t n : {1, 16, 33}) {
    for (int64_t k : {1, 8, 63, 64, 65, 200}) {
      for (int64_t group_size : {8, 24, 32, 128}) check_dequantize(n, k, group_size);
    }
  }
}
