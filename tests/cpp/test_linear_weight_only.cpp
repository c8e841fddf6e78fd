#include "kernels/linear_weight_only.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <random>

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
  Layer(int64_t m, int64_t n, int64_t k) : m(m), n(n), k(k), quads(round_up(k, kQuad) / kQuad) {
    x = array<float>(m * k);
    weight = array<int8_t>(n * k);
    packed = array<int8_t>(round_up(n, kPanelColumns) * quads * kQuad);
    scale = array<float>(n);
    bias = array<float>(n);
    std::mt19937 random(1);
    std::uniform_real_distribution<float> uniform(-2, 2);
    for (int64_t i = 0; i < m * k; ++i) x[i] = uniform(random);
    for (int64_t j = 0; j < n; ++j) {
      scale[j] = std::abs(uniform(random)) * 0.01f;
      bias[j] = uniform(random);
      for (int64_t i = 0; i < k; ++i) {
        const int8_t q = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
        weight[j * k + i] = q;
        packed[((j / 16 * quads + i / 4) * 16 + j % 16) * 4 + i % 4] = q;
      }
    }
  }
  int64_t m, n, k, quads;
  std::unique_ptr<float[]> x, scale, bias;
  std::unique_ptr<int8_t[]> weight, packed;
};

// Each sum is one chain, so the result is known to the last bit.
void check(int64_t m, int64_t n, int64_t k) {
  const Layer layer(m, n, k);
  for (Capability capability : available_capabilities()) {
    const WeightOnlyKernels& kernels = *table(capability).linear_weight_only;
    const auto interleaved = array<float>(m * k), output = array<float>(m * n);
    kernels.interleave[0]({.input = layer.x.get(),
                           .input_stride = k,
                           .rows = m,
                           .in_features = k,
                           .output = interleaved.get()});
    WeightOnlyBlock block{.input = interleaved.get(),
                          .rows = m,
                          .in_features = k,
                          .panels = layer.packed.get(),
                          .columns = n,
                          .epilogue = {}};
    block.epilogue.weight_scale = layer.scale.get();
    block.epilogue.bias = layer.bias.get();
    block.epilogue.output = output.get();
    block.epilogue.output_stride = n;
    kernels.multiply[0](block);
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t j = 0; j < n; ++j) {
        float sum = 0;
        for (int64_t i = 0; i < k; ++i) {
          sum = std::fma(layer.x[row * k + i], static_cast<float>(layer.weight[j * k + i]), sum);
        }
        const float expected = std::fma(sum, layer.scale[j], layer.bias[j]);
        CHECK(output[row * n + j] == expected, "%s: %ld x %ld x %ld at %ld, %ld: %g, not %g",
              name(capability), static_cast<long>(m), static_cast<long>(n), static_cast<long>(k),
              static_cast<long>(row), static_cast<long>(j), output[row * n + j], expected);
      }
    }
  }
}

// A tile of the gradient's product against the weight itself.
void check_dequantize(int64_t n, int64_t k) {
  const Layer layer(1, n, k);
  for (Capability capability : available_capabilities()) {
    for (int64_t first = 0; first < k; first += kPanel) {
      const auto tile = array<float>(n * kPanel);
      table(capability)
          .dequantize->backward({.panels = layer.packed.get(),
                                 .quads = layer.quads,
                                 .first = first,
                                 .columns = n,
                                 .weight_scale = layer.scale.get(),
                                 .output = tile.get()});
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = first; i < std::min(k, first + kPanel); ++i) {
          const float expected = static_cast<float>(layer.weight[j * k + i]) * layer.scale[j];
          CHECK(tile[j * kPanel + i - first] == expected, "%s: %ld, %ld", name(capability),
                static_cast<long>(j), static_cast<long>(i));
        }
      }
    }
  }
}

}  // namespace

int main() {
  for (int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 19}) {
    for (int64_t n : {0, 1, 16, 17, 33, 48, 65, 80}) {
      for (int64_t k : {0, 1, 3, 4, 5, 17, 66}) check(m, n, k);
    }
  }
  for (int64_t n : {1, 16, 33}) {
    for (int64_t k : {1, 4, 63, 64, 65, 200}) check_dequantize(n, k);
  }
}
