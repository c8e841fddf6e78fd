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
constexpr int kSumWarps = 8;

// One warp a piece. Lane l adds elements l, l + 32, ... one after the other, then the lanes' sums
// are added in order: as kernels/cpu/adamw_sums.h, so the bits are those of a CPU.
template <class T>
TORCHWELD_INLINE void sum_piece(const T* x, int64_t size, double& squares, int64_t& nonfinite) {
  constexpr int kUnroll = 8;
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
  const int64_t place = blockIdx.x * static_cast<int64_t>(kSumWarps) + threadIdx.x / kWarp;
  if (place >= params.count) return;
  const Chunk piece = params.pieces[place];
  const Values tensor = params.tensors[piece.tensor];
  const int64_t begin = piece.number * kAdamWSumPiece;
  const int64_t left = tensor.size - begin, size = left < kAdamWSumPiece ? left : kAdamWSumPiece;
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
  double total = 0;
  int64_t count = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    total += __shfl_sync(0xffffffffu, squares, lane);
    count += __shfl_sync(0xffffffffu, nonfinite, lane);
  }
  if (threadIdx.x % kWarp == 0) {
    params.squares[place] = total;
    params.nonfinite[place] = count;
  }
}

constexpr int kTotalThreads = 512;

// Added one after the other, as on the CPU, by one thread; the others bring them to it.
template <class T>
TORCHWELD_INLINE T total_of(const T* values, int64_t count) {
  __shared__ T tile[kTotalThreads];
  T total = 0;
  for (int64_t begin = 0; begin < count; begin += kTotalThreads) {
    const int64_t i = begin + threadIdx.x;
    tile[threadIdx.x] = i < count ? values[i] : T{};
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll 16
      for (int k = 0; k < kTotalThreads; ++k) total += tile[k];
    }
    __syncthreads();
  }
  return total;  // of thread 0
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

// What all tensors share.
struct Decision {
  double grad_scale;
  int32_t skipped;
};

// The same decisions in the same arithmetic as ops/cpu/adamw.cpp.
TORCHWELD_INLINE Decision decide(const AdamWPrepareParams& params, double squares,
                                 int64_t nonfinite) {
  const bool unscales = params.loss_scale != nullptr;
  const double unscale = unscales ? 1 / scalar(params.loss_scale, params.loss_scale_dtype) : 1.0;
  const double factor = params.grad_scale != nullptr ? *params.grad_scale : 1.0;
  const bool elsewhere = params.sum_of_squares != nullptr;
  const bool has_norm = elsewhere || params.squares != nullptr;
  double norm = __longlong_as_double(0x7ff8000000000000LL), clip = 1;
  int32_t skipped = 0;
  if (has_norm) {
    norm = ::sqrt(elsewhere ? *params.sum_of_squares : squares) * unscale;
    if (params.max_grad_norm >= 0) {
      clip = params.max_grad_norm / (norm + 1e-6);
      if (clip > 1) clip = 1;  // NaN stays
    }
    // The squares of float64 may overflow where no gradient does.
    const bool may_skip = unscales || params.skip_nonfinite;
    skipped = may_skip && !is_finite(norm) && (nonfinite > 0 || elsewhere);
  }
  params.report[0] = norm;
  params.report[1] = skipped;
  params.report[2] = skipped ? __longlong_as_double(0x7ff8000000000000LL) : 0;
  params.report[3] = 0;
  params.report[4] = skipped ? static_cast<double>(nonfinite) : 0;
  return {unscale * clip * factor, skipped};
}

TORCHWELD_INLINE AdamWScalars scalars_of(const AdamWGroup& group, double step, double grad_scale) {
  const double lr = group.lr_data != nullptr ? scalar(group.lr_data, group.lr_dtype) : group.lr;
  return {.decay = 1 - lr * group.weight_decay,
          .beta1 = group.beta1,
          .beta2 = group.beta2,
          .step_size = lr / (1 - ::pow(group.beta1, step)),
          .bias_root = ::sqrt(1 - ::pow(group.beta2, step)),
          .eps = group.eps,
          .grad_scale = group.sign * grad_scale};
}

__global__ void __launch_bounds__(kTotalThreads) prepare(AdamWPrepareParams params) {
  __shared__ Decision shared;
  const double squares = total_of(params.squares, params.pieces);
  const int64_t nonfinite = total_of(params.nonfinite, params.pieces);
  if (threadIdx.x == 0) {
    shared = decide(params, squares, nonfinite);
    *params.skipped = shared.skipped;
  }
  __syncthreads();
  if (shared.skipped != 0) return;
  for (int64_t t = threadIdx.x; t < params.count; t += kTotalThreads) {
    if (params.grads[t].size < 0) continue;
    const AdamWTensor& tensor = params.tensors[t];
    const double step = *tensor.step_count + 1.0;
    AdamWScalars scalars = scalars_of(params.groups[tensor.group], step, shared.grad_scale);
    scalars.key = adamw_key(params.seed, static_cast<uint64_t>(step), tensor.id);
    params.scalars[t] = scalars;
    *tensor.step_count += 1;
  }
}

}  // namespace

int64_t adamw_chunk_size(int64_t elements, int multiprocessors) {
  // Eight blocks of threads are at work on a multiprocessor at a time, and several rounds of them
  // even out that the last one is not full.
  constexpr int64_t kBlocks = 8 * 4, kLeast = 1 << 11, kMost = 1 << 15;
  int64_t size = kLeast;
  while (size < kMost && elements / (2 * size) >= kBlocks * multiprocessors) size *= 2;
  return size;
}

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
  return launch(sum_squares, (params.count + kSumWarps - 1) / kSumWarps, kSumWarps * kWarp, stream,
                params);
}

cudaError_t launch_total(const TotalParams& params, cudaStream_t stream) {
  return launch(add_totals, 1, kTotalThreads, stream, params);
}

cudaError_t launch_adamw_prepare(const AdamWPrepareParams& params, cudaStream_t stream) {
  return launch(prepare, 1, kTotalThreads, stream, params);
}

}  // namespace torchweld::kernels::cuda
