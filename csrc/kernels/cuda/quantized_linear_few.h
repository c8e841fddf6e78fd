// Up to kFewRows rows and 32 columns of a block: what a lane of a warp reads and sums.
#pragma once

#include "kernels/cuda/launch.h"
#include "kernels/cuda/mma.h"
#include "kernels/cuda/quantized_linear.h"

namespace torchweld::kernels::cuda {

// For 8 kTiles rows.
template <int kTiles>
class FewLane {
 public:
  static constexpr int kColumns = static_cast<int>(kFewColumns);  // two panels

  TORCHWELD_INLINE FewLane(const QuantizedLinearParams& params, int64_t block)
      : quads_(params.quads), rows_(params.rows), g_(threadIdx.x % 32 / 4), t_(threadIdx.x % 4) {
    const int64_t panel = 2 * block + g_ / 4;
    // Of a panel that does not exist no quad does.
    if (panel * kPanelColumns >= params.columns) quads_ = 0;
    weight_ = params.panels + panel * params.quads * kPanelColumns * kQuad + g_ % 4 * 16;
  }

  TORCHWELD_INLINE void load(int64_t step, bool exists, Word (&words)[4]) const {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t quad = step * kStepQuads + 4 * t_ + c;
      words[c] = {};
      if (exists && quad < quads_) {
        words[c] = __ldcg(reinterpret_cast<const Word*>(weight_ + quad * kPanelColumns * kQuad));
      }
    }
  }

  // `quantized`: the first row.
  TORCHWELD_INLINE void multiply(const int8_t* quantized, int64_t stride, int64_t step,
                                 const Word (&words)[4]) {
    const int8_t* row = quantized + g_ * stride + t_ * 16 + step * kStep;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      Word x{};
      if (tile * 8 + g_ < rows_) x = *reinterpret_cast<const Word*>(row + tile * 8 * stride);
      multiply_word({x.x, x.y}, words[0], words[1], sum_[tile]);
      multiply_word({x.z, x.w}, words[2], words[3], sum_[tile]);
    }
  }

  // f(row, column, sum) for each sum, which is 0 from then on.
  template <class F>
  TORCHWELD_INLINE void take_sums(const F& f) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        int32_t& sum = sum_[tile][i / 4][i % 4];
        f(tile * 8 + 2 * t_ + i % 2, 4 * g_ + i / 2, sum);
        sum = 0;
      }
    }
  }

 private:
  TORCHWELD_INLINE static void multiply_word(const uint32_t (&x)[2], const Word& low,
                                             const Word& high, int32_t (&sum)[2][4]) {
    mma_s8(sum[0], {low.x, low.y, high.x, high.y}, x);
    mma_s8(sum[1], {low.z, low.w, high.z, high.w}, x);
  }

  int64_t quads_, rows_;
  int g_, t_;
  const int8_t* weight_;
  // Columns 4 g + 2 i, 4 g + 2 i + 1 of rows 2 t and 2 t + 1.
  int32_t sum_[kTiles][2][4] = {};
};

}  // namespace torchweld::kernels::cuda
