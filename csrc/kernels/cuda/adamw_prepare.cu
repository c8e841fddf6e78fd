// What comes before the AdamW step: the tables, the norm, and the scalars of every tensor.
#include "kernels/cuda/adamw.h"
#include "kernels/cuda/launch.h"

namespace torchweld::kernels::cuda {
namespace {

// --- tables --------------------------------------------------------------------------------------
// As many as fit into the parameters of a launch: 4 KiB of every one, 32 KiB since CUDA 12.1.
template <int kWords>
struct Words {
  uint64_t words[kWords];
};
constexpr int kFew = 480, kMany = 4032;

template <int kWords>
__global__ void write_words(Words<kWords> from, uint64_t* to, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    to[i] = from.words[i];
  }
}

template <int kWords>
cudaError_t write_part(uint64_t* to, const char* from, int64_t count, cudaStream_t stream) {
  Words<kWords> words;
  memcpy(&words, from, static_cast<size_t>(count) * 8);
  return launch(write_words<kWords>, 1, 256, stream, words, to, static_cast<int>(count));
}

// One block a tensor.
__global__ void fill_chunks(const ChunkRun* runs, Chunk* chunks) {
  const ChunkRun run = runs[blockIdx.x];
  for (int k = static_cast<int>(threadIdx.x); k < run.count; k += static_cast<int>(blockDim.x)) {
    chunks[run.first + k] = {run.tensor, k};
  }
}

// --- norm ----------------------------------------------------------------------------------------
constexpr int kWarp = 32;
constexpr int kSumWarps = static_cast<int>(kAdamWSumPiece / kAdamWSumPart);

// One warp a part of a piece. Lane l adds elements l, l + 32, ... one after the other, then lanes
// are added to lanes: as kernels/cpu/adamw_sums.h, so the bits are those of a CPU.
template <class T>
TORCHWELD_INLINE void sum_piece(const T* x, int64_t size, double& squares, int64_t& nonfinite) {
  constexpr int kUnroll = sizeof(T) == 2 ? 16 : 8;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t begin = lane; begin < size; begin += kUnroll * kWarp) {
    T values[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int64_t i = begin + k * kWarp;
      values[k] = i < size ? x[i] : T{};
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const auto narrow = to_vec(values[k]);
      const auto zero_or_nan = narrow - narrow;
      nonfinite += zero_or_nan != zero_or_nan;
      const double wide = static_cast<double>(narrow);
      squares = fma(wide, wide, squares);
    }
  }
}

__global__ void __launch_bounds__(kSumWarps* kWarp) sum_squares(SumParams params) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const Chunk piece = params.pieces[blockIdx.x];
  const Values tensor = params.tensors[piece.tensor];
  const int64_t begin = piece.number * kAdamWSumPiece + warp * kAdamWSumPart;
  const int64_t left = tensor.size - begin, size = left < kAdamWSumPart ? left : kAdamWSumPart;
  double squares = 0;
  int64_t nonfinite = 0;
  if (tensor.dtype == DType::float32) {
    sum_piece(static_cast<const float*>(tensor.data) + begin, size, squares, nonfinite);
  } else if (tensor.dtype == DType::float64) {
    sum_piece(static_cast<const double*>(tensor.data) + begin, size, squares, nonfinite);
  } else if (tensor.dtype == DType::bfloat16) {
    sum_piece(static_cast<const BFloat16*>(tensor.data) + begin, size, squares, nonfinite);
  } else {
    sum_piece(static_cast<const Float16*>(tensor.data) + begin, size, squares, nonfinite);
  }
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, lanes);
    nonfinite += __shfl_xor_sync(0xffffffffu, nonfinite, lanes);
  }
  __shared__ double part_squares[kSumWarps];
  __shared__ int64_t part_nonfinite[kSumWarps];
  if (threadIdx.x % kWarp == 0) {
    part_squares[warp] = squares;
    part_nonfinite[warp] = nonfinite;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int part = 1; part < kSumWarps; ++part) {
    squares += part_squares[part];
    nonfinite += part_nonfinite[part];
  }
  params.squares[blockIdx.x] = squares;
  params.nonfinite[blockIdx.x] = nonfinite;
}

constexpr int kTotalThreads = static_cast<int>(kAdamWSumLanes);

// Values that lie `stride` apart, added up as adamw_total() does; for all threads of a block.
template <class T>
TORCHWELD_INLINE T total_of(const T* values, int64_t count, int64_t stride = 1) {
  __shared__ T lanes[kTotalThreads];
  const int lane = static_cast<int>(threadIdx.x);
  T sum = 0;
#pragma unroll 8
  for (int64_t i = lane; i < count; i += kTotalThreads) sum += values[i * stride];
  lanes[lane] = sum;
  for (int n = kTotalThreads / 2; n > 0; n /= 2) {
    __syncthreads();
    if (lane < n) lanes[lane] += lanes[lane + n];
  }
  __syncthreads();
  const T total = lanes[0];
  __syncthreads();
  return total;
}

__global__ void __launch_bounds__(kTotalThreads) add_totals(TotalParams params) {
  const double total = total_of(params.squares, params.count);
  if (threadIdx.x == 0) *params.total = params.root ? ::sqrt(total) : total;
}

// --- scalars -------------------------------------------------------------------------------------
TORCHWELD_INLINE double scalar(const void* data, DType dtype) {
  return dtype == DType::float64 ? *static_cast<const double*>(data)
                                 : static_cast<double>(*static_cast<const float*>(data));
}

TORCHWELD_INLINE bool is_finite(double x) { return x - x == 0; }
TORCHWELD_INLINE double nan() { return __longlong_as_double(0x7ff8000000000000LL); }

// What all tensors share.
struct Decision {
  double grad_scale;
  bool skipped;
};

// By all threads, the same decisions in the same arithmetic as ops/cpu/adamw.cpp.
TORCHWELD_INLINE Decision decide(const AdamWPrepareParams& params) {
  const bool unscales = params.loss_scale != nullptr;
  const double unscale = unscales ? 1 / scalar(params.loss_scale, params.loss_scale_dtype) : 1.0;
  const double factor = params.grad_scale != nullptr ? *params.grad_scale : 1.0;
  const bool elsewhere = params.sum_of_squares != nullptr;
  const bool has_norm = elsewhere || params.squares != nullptr;
  double norm = nan(), clip = 1;
  int64_t nonfinite = 0;
  bool skipped = false;
  if (has_norm) {
    const double squares =
        elsewhere ? *params.sum_of_squares : total_of(params.squares, params.pieces);
    norm = ::sqrt(squares) * unscale;
    if (params.max_grad_norm >= 0) {
      clip = params.max_grad_norm / (norm + 1e-6);
      if (clip > 1) clip = 1;  // NaN stays
    }
    if ((unscales || params.skip_nonfinite) && !is_finite(norm)) {
      // The squares of float64 may overflow where no gradient does.
      nonfinite = total_of(params.nonfinite, params.pieces);
      skipped = nonfinite > 0 || elsewhere;
    }
  }
  if (threadIdx.x == 0) {
    *params.skipped = skipped;
    params.report[0] = norm;
    params.report[1] = skipped;
    params.report[2] = skipped ? nan() : 0;
    params.report[3] = 0;
    params.report[4] = skipped ? static_cast<double>(nonfinite) : 0;
  }
  return {unscale * clip * factor, skipped};
}

// base^n by squaring, in twice the digits of a double and rounded once. The C library's pow() on
// the host rounds the same way but for one n in a thousand; the device's errs by up to 2 ulp, and
// 1 - beta2^n makes much of them.
TORCHWELD_INLINE double power(double base, uint32_t n) {
  struct Pair {
    double high, low;
    TORCHWELD_INLINE void operator*=(Pair b) {
      const double product = high * b.high;
      const double rest = fma(high, b.high, -product) + (high * b.low + low * b.high);
      high = product + rest;
      low = rest - (high - product);
    }
  };
  Pair result{1, 0}, square{base, 0};
  for (; n != 0; n >>= 1) {
    if (n & 1) result *= square;
    square *= square;
  }
  return result.high;
}

TORCHWELD_INLINE AdamWScalars scalars_of(const AdamWGroup& group, uint32_t step,
                                         double grad_scale) {
  const double lr = group.lr_data != nullptr ? scalar(group.lr_data, group.lr_dtype) : group.lr;
  return {.decay = 1 - lr * group.weight_decay,
          .beta1 = group.beta1,
          .beta2 = group.beta2,
          .step_size = lr / (1 - power(group.beta1, step)),
          .bias_root = ::sqrt(1 - power(group.beta2, step)),
          .eps = group.eps,
          .grad_scale = group.sign * grad_scale};
}

__global__ void __launch_bounds__(kTotalThreads) prepare(AdamWPrepareParams params) {
  const Decision decision = decide(params);
  if (decision.skipped) return;
  for (int64_t t = threadIdx.x; t < params.count; t += kTotalThreads) {
    const AdamWTensor& tensor = params.tensors[t];
    const auto step = static_cast<uint32_t>(*tensor.step_count + 1.0);
    AdamWScalars scalars = scalars_of(params.groups[tensor.group], step, decision.grad_scale);
    scalars.key = adamw_key(params.seed, step, tensor.id);
    params.scalars[t] = scalars;
  }
  // Parameters may share a count: it is the same for all of them, and each adds to it.
  __syncthreads();
  for (int64_t t = threadIdx.x; t < params.count; t += kTotalThreads) {
    atomicAdd(params.tensors[t].step_count, 1.0f);  // exact, so in any order
  }
}

__global__ void __launch_bounds__(kTotalThreads) report_statistics(AdamWReportParams params) {
  if (*params.skipped != 0) return;
  constexpr int64_t kStride = sizeof(AdamWStatistics) / 8;
  const AdamWStatistics* const first = params.statistics;
  const double squares = total_of(&first->update_squares, params.count, kStride);
  const int64_t lost = total_of(&first->lost, params.count, kStride);
  const int64_t nonfinite = total_of(&first->nonfinite, params.count, kStride);
  if (threadIdx.x != 0) return;
  const int64_t elements = params.elements > 0 ? params.elements : 1;
  params.report[2] = ::sqrt(squares);
  params.report[3] = static_cast<double>(lost) / static_cast<double>(elements);
  params.report[4] = static_cast<double>(nonfinite);
}

}  // namespace

cudaError_t launch_write(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  auto* words = static_cast<uint64_t*>(to);
  const auto* data = static_cast<const char*>(from);
  for (int64_t left = bytes / 8; left > 0; left -= kMany, words += kMany, data += 8 * kMany) {
    const cudaError_t error =
        left <= kFew ? write_part<kFew>(words, data, left, stream)
                     : write_part<kMany>(words, data, left < kMany ? left : kMany, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t launch_chunks(const ChunkRun* runs, int64_t count, Chunk* chunks, cudaStream_t stream) {
  return launch(fill_chunks, count, 128, stream, runs, chunks);
}

cudaError_t launch_sum_of_squares(const SumParams& params, cudaStream_t stream) {
  return launch(sum_squares, params.count, kSumWarps * kWarp, stream, params);
}

cudaError_t launch_total(const TotalParams& params, cudaStream_t stream) {
  return launch(add_totals, 1, kTotalThreads, stream, params);
}

cudaError_t launch_adamw_prepare(const AdamWPrepareParams& params, cudaStream_t stream) {
  return launch(prepare, 1, kTotalThreads, stream, params);
}

cudaError_t launch_adamw_report(const AdamWReportParams& params, cudaStream_t stream) {
  return launch(report_statistics, 1, kTotalThreads, stream, params);
}

}  // namespace torchweld::kernels::cuda
