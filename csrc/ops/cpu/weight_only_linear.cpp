// The linear layer with an int8 weight and float activations.
#include <algorithm>

#include "ops/cpu/linear_rows.h"
#include "ops/quantized_linear.h"

namespace torchweld::ops {
namespace {

using kernels::kInterleavedRows;
using kernels::kQuad;

// Columns of a task: a multiple of every instruction set's tile. Their weights stay in the second
// cache while rows pass.
constexpr int64_t kTaskColumns = 64;
constexpr int64_t kTaskRows = 16 * kInterleavedRows;

// Floats of interleaved rows made at a time: bounds the scratch memory of a call.
constexpr int64_t kScratchFloats = 4 << 20;

// Work that hides the cost of handing it to another thread.
constexpr int64_t kGrainElements = 1 << 15;  // interleaved
constexpr int64_t kGrainProducts = 1 << 19;  // multiplied

Tensor weight_only_linear(Tensor input, Tensor packed_weight, Tensor weight_scale,
                          std::optional<Tensor> bias, std::optional<Tensor> residual,
                          int64_t in_features, String activation) {
  const char* op = "weight_only_linear";
  const LinearShape shape =
      check_weight_only_linear(op, input, packed_weight, weight_scale, in_features);

  const NoGradGuard no_grad;
  Tensor output = empty(with_last_size(input, shape.out_features), input.scalar_type(),
                        torch::headeronly::MemoryFormat::Contiguous);
  const LinearTail tail(op, output, bias, residual, activation);
  if (output.numel() == 0) return output;
  const int8_t* panels = packed_weight.const_data_ptr<int8_t>();
  const float* scale_data = weight_scale.const_data_ptr<float>();
  const size_t dtype = static_cast<size_t>(*to_dtype(input.scalar_type()));
  const auto& kernels = *cpu_kernels().linear_weight_only;

  const Rows rows(input);
  const char* data = static_cast<const char*>(rows.tensor.const_data_ptr());
  const int64_t row_bytes = rows.stride * static_cast<int64_t>(input.element_size());
  const int64_t chunk = std::min(
      shape.rows, std::max(kScratchFloats / (in_features + 1) / kTaskRows, int64_t{1}) * kTaskRows);
  const Scratch interleaved(chunk * in_features);
  const int64_t column_tasks = divide_up(shape.out_features, kTaskColumns);
  const int64_t products =
      std::min(kTaskRows, shape.rows) * std::min(kTaskColumns, shape.out_features) * in_features;
  for (int64_t first = 0; first < shape.rows; first += chunk) {
    const int64_t count = std::min(chunk, shape.rows - first);
    parallel_for(divide_up(count, kInterleavedRows),
                 kGrainElements / (kInterleavedRows * in_features + 1) + 1,
                 [&](int64_t begin, int64_t end) {
                   const int64_t row = begin * kInterleavedRows;
                   kernels.interleave[dtype]({.input = data + (first + row) * row_bytes,
                                              .input_stride = rows.stride,
                                              .rows = std::min(end * kInterleavedRows, count) - row,
                                              .in_features = in_features,
                                              .output = interleaved.data() + row * in_features});
                 });
    parallel_for(divide_up(count, kTaskRows) * column_tasks, kGrainProducts / (products + 1) + 1,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t task = begin; task < end; ++task) {
                     const int64_t row = task / column_tasks * kTaskRows;
                     const int64_t column = task % column_tasks * kTaskColumns;
                     kernels::WeightOnlyBlock block{
                         .input = interleaved.data() + row * in_features,
                         .rows = std::min(kTaskRows, count - row),
                         .in_features = in_features,
                         .panels = panels + column * shape.quads * kQuad,
                         .columns = std::min(kTaskColumns, shape.out_features - column),
                         .epilogue = tail.at(first + row, column)};
                     block.epilogue.weight_scale = scale_data + column;
                     kernels.multiply[dtype](block);
                   }
                 });
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchweld, CPU, m) {
  m.impl("weight_only_linear", TORCH_BOX(&weight_only_linear));
}

}  // namespace torchweld::ops
