// Up to kFewRows rows: as fast as the weight can be read. A block has 32 columns, its warps share
// K, and every lane loads its words of the weight from memory straight into registers, one step
// ahead of what it multiplies: 64 KB and more under way in a multiprocessor. Sums are integers, so
// the order in which the warps add theirs together does not show.
#include "kernels/cuda/async.h"
#include "kernels/cuda/linear_epilogue.h"
#include "kernels/cuda/quantize_row.h"
#include "kernels/cuda/quantized_linear_few.h"
#include "kernels/cuda/quantized_linear_parts.h"

namespace torchweld::kernels::cuda {
namespace {

constexpr int kMostThreads = 512;
constexpr int kLeastThreads = 256;
constexpr int kColumns = static_cast<int>(kFewColumns);  // two panels
constexpr int kAhead = 2;                                // steps

// The part of K that a warp has.
template <int kTiles>
class FewRows {
 public:
  TORCHWELD_INLINE FewRows(const QuantizedLinearParams& params, const KPart& part)
      : lane_(params, part.block) {
    const int64_t steps = tiles_of(params.quads, kStepQuads), warp = threadIdx.x / 32;
    const int64_t warps = blockDim.x / 32;
    step_ = part.begin(steps, warps, warp);
    end_ = part.end(steps, warps, warp);
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) load(step_ + ahead, words_[ahead]);
  }

  TORCHWELD_INLINE void multiply(const int8_t* quantized, int64_t stride) {
    for (; step_ < end_; step_ += kAhead) {
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int64_t step = step_ + ahead;
        if (step < end_) lane_.multiply(quantized, stride, step, words_[ahead]);
        load(step + kAhead, words_[ahead]);
      }
    }
  }

  // To sums[row][kColumns] of the block.
  TORCHWELD_INLINE void add_to(int32_t* sums) {
    lane_.take_sums(
        [&](int row, int column, int32_t sum) { atomicAdd(sums + row * kColumns + column, sum); });
  }

 private:
  TORCHWELD_INLINE void load(int64_t step, Word (&words)[4]) const {
    lane_.load(step, step < end_, words);
  }

  FewLane<kTiles> lane_;
  int64_t step_, end_;
  Word words_[kAhead][4];
};

template <int kTiles>
TORCHWELD_INLINE void finish(const QuantizedLinearParams& params, const LinearEnd& end,
                             int64_t block, const int32_t* sums) {
  const FourColumns columns(end, block * kColumns + threadIdx.x % 8 * 4, params.columns);
  if (columns.count <= 0) return;
  const int row = static_cast<int>(threadIdx.x) / 8;
  if (row >= params.rows) return;
  int32_t sum[4];
  memcpy(sum, sums + row * kColumns + threadIdx.x % 8 * 4, sizeof sum);
  columns.finish(end, row, sum);
}

template <int kTiles>
TORCHWELD_INLINE void clear(int32_t* sums) {
  const int threads = static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(threadIdx.x); i < 8 * kTiles * kColumns; i += threads) sums[i] = 0;
}

template <int kTiles>
__global__ void __launch_bounds__(kMostThreads) multiply_few(QuantizedLinearParams params) {
  static_assert(8 * kTiles <= kLeastThreads / 8);
  alignas(16) __shared__ int32_t sums[8 * kTiles * kColumns];
  const KPart part(params, tiles_of(params.columns, kColumns));
  FewRows<kTiles> rows(params, part);
  clear<kTiles>(sums);
  __syncthreads();
  rows.multiply(params.quantized, params.quantized_stride);
  rows.add_to(sums);
  __syncthreads();
  finish<kTiles>(params, part.end_of(params), part.block, sums);
}

constexpr int64_t kMostOnTheWay = 4;

// Whose lanes read two rows at a time without conflict.
constexpr int64_t shared_stride(int64_t in_features) {
  const int64_t stride = quantized_stride(in_features);
  return stride % 128 == 0 ? stride + 64 : stride;
}

// Of rows that come as floats. The first words of the weight are on their way meanwhile.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    quantize_and_multiply_few(QuantizeRows from, QuantizedLinearParams params) {
  using Quantizer = RowQuantizer<T, kThreads>;
  TORCHWELD_DYNAMIC_SHARED(memory);
  alignas(16) __shared__ int32_t sums[8 * kColumns];
  __shared__ typename Quantizer::Shared shared[kMostOnTheWay];
  __shared__ float scale[kMostOnTheWay];
  FewRows<1> rows(params, KPart(params, gridDim.x));
  auto* const quantized = reinterpret_cast<int8_t*>(memory);
  for (int64_t row = 0; row < from.rows; ++row) {
    scale[row] = Quantizer::run(static_cast<const T*>(from.input) + row * from.input_stride,
                                from.in_features, quantized + row * from.quantized_stride,
                                quantized_stride(from.in_features), static_cast<int>(threadIdx.x),
                                &shared[row]);
  }
  clear<1>(sums);
  __syncthreads();
  rows.multiply(quantized, from.quantized_stride);
  rows.add_to(sums);
  __syncthreads();
  params.end.of.input_scale = scale;
  finish<1>(params, params.end, blockIdx.x, sums);
}

struct Grid {
  Grid(const QuantizedLinearParams& params, int multiprocessors)
      : blocks(params.rows == 0 ? 0 : tiles_of(params.columns, kColumns)),
        // Small blocks go several to a multiprocessor, where there are enough of them.
        threads(blocks < 2 * multiprocessors ? kMostThreads : kLeastThreads) {}
  int64_t blocks;
  int threads;
};

template <class T>
cudaError_t launch_of(QuantizeRows from, const QuantizedLinearParams& params, const Grid& grid,
                      cudaStream_t stream) {
  from.quantized_stride = shared_stride(from.in_features);
  return launch_with_shared(
      grid.threads == kMostThreads ? quantize_and_multiply_few<T, kMostThreads>
                                   : quantize_and_multiply_few<T, kLeastThreads>,
      grid.blocks, grid.threads, from.rows * from.quantized_stride, stream, from, params);
}

}  // namespace

bool quantizes_on_the_way(int64_t rows, int64_t in_features, int64_t group_size) {
  constexpr int64_t kMostShared = 32 << 10;  // so that several blocks fit a multiprocessor
  return group_size == 0 && rows <= kMostOnTheWay &&
         rows * shared_stride(in_features) <= kMostShared;
}

cudaError_t launch_quantized_linear_of(DType dtype, const QuantizeRows& from,
                                       const QuantizedLinearParams& params, int multiprocessors,
                                       cudaStream_t stream) {
  const Grid grid(params, multiprocessors);
  if (dtype == DType::float32) return launch_of<float>(from, params, grid, stream);
  if (dtype == DType::bfloat16) return launch_of<BFloat16>(from, params, grid, stream);
  if (dtype == DType::float16) return launch_of<Float16>(from, params, grid, stream);
  return cudaErrorInvalidValue;
}

cudaError_t launch_few_rows(const QuantizedLinearParams& params, int multiprocessors,
                            cudaStream_t stream) {
  const auto kernel = params.rows <= 8    ? multiply_few<1>
                      : params.rows <= 16 ? multiply_few<2>
                                          : multiply_few<4>;
  const Grid grid(params, multiprocessors);
  return launch(kernel, KPart::blocks(params, grid.blocks), grid.threads, stream, params);
}

}  // namespace torchweld::kernels::cuda
