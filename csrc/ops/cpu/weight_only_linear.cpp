// The linear layer with an int8 weight and float activations.
#include <algorithm>

#include "ops/check.h"
#include "ops/cpu/linear_rows.h"
#include "ops/quantized_linear.h"

namespace torchweld::ops {
namespace {

using kernels::kPanel;
using kernels::kPanelColumns;
using kernels::kQuad;

// Above so many rows, tiles of the weight become floats in memory and are multiplied there.
constexpr int64_t kDirectRows = 16;

// Input features of such a tile: 128 KB, for the second cache. A multiple of 4.
constexpr int64_t kTileDepth = 512;
constexpr int64_t kTileRows = 256;

struct Product {
  const LinearShape& shape;
  const FloatRows& input;
  const int8_t* panels;
  const float* weight_scale;
  const LinearTail& tail;
  size_t dtype;

  const int8_t* panels_at(int64_t column) const { return panels + column * shape.quads * kQuad; }
  kernels::LinearEpilogue epilogue_at(int64_t row, int64_t column) const {
    kernels::LinearEpilogue epilogue = tail.at(row, column);
    epilogue.weight_scale = weight_scale + column;
    return epilogue;
  }
};

void multiply_directly(const Product& p) {
  const auto multiply = cpu_kernels().linear_weight_only->multiply[p.dtype];
  const int64_t tasks = (p.shape.out_features + kPanel - 1) / kPanel;
  const int64_t products = kPanel * p.shape.in_features * p.shape.rows;
  parallel_for(tasks, (1 << 18) / (products + 1) + 1, [&](int64_t begin, int64_t end) {
    const int64_t column = begin * kPanel;
    multiply({.input = p.input.data(),
              .input_stride = p.input.stride(),
              .rows = p.shape.rows,
              .in_features = p.shape.in_features,
              .panels = p.panels_at(column),
              .columns = std::min(end * kPanel, p.shape.out_features) - column,
              .epilogue = p.epilogue_at(0, column)});
  });
}

void multiply_by_tiles(const Product& p) {
  const auto& kernels = cpu_kernels();
  const int64_t column_tasks = (p.shape.out_features + kPanel - 1) / kPanel;
  const int64_t row_tasks = (p.shape.rows + kTileRows - 1) / kTileRows;
  const int64_t most_rows = std::min(kTileRows, p.shape.rows);
  parallel_for(row_tasks * column_tasks, 1, [&](int64_t begin, int64_t end) {
    const Scratch tile(kTileDepth * kPanel), sums(most_rows * kPanel);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / column_tasks * kTileRows;
      const int64_t column = task % column_tasks * kPanel;
      const int64_t rows = std::min(kTileRows, p.shape.rows - row);
      const int64_t columns = std::min(kPanel, p.shape.out_features - column);
      for (int64_t k = 0; k < p.shape.in_features; k += kTileDepth) {
        const int64_t depth = std::min(kTileDepth, p.shape.in_features - k);
        kernels.dequantize->forward({.panels = p.panels_at(column),
                                     .quads = p.shape.quads,
                                     .first = k,
                                     .count = depth,
                                     .columns = columns,
                                     .output = tile.data()});
        const float* a = p.input.data() + row * p.input.stride() + k;
        kernels.gemm->gemm({.rows = rows,
                            .columns = columns,
                            .a = &a,
                            .runs = 1,
                            .depth = depth,
                            .a_row = p.input.stride(),
                            .a_step = 1,
                            .b = tile.data(),
                            .b_row = kPanel,
                            .c = sums.data(),
                            .c_row = kPanel,
                            .accumulate = k > 0});
      }
      kernels.linear_weight_only->finish[p.dtype]({.sums = sums.data(),
                                                   .rows = rows,
                                                   .columns = columns,
                                                   .epilogue = p.epilogue_at(row, column)});
    }
  });
}

Tensor weight_only_linear(Tensor input, Tensor packed_weight, Tensor weight_scale,
                          std::optional<Tensor> bias, std::optional<Tensor> residual,
                          int64_t in_features, String activation) {
  const char* op = "weight_only_linear";
  const LinearShape shape =
      check_quantized_linear(op, "input", input, true, packed_weight, weight_scale, in_features);

  const NoGradGuard no_grad;
  Tensor output = torch::stable::new_empty(input, with_last_size(input, shape.out_features));
  const LinearTail tail(op, output, bias, residual, activation);
  if (output.numel() == 0) return output;
  const FloatRows rows(input, shape.rows, in_features);
  const Product product{.shape = shape,
                        .input = rows,
                        .panels = packed_weight.const_data_ptr<int8_t>(),
                        .weight_scale = weight_scale.const_data_ptr<float>(),
                        .tail = tail,
                        .dtype = static_cast<size_t>(*to_dtype(input.scalar_type()))};
  if (shape.rows <= kDirectRows || in_features == 0) {
    multiply_directly(product);
  } else {
    multiply_by_tiles(product);
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchweld, CPU, m) {
  m.impl("weight_only_linear", TORCH_BOX(&weight_only_linear));
}

}  // namespace torchweld::ops
