// The CUDA kernels of the weight-only linear layer, emulated, against sums in double.
#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "buffer.h"
#include "check.h"
#include "kernels/cuda/lane.h"
#include "kernels/cuda/linear_weight_only.h"

using namespace torchweld::kernels;
using namespace torchweld::kernels::cuda;

namespace {

constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Exactly so many bytes, aligned to 16, so that AddressSanitizer sees any access beyond them; or
// those behind `shift` more.
class Memory {
 public:
  explicit Memory(int64_t bytes, int64_t shift = 0)
      : data_(static_cast<char*>(operator new(bytes + shift, std::align_val_t(16)))),
        shift_(shift) {
    std::memset(data_, 0, bytes + shift);
  }
  ~Memory() { operator delete(data_, std::align_val_t(16)); }
  Memory(const Memory&) = delete;
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_ + shift_);
  }

 private:
  char* data_;
  int64_t shift_;
};

float value_of(DType dtype, const void* from) {
  if (dtype == DType::float32) return *static_cast<const float*>(from);
  const uint16_t bits = *static_cast<const uint16_t*>(from);
  return dtype == DType::bfloat16 ? widen(bits) : to_vec(Float16{bits});
}

struct Case {
  int64_t m, n, k;
  DType dtype;
  int64_t shift = 0;                           // elements the rows begin behind a word
  int64_t gap = 0;                             // elements between rows
  LinearPath tiles = LinearPath::large_tiles;  // where rows are not few
};

void check(const Case& c) {
  const int64_t m = c.m, n = c.n, k = c.k, quads = round_up(k, kQuad) / kQuad, stride = k + c.gap;
  const auto size = static_cast<int64_t>(size_of(c.dtype));
  const Memory x(m > 0 ? ((m - 1) * stride + k) * size : 0, c.shift * size);
  const Memory packed(round_up(n, kPanelColumns) * quads * kQuad);
  const Memory scale(n * 4), bias(n * 4), residual(m * n * size), output(m * n * size);
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(-2, 2);
  const auto write = [&](void* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (c.dtype == DType::float32) {
      std::memcpy(to, &value, 4);
    } else if (c.dtype == DType::bfloat16) {
      *static_cast<uint16_t*>(to) = static_cast<uint16_t>(bits >> 16);
    } else {
      *static_cast<uint16_t*>(to) = from_vec<Float16>(value).bits;
    }
  };
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t i = 0; i < k; ++i)
      write(x.as<char>() + (row * stride + i) * size, uniform(random));
  }
  for (int64_t i = 0; i < m * n; ++i) write(residual.as<char>() + i * size, uniform(random));
  for (int64_t j = 0; j < n; ++j) {
    scale.as<float>()[j] = std::abs(uniform(random)) * 0.01f;
    bias.as<float>()[j] = uniform(random);
    for (int64_t i = 0; i < k; ++i) {
      packed.as<int8_t>()[((j / 16 * quads + i / 4) * 16 + j % 16) * 4 + i % 4] =
          static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
    }
  }

  WeightOnlyParams params{.input = x.as<void>(),
                          .dtype = c.dtype,
                          .input_stride = stride,
                          .rows = m,
                          .in_features = k,
                          .panels = packed.as<int8_t>(),
                          .columns = n,
                          .end = {.of = {.input_scale = nullptr,
                                         .weight_scale = scale.as<float>(),
                                         .bias = nullptr,
                                         .activation = LinearActivation::relu,
                                         .residual = residual.as<void>(),
                                         .residual_stride = n,
                                         .residual_is_float = false,
                                         .output = output.as<void>(),
                                         .output_stride = n},
                                  .bias = bias.as<void>(),
                                  .bias_dtype = DType::float32,
                                  .output_dtype = c.dtype,
                                  .stores_sums = false},
                          .path = m <= kFewRows ? LinearPath::few_rows : c.tiles,
                          .scratch = nullptr};
  const Memory scratch(weight_only_scratch(params));
  params.scratch = scratch.as<void>();
  CHECK(launch_linear_weight_only(params, nullptr) == cudaSuccess, "launch");

  const double unit = c.dtype == DType::float32 ? 0 : c.dtype == DType::bfloat16 ? 0x1p-8 : 0x1p-11;
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, magnitude = 0;
      for (int64_t i = 0; i < k; ++i) {
        const double product =
            static_cast<double>(value_of(c.dtype, x.as<char>() + (row * stride + i) * size)) *
            packed.as<int8_t>()[((j / 16 * quads + i / 4) * 16 + j % 16) * 4 + i % 4];
        sum += product;
        magnitude += std::abs(product);
      }
      const double of_scale = scale.as<float>()[j];
      const int64_t at = row * n + j;
      const double expected = std::max(0.0, sum * of_scale + bias.as<float>()[j]) +
                              value_of(c.dtype, residual.as<char>() + at * size);
      const double actual = value_of(c.dtype, output.as<char>() + at * size);
      const double most = 4e-7 * (magnitude * of_scale + 4) + unit * std::abs(expected);
      CHECK(std::abs(actual - expected) <= most,
            "%ld x %ld x %ld of dtype %d at %ld, %ld: %g, not %g", static_cast<long>(m),
            static_cast<long>(n), static_cast<long>(k), static_cast<int>(c.dtype),
            static_cast<long>(row), static_cast<long>(j), actual, expected);
    }
  }
}

// Every int8 as a 16-bit float, and three parts of a float: what one column and one k give. Sums of
// the parts' products fit a float, however they are rounded.
void check_every_weight() {
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    for (int q = -128; q < 128; ++q) {
      const Memory x(8 * 4), packed(64), scale(4), output(4);
      packed.as<int8_t>()[0] = static_cast<int8_t>(q);
      scale.as<float>()[0] = 1;
      const float one = 1 + 0x1p-8f + 0x1p-16f;
      if (dtype == DType::float32) {
        x.as<float>()[0] = one;
      } else {
        x.as<uint16_t>()[0] = dtype == DType::bfloat16 ? 0x3f80 : 0x3c00;
      }
      WeightOnlyParams params{};
      params.input = x.as<void>();
      params.dtype = dtype;
      params.input_stride = 8;
      params.rows = 1;
      params.in_features = 4;
      params.panels = packed.as<int8_t>();
      params.columns = 1;
      params.end.of.weight_scale = scale.as<float>();
      params.end.of.output = output.as<void>();
      params.end.of.output_stride = 1;
      params.end.output_dtype = DType::float32;
      CHECK(launch_linear_weight_only(params, nullptr) == cudaSuccess, "launch");
      const float expected =
          dtype == DType::float32 ? one * static_cast<float>(q) : static_cast<float>(q);
      CHECK(output.as<float>()[0] == expected, "%d: %g", q, output.as<float>()[0]);
    }
  }
}

}  // namespace

int main() {
  constexpr LinearPath small = LinearPath::small_tiles;
  check_every_weight();
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    check({.m = 0, .n = 5, .k = 7, .dtype = dtype});
    check({.m = 3, .n = 0, .k = 7, .dtype = dtype});
    check({.m = 3, .n = 5, .k = 0, .dtype = dtype});
    // Few rows: as they lie, copied because of their length, their place, their distance.
    check({.m = 1, .n = 33, .k = 1200, .dtype = dtype});
    check({.m = 9, .n = 49, .k = 68, .dtype = dtype});
    check({.m = 18, .n = 17, .k = 67, .dtype = dtype});
    check({.m = 2, .n = 17, .k = 64, .dtype = dtype, .shift = 1});
    check({.m = 2, .n = 17, .k = 64, .dtype = dtype, .gap = 3});
    // Tiles: large and small ones.
    check({.m = 130, .n = 150, .k = 72, .dtype = dtype});
    check({.m = 40, .n = 17, .k = 67, .dtype = dtype});
    check({.m = 70, .n = 65, .k = 200, .dtype = dtype, .shift = 2, .tiles = small});
    check({.m = 33, .n = 5, .k = 64, .dtype = dtype, .gap = 8, .tiles = small});
    check({.m = 33, .n = 5, .k = 0, .dtype = dtype});
  }
}
