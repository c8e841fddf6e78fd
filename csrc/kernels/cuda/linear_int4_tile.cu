// The int4 product of many rows. The integer sums of one group stay in registers until its end, as
// on the CPU: there they join the float sums of the tile.
#include "kernels/cuda/linear_int4.h"
#include "kernels/cuda/linear_tile.h"

namespace torchweld::kernels::cuda {
namespace {

// A sum that starts here is a float's last bits as long as it is small: a subtraction, which runs
// at four times the speed of a conversion, gives its value.
constexpr int32_t kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
constexpr int64_t kMagicGroup = 2048;  // 15 * 127 * 2048 < 2^22

template <class Shape>
class Groups {
 public:
  TORCHWELD_INLINE Groups(const LinearInt4Params& p, const Tile<Shape>& tile)
      : p_(p), tile_(tile), steps_(static_cast<int>(p.group_size / (kUnitsOfStep * kOctet))) {
    begin();
  }

  TORCHWELD_INLINE void multiply(const Word (&weights)[Shape::kSets],
                                 const uint32_t (&b)[Shape::kTiles][2]) {
    if (group_ == p_.groups) return;  // a stage's steps behind the last
#pragma unroll
    for (int set = 0; set < Shape::kSets; ++set) {
      const StepWeights<Int4Weights> step(weights[set]);
#pragma unroll
      for (int n = 0; n < Shape::kTiles; ++n) step.multiply(b[n], sums_[set][n]);
    }
#pragma unroll
    for (int n = 0; n < Shape::kTiles; ++n) {
      activations_[n] = __dp4a(static_cast<int>(b[n][0]), 0x01010101, activations_[n]);
      activations_[n] = __dp4a(static_cast<int>(b[n][1]), 0x01010101, activations_[n]);
    }
    if (++step_ < steps_) return;
    if (is_small()) {
      join<true>();
    } else {
      join<false>();
    }
    ++group_;
    begin();
  }

  float total[Shape::kSets][Shape::kTiles][2][4] = {};

 private:
  TORCHWELD_INLINE bool is_small() const { return p_.group_size <= kMagicGroup; }

  // Scales and zeros are asked for now, and used at the end of the group.
  TORCHWELD_INLINE void begin() {
    step_ = 0;
    const int32_t start = is_small() ? kMagicBits : 0;
    const int64_t panels = (p_.columns + kPanelColumns - 1) / kPanelColumns;
#pragma unroll
    for (int set = 0; set < Shape::kSets; ++set) {
      const int64_t panel = tile_.panel(set) + lane_.panel;
      const bool exists = panel < panels && group_ < p_.groups;
      const int64_t at = (panel * p_.groups + group_) * kPanelColumns + 4 * lane_.chunk;
      load_unit(p_.weight_scale + at, exists, scale_[set]);
      zero_[set] = exists ? *reinterpret_cast<const uint32_t*>(p_.weight_zero + at) : 0u;
#pragma unroll
      for (int n = 0; n < Shape::kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sums_[set][n].of[i / 4][i % 4] = start;
      }
    }
#pragma unroll
    for (int n = 0; n < Shape::kTiles; ++n) activations_[n] = 0;
  }

  template <bool kIsSmall>
  TORCHWELD_INLINE void join() {
#pragma unroll
    for (int n = 0; n < Shape::kTiles; ++n) {
      int32_t of_row = activations_[n];  // row g
      of_row += __shfl_xor_sync(0xffffffffu, of_row, 1);
      of_row += __shfl_xor_sync(0xffffffffu, of_row, 2);
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const int32_t of_mine = __shfl_sync(0xffffffffu, of_row, 4 * (2 * lane_.t + which));
#pragma unroll
        for (int set = 0; set < Shape::kSets; ++set) {
          int32_t four[4];
          sums_[set][n].row(which, four);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const auto zero = static_cast<int32_t>(zero_[set] >> (8 * i) & 0xff);
            const int32_t sum = four[i] - zero * of_mine;
            const float value =
                kIsSmall ? float_of(static_cast<uint32_t>(sum)) - kMagic : static_cast<float>(sum);
            const uint32_t pair = scale_[set][i / 2];
            const float scale = float_of(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
            float& to = total[set][n][which][i];
            to = fma(value, scale, to);
          }
        }
      }
    }
  }

  const LinearInt4Params& p_;
  const Tile<Shape>& tile_;
  StepLane lane_;
  int steps_, step_ = 0;
  int64_t group_ = 0;
  StepSums<int32_t> sums_[Shape::kSets][Shape::kTiles];
  int32_t activations_[Shape::kTiles];
  uint32_t scale_[Shape::kSets][2], zero_[Shape::kSets];  // of four columns
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads) tiles(LinearInt4Params p, TileSource source) {
  TORCHWELD_DYNAMIC_SHARED(memory);
  Tile<Shape> tile(source, memory);
  Groups<Shape> groups(p, tile);
  tile.for_each_step([&](const Word(&weights)[Shape::kSets], const uint32_t(&b)[Shape::kTiles][2]) {
    groups.multiply(weights, b);
  });
  tile.finish(p.end, p.columns, [&](int set, int n, int which, float(&four)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = groups.total[set][n][which][i];
  });
}

template <class Shape>
cudaError_t launch_for(const LinearInt4Params& p, const TileSource& source, cudaStream_t stream) {
  return launch_with_shared(tiles<Shape>, Tile<Shape>::blocks(source), Shape::kThreads,
                            Shape::kSharedBytes, stream, p, source);
}

}  // namespace

cudaError_t launch_int4_tiles(const LinearInt4Params& p, bool large, cudaStream_t stream) {
  TileSource source{};
  source.panels = p.panels;
  source.panel_count = (p.columns + kPanelColumns - 1) / kPanelColumns;
  source.units = p.groups * p.group_size / kOctet;
  source.rows = p.quantized;
  source.row_count = p.rows;
  source.row_bytes = p.quantized_stride;
  source.row_words = p.quantized_stride / 16;
  source.planes = 1;
  return large ? launch_for<LargeTile>(p, source, stream)
               : launch_for<SmallTile>(p, source, stream);
}

}  // namespace torchweld::kernels::cuda
