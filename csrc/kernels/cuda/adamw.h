// The AdamW step on a CUDA device: tables of tensors, which stay there from step to step, and
// launchers. A step is launch_sum_of_squares (where a norm is needed), launch_adamw_prepare, and
// launch_adamw_step once for each kind of parameter; nothing of it waits for the device or is
// decided by the host, so all of it can be captured in a graph.
//
// All pointers are to device memory. A launcher does not wait; it returns what the launch returned.
#pragma once

#include <cuda_runtime.h>

#include "kernels/adamw.h"

namespace torchweld::kernels::cuda {

// The tables are compared as words, so nothing in them is padding that the compiler may leave as it
// finds it.

// A gradient, or another tensor to be summed up.
struct Values {
  const void* data;
  int64_t size;
  DType dtype;
  int32_t unused = 0;
};

// A parameter and its states.
struct AdamWTensor {
  // `grad` is not used; `index` is that of the first element in the whole parameter.
  AdamWSpan span;
  // Element i is element span.index + i / row * stride + i % row of the whole; row = 0: span.index
  // + i. 0 with int8 states.
  int64_t row, stride;
  float* step_count;  // steps done
  int64_t group;
  uint64_t id;                // what the random bits of two parameters differ by
  void* average;              // null, or as AdamWObserver::ema
  BFloat16* bfloat16_weight;  // null, or as AdamWObserver::bfloat16
};

struct AdamWGroup {
  double lr, beta1, beta2, eps, weight_decay;
  double sign;          // of the gradients: -1 to maximize
  const void* lr_data;  // null, or the learning rate, float64 or float32, read when the step runs
  DType lr_dtype;
  int32_t unused = 0;
};

// --- tables --------------------------------------------------------------------------------------
// Work is cut into chunks, each of a block or a warp: `number` counts those of a tensor. A chunk is
// `chunk_size` elements, the last one of a tensor fewer.
struct Chunk {
  int32_t tensor, number;
};

// The chunks [first, first + count) are those of a tensor.
struct ChunkRun {
  int64_t first;
  int32_t tensor, count;
};

// Copies host memory into kernel parameters and from there to the device: it may be captured in a
// graph, and `from` is free again when the call returns. Multiples of 8 bytes, at such addresses.
cudaError_t launch_write(void* to, const void* from, int64_t bytes, cudaStream_t stream);

// Fills the table of chunks.
cudaError_t launch_chunks(const ChunkRun* runs, int64_t count, Chunk* chunks, cudaStream_t stream);

// --- norm ----------------------------------------------------------------------------------------
struct SumParams {
  const Values* tensors;
  const Chunk* pieces;  // of kAdamWSumPiece
  int64_t count;
  double* squares;     // [count]
  int64_t* nonfinite;  // [count]: elements that are infinite or NaN
};
cudaError_t launch_sum_of_squares(const SumParams& params, cudaStream_t stream);

// Adds up partial sums as adamw_total() does.
struct TotalParams {
  const double* squares;
  int64_t count;
  bool root;
  double* total;
};
cudaError_t launch_total(const TotalParams& params, cudaStream_t stream);

// --- step ----------------------------------------------------------------------------------------
struct AdamWPrepareParams {
  // Of the gradients: what launch_sum_of_squares left. Null: no norm is needed.
  const double* squares;
  const int64_t* nonfinite;
  int64_t pieces;
  const double* sum_of_squares;  // null, or the sum over other devices' gradients too
  const void* loss_scale;        // null, or what the gradients are to be divided by
  DType loss_scale_dtype;        // float32 or float64
  const double* grad_scale;      // null, or a factor on the gradients
  double max_grad_norm = -1;     // negative: no clipping
  bool skip_nonfinite;           // as if there were a loss_scale: step only if all is finite

  const AdamWTensor* tensors;
  int64_t count;
  const AdamWGroup* groups;
  uint64_t seed;

  AdamWScalars* scalars;  // [count]
  int32_t* skipped;       // 1 if the step is not to be done
  double* report;         // [5], as _adamw_run returns it without statistics
};
// Computes norm, clipping and scalars, and counts the step.
cudaError_t launch_adamw_prepare(const AdamWPrepareParams& params, cudaStream_t stream);

// Elements that all threads of a block of any kind have a word of.
inline constexpr int64_t kAdamWLeastChunk = 1 << 11;

struct AdamWStepParams {
  const AdamWTensor* tensors;
  const Values* grads;
  const AdamWScalars* scalars;
  const int32_t* skipped;
  const Chunk* chunks;  // of tensors of one kind
  int64_t count;
  int64_t chunk_size;
  // Null, or what was seen of each chunk; only then averages and copies of weights are kept.
  AdamWStatistics* statistics;
  double average_weight;
};

// What tensors have in common that one launch steps.
struct AdamWKind {
  DType param;
  AdamWState state;
  AdamWRounding rounding;
  bool amsgrad;

  bool operator==(const AdamWKind&) const = default;
};

// Same bits as the CPU's kernels; cudaErrorInvalidValue where adamw_exists() says no.
cudaError_t launch_adamw_step(const AdamWKind& kind, const AdamWStepParams& params,
                              cudaStream_t stream);

// Adds up what was seen of all chunks, for the report of the step.
struct AdamWReportParams {
  const AdamWStatistics* statistics;
  int64_t count;
  int64_t elements;  // of all parameters
  const int32_t* skipped;
  double* report;
};
cudaError_t launch_adamw_report(const AdamWReportParams& params, cudaStream_t stream);

// --- int8 states ---------------------------------------------------------------------------------
struct AdamWCodeParams {
  float* values;
  uint8_t* codes;
  float* scales;
  int64_t size;
  bool is_signed;  // exp_avg; else exp_avg_sq
};
cudaError_t launch_adamw_encode(const AdamWCodeParams& params, cudaStream_t stream);
cudaError_t launch_adamw_decode(const AdamWCodeParams& params, cudaStream_t stream);

}  // namespace torchweld::kernels::cuda
