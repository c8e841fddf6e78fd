// The int4 linear layer: rows are quantized to int8, then multiplied block by block.
#include <algorithm>
#include <atomic>

#include "ops/cpu/linear_blocks.h"
#include "ops/cpu/linear_rows.h"
#include "ops/quantized_linear.h"
#include "ops/quantized_linear_int4.h"

namespace torchweld::ops {
namespace {

using kernels::BFloat16;
using kernels::LinearInt4Block;

// Bytes of quantized rows made at a time: bounds the scratch memory of a call, and stays in the
// last cache until they are multiplied.
constexpr int64_t kScratchBytes = 8 << 20;

// Elements whose quantization hides the cost of handing them to another thread.
constexpr int64_t kGrainElements = 1 << 15;

struct Weight {
  const uint8_t* panels;
  const BFloat16* scale;
  const uint8_t* zero;
};

// Quantizes the rows and calls `run` once for each block of the product, blocks in parallel, with
// the first row and column of the block; `run` finds everything but the epilogue filled in. Throws
// unless all zeros are such, which is looked at block by block, as they come from memory.
template <class F>
void multiply_quantized(const char* op, const LinearInt4Shape& shape, const Tensor& input,
                        const Weight& weight, float* input_scale, const F& run) {
  const auto quantize =
      cpu_kernels().quantized_linear->quantize[static_cast<size_t>(*to_dtype(input.scalar_type()))];
  const auto prepare = cpu_kernels().linear_int4->prepare;
  const Rows rows(input);
  const char* data = static_cast<const char*>(rows.tensor.const_data_ptr());
  const int64_t row_bytes = rows.stride * static_cast<int64_t>(input.element_size());

  const int64_t stride = quantized_stride(shape.padded_in_features());
  const int64_t chunk = std::min(shape.rows, std::max<int64_t>(64, kScratchBytes / stride / 8 * 8));
  const Scratch scratch(chunk * stride / 4);
  auto* quantized = reinterpret_cast<int8_t*>(scratch.data());
  const Scratch sums(chunk * shape.groups);
  auto* group_sum = reinterpret_cast<int32_t*>(sums.data());
  std::atomic<bool> zeros_fit{true};

  for (int64_t first = 0; first < shape.rows; first += chunk) {
    const int64_t count = std::min(chunk, shape.rows - first);
    parallel_for(count, kGrainElements / stride + 1, [&](int64_t begin, int64_t end) {
      quantize({.input = data + (first + begin) * row_bytes,
                .input_stride = rows.stride,
                .rows = end - begin,
                .in_features = shape.in_features,
                .quantized = quantized + begin * stride,
                .quantized_stride = stride,
                .scale = input_scale + first + begin,
                .group_size = 0});
      prepare({.quantized = quantized + begin * stride,
               .quantized_stride = stride,
               .rows = end - begin,
               .in_features = shape.in_features,
               .groups = shape.groups,
               .group_size = shape.group_size,
               .group_sum = group_sum + begin * shape.groups});
    });
    for_each_block(
        {count, shape.out_features, shape.padded_in_features(), stride}, [&](const LinearBlock& b) {
          const uint8_t* zeros = weight.zero + b.column * shape.groups;
          if (!fit_4_bits(zeros, round_up(b.columns, kernels::kPanelColumns) * shape.groups)) {
            zeros_fit = false;
            return;
          }
          LinearInt4Block block{.quantized = quantized + b.row * stride,
                                .quantized_stride = stride,
                                .group_sum = group_sum + b.row * shape.groups,
                                .rows = b.rows,
                                .panels = weight.panels + b.column * shape.padded_in_features() / 2,
                                .weight_scale = weight.scale + b.column * shape.groups,
                                .weight_zero = zeros,
                                .groups = shape.groups,
                                .group_size = shape.group_size,
                                .columns = b.columns,
                                .epilogue = {}};
          run(block, first + b.row, b.column);
        });
    check_zeros(op, zeros_fit);
  }
}

Weight to_weight(const Tensor& packed_weight, const Tensor& weight_scale,
                 const Tensor& weight_zero) {
  return {.panels = packed_weight.const_data_ptr<uint8_t>(),
          .scale = static_cast<const BFloat16*>(weight_scale.const_data_ptr()),
          .zero = weight_zero.const_data_ptr<uint8_t>()};
}

Tensor quantized_linear_int4(Tensor input, Tensor packed_weight, Tensor weight_scale,
                             Tensor weight_zero, std::optional<Tensor> bias,
                             std::optional<Tensor> residual, int64_t in_features,
                             int64_t out_features, String activation) {
  const char* op = "quantized_linear_int4";
  const LinearInt4Shape shape = check_quantized_linear_int4(op, input, packed_weight, weight_scale,
                                                            weight_zero, in_features, out_features);

  const NoGradGuard no_grad;
  Tensor output = empty(with_last_size(input, out_features), input.scalar_type(),
                        torch::headeronly::MemoryFormat::Contiguous);
  const LinearTail tail(op, output, bias, residual, activation);
  if (output.numel() == 0) return output;
  const auto multiply =
      cpu_kernels().linear_int4->multiply[static_cast<size_t>(*to_dtype(input.scalar_type()))];
  const Scratch input_scale(shape.rows);
  multiply_quantized(op, shape, input, to_weight(packed_weight, weight_scale, weight_zero),
                     input_scale.data(), [&](LinearInt4Block& block, int64_t row, int64_t column) {
                       block.epilogue = tail.at(row, column);
                       block.epilogue.input_scale = input_scale.data() + row;
                       multiply(block);
                     });
  return output;
}

std::tuple<Tensor, Tensor> quantized_linear_int4_accumulators(Tensor input, Tensor packed_weight,
                                                              Tensor weight_scale,
                                                              Tensor weight_zero,
                                                              int64_t in_features,
                                                              int64_t out_features) {
  const char* op = "quantized_linear_int4_accumulators";
  const LinearInt4Shape shape = check_quantized_linear_int4(op, input, packed_weight, weight_scale,
                                                            weight_zero, in_features, out_features);
  const NoGradGuard no_grad;
  IntList sizes = with_last_size(input, shape.groups);
  const IntList scale_sizes(sizes.begin(), sizes.end() - 1);
  sizes.push_back(out_features);
  Tensor sums = torch::stable::new_empty(input, sizes, ScalarType::Int);
  Tensor input_scale = torch::stable::new_empty(input, scale_sizes, ScalarType::Float);
  int32_t* data = sums.mutable_data_ptr<int32_t>();
  const auto accumulate = cpu_kernels().linear_int4->accumulate;
  multiply_quantized(op, shape, input, to_weight(packed_weight, weight_scale, weight_zero),
                     input_scale.mutable_data_ptr<float>(),
                     [&](const LinearInt4Block& block, int64_t row, int64_t column) {
                       accumulate(block, data + row * shape.groups * out_features + column,
                                  out_features);
                     });
  return {sums, input_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchweld, CPU, m) {
  m.impl("quantized_linear_int4", TORCH_BOX(&quantized_linear_int4));
  m.impl("quantized_linear_int4_accumulators", TORCH_BOX(&quantized_linear_int4_accumulators));
}

}  // namespace torchweld::ops
