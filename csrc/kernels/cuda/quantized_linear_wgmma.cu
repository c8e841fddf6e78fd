// Many rows on sm_90a, where products of warpgroups reach the tensor cores' full rate (mma.sync
// reaches about 60 % of it). A block has 128 columns, 64 for each of two warpgroups, and 128 or 256
// rows. The weight is the left factor and comes from registers: 8 bytes of a panel as it lies are
// two neighbouring columns, rows g and g + 8 of the fragment, so a warp has one panel and nothing
// is rearranged. Rows are the right factor, in shared memory. Both get there by asynchronous
// copies, some stages of 128 k ahead.
//
// A stage's products run while the next stage is read and its products are queued, so the tensor
// cores have no gap; a stage is overwritten behind the barrier that follows the end of its
// products in all threads, two stages later.
#include "kernels/cuda/async.h"
#include "kernels/cuda/linear_epilogue.h"
#include "kernels/cuda/quantized_linear_parts.h"
#include "kernels/cuda/wgmma.h"

namespace torchweld::kernels::cuda {
namespace {

constexpr int kThreads = 2 * kWarpgroup;
constexpr int kColumns = 128;
constexpr int kPanels = kColumns / static_cast<int>(kPanelColumns);
constexpr int kStageK = kSwizzledRow;
constexpr int kStageQuads = kStageK / static_cast<int>(kQuad);
constexpr int kQuadBytes = static_cast<int>(kPanelColumns * kQuad);
constexpr int kPanelBytes = kStageQuads * kQuadBytes;
constexpr int kProducts = kStageK / kProductK;  // of a stage
constexpr int64_t kMostSharedOfSm90 = 227 << 10;

template <int kRowsOf>
struct Shape {
  static constexpr int kRows = kRowsOf;
  static constexpr int kStages = 1024 / kRows > 4 ? 6 : 4;
  static constexpr int kRowsBytes = kRows * kSwizzledRow;
  static constexpr int kStageBytes = kRowsBytes + kPanels * kPanelBytes;
  // Sums on their way out; no two threads of a quarter warp meet in a bank.
  static constexpr int kOutStride = kColumns + 4;
  static_assert(kRows * kOutStride * 4 <= kStages * kStageBytes);
  static constexpr int64_t kShared = kStages * kStageBytes + kSwizzledRows;  // to be aligned
  static_assert(kShared <= kMostSharedOfSm90);
};

template <class S>
class Tile {
 public:
  TORCHWELD_INLINE Tile(const QuantizedLinearParams& params, unsigned char* memory)
      : params_(params),
        memory_(memory + (-shared_address(memory) & (kSwizzledRows - 1))),
        thread_(static_cast<int>(threadIdx.x)),
        part_(params, blocks(params)),
        at_(part_.block, tiles_of(params.rows, S::kRows), tiles_of(params.columns, kColumns)) {
    at_.row *= S::kRows;
    at_.column *= kColumns;
    // Pairs, for the two sets of registers; of a last one that is too many all is zero.
    const int64_t pairs = tiles_of(params.quads, 2 * kStageQuads);
    begin_ = part_.begin(pairs) * 2;
    end_ = part_.end(pairs) * 2;
  }

  static constexpr int64_t blocks(const QuantizedLinearParams& params) {
    return tiles_of(params.rows, S::kRows) * tiles_of(params.columns, kColumns);
  }

  TORCHWELD_INLINE void run() {
#pragma unroll
    for (int stage = 0; stage < S::kStages - 2; ++stage) copy(begin_ + stage);
#pragma unroll
    for (int i = 0; i < S::kRows / 2; ++i) sums_[i] = 0;
    settle(sums_);
    uint32_t even[kProducts][4], odd[kProducts][4];
    for (int64_t stage = begin_; stage < end_; stage += 2) {
      multiply(stage, even);
      multiply(stage + 1, odd);
    }
    wait_for_products<0>();
    settle(sums_);
    finish();
  }

 private:
  TORCHWELD_INLINE unsigned char* slot(int64_t stage) const {
    return memory_ + stage % S::kStages * S::kStageBytes;
  }

  TORCHWELD_INLINE void copy(int64_t stage) const {
    if (stage < end_) {
      copy_rows(stage);
      copy_weight(stage);
    }
    commit_copies();  // an empty one where nothing is left, so that counts stay right
  }

  // Eight threads to a row, 32 rows at a time.
  TORCHWELD_INLINE void copy_rows(int64_t stage) const {
    const int first = thread_ / 8, piece = thread_ % 8;
    const int64_t k = stage * kStageK + piece * 16, stride = params_.quantized_stride;
    const int64_t left = k < stride ? params_.rows - at_.row - first : 0;
    const int8_t* from = params_.quantized + (at_.row + first) * stride + k;
    unsigned char* to = slot(stage) + swizzled(first, piece);
#pragma unroll
    for (int row = 0; row < S::kRows; row += 32) {
      copy_async(to + row * kSwizzledRow, from + row * stride, row < left);
    }
  }

  // As it lies: two panels at a time.
  TORCHWELD_INLINE void copy_weight(int64_t stage) const {
    const int first = thread_ / kWarpgroup, word = thread_ % kWarpgroup;
    const int64_t quad = stage * kStageQuads + word / 4, panel = at_.column / kPanelColumns + first;
    const int64_t left =
        quad < params_.quads ? tiles_of(params_.columns, kPanelColumns) - panel : 0;
    const int8_t* from =
        params_.panels + (panel * params_.quads + quad) * kQuadBytes + word % 4 * 16;
    unsigned char* to = slot(stage) + S::kRowsBytes + thread_ * 16;
#pragma unroll
    for (int i = 0; i < kPanels; i += 2) {
      copy_async(to + i * kPanelBytes, from + i * params_.quads * kQuadBytes, i < left);
    }
  }

  TORCHWELD_INLINE void multiply(int64_t stage, uint32_t (&weight)[kProducts][4]) {
    wait_for_copies<S::kStages - 3>();
    fence_shared();
    __syncthreads();  // the stage is there for all, and nobody's products read the last but one
    const int lane = thread_ % 32, g = lane / 4, t = lane % 4;
    const unsigned char* from = slot(stage);
    const unsigned char* mine =
        from + S::kRowsBytes + thread_ / 32 * kPanelBytes + t * kQuadBytes + g * 8;
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto words = *reinterpret_cast<const uint2*>(mine + (2 * i + half) * 4 * kQuadBytes);
        weight[i][2 * half] = words.x;
        weight[i][2 * half + 1] = words.y;
      }
    }
    const uint64_t rows = swizzled_rows(shared_address(from));
    fence_registers();
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      multiply_async(sums_, weight[i], rows + static_cast<uint64_t>(i * kProductK >> 4));
    }
    commit_products();
    copy(stage + S::kStages - 2);
    wait_for_products<1>();
  }

  // Sums go out by rows, 128 columns of one to a warp.
  TORCHWELD_INLINE void finish() const {
    wait_for_copies<0>();
    __syncthreads();
    auto* const out = reinterpret_cast<int32_t*>(memory_);
    const int lane = thread_ % 32, g = lane / 4, t = lane % 4, warp = thread_ / 32;
#pragma unroll
    for (int i = 0; i < S::kRows / 2; i += 2) {
      // Of rows 8 (i / 4) + 2 t and the next; columns 2 g and the next are two registers on.
      const int row = i / 4 * 8 + 2 * t + i % 4 / 2;
      const uint2 pair{static_cast<unsigned>(sums_[i / 4 * 4 + i % 4 / 2]),
                       static_cast<unsigned>(sums_[i / 4 * 4 + i % 4 / 2 + 2])};
      *reinterpret_cast<uint2*>(out + row * S::kOutStride + warp * kPanelColumns + 2 * g) = pair;
    }
    __syncthreads();
    const LinearEnd end = part_.end_of(params_);
    const FourColumns columns(end, at_.column + 4 * lane, params_.columns);
    if (columns.count <= 0) return;
#pragma unroll 1
    for (int row = warp; row < S::kRows && at_.row + row < params_.rows; row += kThreads / 32) {
      int32_t sums[4];
      memcpy(sums, __builtin_assume_aligned(out + row * S::kOutStride + 4 * lane, 16), sizeof sums);
      columns.finish(end, at_.row + row, sums);
    }
  }

  const QuantizedLinearParams& params_;
  unsigned char* memory_;
  int thread_;
  KPart part_;
  TilePlace at_;
  int64_t begin_, end_;         // of stages
  int32_t sums_[S::kRows / 2];  // D of wgmma.h: rows there are columns here
};

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    multiply_warpgroups([[maybe_unused]] QuantizedLinearParams params) {
#if TORCHWELD_HAS_WGMMA
  TORCHWELD_DYNAMIC_SHARED(memory);
  Tile<S>(params, memory).run();
#else
  __trap();  // not silence, should other code than sm_90a's be loaded, as CUDA_FORCE_PTX_JIT does
#endif
}

template <class S>
cudaError_t launch_shape(const QuantizedLinearParams& params, cudaStream_t stream) {
  return launch_with_shared<kMostSharedOfSm90>(multiply_warpgroups<S>,
                                               KPart::blocks(params, Tile<S>::blocks(params)),
                                               kThreads, S::kShared, stream, params);
}

}  // namespace

cudaError_t launch_warpgroups(const QuantizedLinearParams& params, bool wide, cudaStream_t stream) {
  return wide ? launch_shape<Shape<256>>(params, stream) : launch_shape<Shape<128>>(params, stream);
}

}  // namespace torchweld::kernels::cuda
