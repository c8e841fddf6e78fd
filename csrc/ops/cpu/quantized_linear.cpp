#include "ops/quantized_linear.h"

#include <algorithm>

#include "ops/cpu/linear_blocks.h"
#include "ops/cpu/linear_rows.h"
#include "ops/kernels.h"
#include "ops/memory.h"
#include "ops/parallel.h"

namespace torchweld::ops {
namespace {

using kernels::kPanelColumns;
using kernels::kQuad;
using kernels::QuantizedLinearBlock;

// Bytes of quantized rows made at a time: bounds the scratch memory of a call, and stays in the
// last cache until they are multiplied.
constexpr int64_t kScratchBytes = 8 << 20;

// Elements whose quantization hides the cost of handing them to another thread.
constexpr int64_t kGrainElements = 1 << 16;

struct Operands {
  const LinearShape& shape;
  const Tensor& input;
  const Tensor& packed_weight;
  const Tensor& weight_sum;
  int64_t group_size;  // 0: one group
  float* input_scale;  // [rows][groups]
};

// Quantizes the rows and calls `run` once for each block of the product, blocks in parallel, with
// the first row and column of the block; `run` finds all but the epilogue filled in.
template <class F>
void multiply_quantized(const Operands& of, const F& run) {
  const LinearShape& shape = of.shape;
  const auto quantize =
      cpu_kernels()
          .quantized_linear->quantize[static_cast<size_t>(*to_dtype(of.input.scalar_type()))];
  const Rows rows(of.input);
  const char* data = static_cast<const char*>(rows.tensor.const_data_ptr());
  const int64_t row_bytes = rows.stride * static_cast<int64_t>(of.input.element_size());
  const int8_t* panels = of.packed_weight.const_data_ptr<int8_t>();
  const int32_t* sums = of.weight_sum.const_data_ptr<int32_t>();
  const int64_t groups = shape.groups(of.group_size);

  const int64_t stride = quantized_stride(shape.in_features);
  const int64_t chunk = std::min(shape.rows, std::max<int64_t>(64, kScratchBytes / stride / 8 * 8));
  const Scratch scratch(chunk * stride / 4);
  auto* quantized = reinterpret_cast<int8_t*>(scratch.data());

  for (int64_t first = 0; first < shape.rows; first += chunk) {
    const int64_t count = std::min(chunk, shape.rows - first);
    parallel_for(count, kGrainElements / stride + 1, [&](int64_t begin, int64_t end) {
      quantize({.input = data + (first + begin) * row_bytes,
                .input_stride = rows.stride,
                .rows = end - begin,
                .in_features = shape.in_features,
                .quantized = quantized + begin * stride,
                .quantized_stride = stride,
                .scale = of.input_scale + (first + begin) * groups,
                .group_size = of.group_size});
    });
    for_each_block(
        {count, shape.out_features, shape.in_features, stride}, [&](const LinearBlock& b) {
          QuantizedLinearBlock block{.quantized = quantized + b.row * stride,
                                     .quantized_stride = stride,
                                     .rows = b.rows,
                                     .panels = panels + b.column * shape.quads * kQuad,
                                     .weight_sum = sums + b.column,
                                     .quads = shape.quads,
                                     .columns = b.columns,
                                     .group_quads = of.group_size / kQuad,
                                     .group_scale = of.input_scale + (first + b.row) * groups,
                                     .epilogue = {}};
          run(block, first + b.row, b.column);
        });
  }
}

Tensor quantized_linear(Tensor input, Tensor packed_weight, Tensor weight_scale, Tensor weight_sum,
                        std::optional<Tensor> bias, std::optional<Tensor> residual,
                        int64_t in_features, String activation, int64_t input_group_size) {
  const char* op = "quantized_linear";
  const LinearShape shape = check_quantized_linear(op, input, packed_weight, weight_scale,
                                                   weight_sum, in_features, input_group_size);

  const NoGradGuard no_grad;
  Tensor output = empty(with_last_size(input, shape.out_features), input.scalar_type(),
                        torch::headeronly::MemoryFormat::Contiguous);
  const LinearTail tail(op, output, bias, residual, activation);
  if (output.numel() == 0) return output;
  const float* scale_data = weight_scale.const_data_ptr<float>();
  const auto multiply =
      cpu_kernels().quantized_linear->multiply[static_cast<size_t>(*to_dtype(input.scalar_type()))];

  const Scratch input_scale(shape.rows * shape.groups(input_group_size));
  multiply_quantized(
      {shape, input, packed_weight, weight_sum, input_group_size, input_scale.data()},
      [&](QuantizedLinearBlock& block, int64_t row, int64_t column) {
        block.epilogue = tail.at(row, column);
        if (input_group_size == 0) block.epilogue.input_scale = input_scale.data() + row;
        block.epilogue.weight_scale = scale_data + column;
        multiply(block);
      });
  return output;
}

std::tuple<Tensor, Tensor> quantized_linear_accumulators(Tensor input, Tensor packed_weight,
                                                         Tensor weight_scale, Tensor weight_sum,
                                                         int64_t in_features) {
  const char* op = "quantized_linear_accumulators";
  const LinearShape shape = check_quantized_linear_accumulators(
      op, input, packed_weight, weight_scale, weight_sum, in_features);

  const NoGradGuard no_grad;
  IntList scale_sizes = with_last_size(input, 0);
  scale_sizes.pop_back();
  Tensor sums =
      torch::stable::new_empty(input, with_last_size(input, shape.out_features), ScalarType::Int);
  Tensor input_scale = torch::stable::new_empty(input, scale_sizes, ScalarType::Float);
  int32_t* data = sums.mutable_data_ptr<int32_t>();
  const auto accumulate = cpu_kernels().quantized_linear->accumulate;
  multiply_quantized(
      {shape, input, packed_weight, weight_sum, 0, input_scale.mutable_data_ptr<float>()},
      [&](QuantizedLinearBlock& block, int64_t row, int64_t column) {
        block.epilogue.output = data + row * shape.out_features + column;
        block.epilogue.output_stride = shape.out_features;
        accumulate(block);
      });
  return {sums, input_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchweld, CPU, m) {
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
  m.impl("quantized_linear_accumulators", TORCH_BOX(&quantized_linear_accumulators));
}

}  // namespace torchweld::ops
