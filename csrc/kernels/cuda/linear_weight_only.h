// The linear layer with an int8 weight and float activations on CUDA: the packed weight of the CPU
// (kernels/quantized_linear.h), read as linear_units.h says. A byte becomes a 16-bit float exactly,
// and tensor cores sum in float32; float32 activations are three bfloat16 each, which hold all
// their bits. K is divided among warps where rows are few: the order of the sums, and so their last
// bits, depend on the number of rows and on nothing else.
#pragma once

#include "kernels/cuda/linear_end.h"
#include "kernels/cuda/linear_path.h"
#include "kernels/quantized_linear.h"

namespace torchweld::kernels::cuda {

struct WeightOnlyParams {
  const void* input;  // [rows][input_stride]
  DType dtype;        // float32, bfloat16 or float16
  int64_t input_stride;
  int64_t rows;
  int64_t in_features;
  const int8_t* panels;  // aligned to 16
  int64_t columns;
  LinearEnd end;
  LinearPath path;
  void* scratch;  // as large as asked for, aligned to 16
};

// Bytes in which the rows are laid out as the kernels read them; 0 if they lie so already.
int64_t weight_only_scratch(const WeightOnlyParams&);

cudaError_t launch_linear_weight_only(const WeightOnlyParams&, cudaStream_t);

// What is behind it: rows whose units are aligned and whole, in planes as linear_tile.h says.
cudaError_t launch_weight_only_few_rows(const WeightOnlyParams&, cudaStream_t);
cudaError_t launch_weight_only_tiles(const WeightOnlyParams&, int planes, cudaStream_t);

}  // namespace torchweld::kernels::cuda
