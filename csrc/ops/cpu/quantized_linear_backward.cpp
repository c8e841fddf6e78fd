// Gradients of linear layers for their input, straight from the packed weights: tiles of the weight
// become floats that a core's second cache holds, and are multiplied there.
#include <algorithm>

#include "ops/cpu/linear_rows.h"
#include "ops/quantized_linear.h"
#include "ops/quantized_linear_int4.h"

namespace torchweld::ops {
namespace {

using kernels::kPanel;
using kernels::kPanelColumns;
using kernels::kQuad;

// Columns of the layer, which are the depth of this product, in a tile of 128 KB.
constexpr int64_t kTileDepth = 512;
constexpr int64_t kTileRows = 256;

// grad [..., N] @ weight [N, K]; dequantize(n, count, k, tile) writes columns [n, n + count) of the
// layer and 64 input features from k on, as [count][64]. Each element is one chain of fused
// multiply-adds in the order of n.
template <class F>
Tensor multiply(const Tensor& grad, int64_t rows, int64_t n, int64_t k, const F& dequantize) {
  const NoGradGuard no_grad;
  Tensor output = empty(with_last_size(grad, k), grad.scalar_type(),
                        torch::headeronly::MemoryFormat::Contiguous);
  if (output.numel() == 0) return output;
  if (n == 0) return torch::stable::zero_(output);

  const auto& kernels = cpu_kernels();
  const FloatRows input(grad, rows, n);
  const bool is_float = grad.scalar_type() == ScalarType::Float;
  const auto narrow =
      kernels.dequantize->narrow[static_cast<size_t>(*to_dtype(grad.scalar_type()))];
  const int64_t element = output.element_size();
  char* data = static_cast<char*>(output.mutable_data_ptr());

  const int64_t column_tasks = divide_up(k, kPanel);
  const int64_t row_tasks = divide_up(rows, kTileRows);
  const int64_t most_rows = std::min(kTileRows, rows);
  parallel_for(row_tasks * column_tasks, 1, [&](int64_t begin, int64_t end) {
    const Scratch tile(kTileDepth * kPanel), sums(is_float ? 0 : most_rows * kPanel);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / column_tasks * kTileRows;
      const int64_t column = task % column_tasks * kPanel;
      const int64_t count = std::min(kTileRows, rows - row);
      const int64_t columns = std::min(kPanel, k - column);
      char* to = data + (row * k + column) * element;
      for (int64_t first = 0; first < n; first += kTileDepth) {
        const int64_t depth = std::min(kTileDepth, n - first);
        dequantize(first, depth, column, tile.data());
        const float* a = input.data() + row * input.stride() + first;
        kernels.gemm->gemm({.rows = count,
                            .columns = columns,
                            .a = &a,
                            .runs = 1,
                            .depth = depth,
                            .a_row = input.stride(),
                            .a_step = 1,
                            .b = tile.data(),
                            .b_row = kPanel,
                            .c = is_float ? reinterpret_cast<float*>(to) : sums.data(),
                            .c_row = is_float ? k : kPanel,
                            .accumulate = first > 0});
      }
      for (int64_t i = 0; !is_float && i < count; ++i) {
        narrow(sums.data() + i * kPanel, columns, to + i * k * element);
      }
    }
  });
  return output;
}

Tensor quantized_linear_backward(Tensor grad, Tensor packed_weight, Tensor weight_scale,
                                 int64_t in_features) {
  const LinearShape shape = check_quantized_linear_backward(
      "quantized_linear_backward", grad, packed_weight, weight_scale, in_features);
  const int8_t* panels = packed_weight.const_data_ptr<int8_t>();
  const float* scale = weight_scale.const_data_ptr<float>();
  const auto dequantize = cpu_kernels().dequantize->backward;
  return multiply(grad, shape.rows, shape.out_features, in_features,
                  [&](int64_t n, int64_t count, int64_t k, float* tile) {
                    dequantize({.panels = panels + n * shape.quads * kQuad,
                                .quads = shape.quads,
                                .first = k,
                                .columns = count,
                                .weight_scale = scale + n,
                                .output = tile});
                  });
}

Tensor quantized_linear_int4_backward(Tensor grad, Tensor packed_weight, Tensor weight_scale,
                                      Tensor weight_zero, int64_t in_features,
                                      int64_t out_features) {
  const char* op = "quantized_linear_int4_backward";
  const LinearInt4Shape shape = check_quantized_linear_int4_backward(
      op, grad, packed_weight, weight_scale, weight_zero, in_features, out_features);
  const uint8_t* panels = packed_weight.const_data_ptr<uint8_t>();
  const auto* scale = static_cast<const kernels::BFloat16*>(weight_scale.const_data_ptr());
  const uint8_t* zero = weight_zero.const_data_ptr<uint8_t>();
  check_zeros(op, fit_4_bits(zero, weight_zero.numel()));
  const auto dequantize = cpu_kernels().dequantize->int4_backward;
  return multiply(grad, shape.rows, out_features, in_features,
                  [&](int64_t n, int64_t count, int64_t k, float* tile) {
                    dequantize({.panels = panels + n * shape.padded_in_features() / 2,
                                .weight_scale = scale + n * shape.groups,
                                .weight_zero = zero + n * shape.groups,
                                .groups = shape.groups,
                                .group_size = shape.group_size,
                                .first = k,
                                .columns = count,
                                .output = tile});
                  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchweld, CPU, m) {
  m.impl("quantized_linear_backward", TORCH_BOX(&quantized_linear_backward));
  m.impl("quantized_linear_int4_backward", TORCH_BOX(&quantized_linear_int4_backward));
}

}  // namespace torchweld::ops
