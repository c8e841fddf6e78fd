// A random int8 layer with its input, and what the CPU makes of it.
#pragma once

#include <cuda_fp16.h>

#include <cmath>
#include <memory>
#include <random>

#include "buffer.h"
#include "check.h"
#include "kernels/quantized_linear.h"

namespace torchweld::kernels {

constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Exactly `size` elements on the heap, so that AddressSanitizer sees any access beyond them.
template <class T>
std::unique_ptr<T[]> array(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]());
}

inline uint16_t round_to_half(float value, DType dtype) {
  if (dtype == DType::bfloat16) {
    return std::isnan(value) ? 0x7fc0 : round_to_bfloat16(value);
  }
  return __half_as_ushort(__float2half_rn(value));
}

// Packed as the documentation of the layout says. Input rows lie one element apart.
struct QuantizedLayer {
  QuantizedLayer(int64_t m, int64_t n, int64_t k)
      : m(m), n(n), k(k), quads(round_up(k, kQuad) / kQuad), input_stride(k + 1) {
    packed = array<int8_t>(packed_size());
    sum = array<int32_t>(round_up(n, kPanelColumns));
    scale = array<float>(n);
    bias = array<float>(n);
    std::mt19937 random(1);
    std::uniform_real_distribution<float> uniform(-2, 2);
    for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
      inputs.emplace_back(m * input_stride, dtype);
      residuals.emplace_back(m * n, dtype);
    }
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < k; ++j) set_input(i, j, uniform(random));
    }
    for (int64_t i = 0; i < m * n; ++i) set(residuals, i, uniform(random));
    for (int64_t j = 0; j < n; ++j) {
      scale[j] = std::abs(uniform(random)) * 0.01f;
      bias[j] = uniform(random);
      for (int64_t i = 0; i < k; ++i) {
        const int8_t q = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
        sum[j] += q;
        packed[((j / 16 * quads + i / 4) * 16 + j % 16) * 4 + i % 4] = q;
      }
    }
  }

  int64_t packed_size() const { return round_up(n, kPanelColumns) * quads * kQuad; }
  const void* input(DType dtype) const { return of(inputs, dtype).data.get(); }
  const void* residual(DType dtype) const { return of(residuals, dtype).data.get(); }
  void set_input(int64_t row, int64_t column, float value) {
    set(inputs, row * input_stride + column, value);
  }

  int64_t m, n, k, quads, input_stride;
  std::unique_ptr<float[]> scale, bias;
  std::unique_ptr<int8_t[]> packed;
  std::unique_ptr<int32_t[]> sum;
  std::vector<Buffer> inputs, residuals;  // the same values in three dtypes

 private:
  static const Buffer& of(const std::vector<Buffer>& buffers, DType dtype) {
    for (const Buffer& buffer : buffers) {
      if (buffer.dtype == dtype) return buffer;
    }
    std::abort();
  }
  static void set(std::vector<Buffer>& buffers, int64_t i, float value) {
    for (Buffer& buffer : buffers) {
      if (buffer.dtype == DType::float32) {
        buffer.as<float>()[i] = value;
      } else {
        buffer.as<uint16_t>()[i] = round_to_half(value, buffer.dtype);
      }
    }
  }
};

struct QuantizedResult {
  std::unique_ptr<int32_t[]> sums;
  std::unique_ptr<float[]> scale;
  Buffer output;
};

// With a scale for every group of k; 0: for every row.
inline QuantizedResult run_on_cpu(const QuantizedLayer& layer, LinearActivation activation,
                                  DType dtype, int64_t group_size,
                                  Capability capability = detect_capability()) {
  const int64_t m = layer.m, n = layer.n, k = layer.k;
  const int64_t groups = group_size && k ? (k + group_size - 1) / group_size : 1;
  const auto& kernels = *table(capability).quantized_linear;
  QuantizedResult result{array<int32_t>(m * n), array<float>(m * groups), Buffer(m * n, dtype)};
  const int64_t stride = round_up(k, kQuad);
  const auto quantized = array<int8_t>(m * stride);
  kernels.quantize[static_cast<size_t>(dtype)]({.input = layer.input(dtype),
                                                .input_stride = layer.input_stride,
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
                                          .residual = layer.residual(dtype),
                                          .residual_stride = n,
                                          .residual_is_float = false,
                                          .output = result.output.data.get(),
                                          .output_stride = n}};
  kernels.multiply[static_cast<size_t>(dtype)](block);
  if (group_size == 0 && k <= kMaxSummed) {
    block.epilogue.output = result.sums.get();
    kernels.accumulate(block);
  }
  return result;
}

}  // namespace torchweld::kernels
