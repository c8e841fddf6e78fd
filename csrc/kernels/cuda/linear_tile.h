// Products of many rows by tiles, for weights that are read as linear_units.h says. Stages of eight
// units travel to shared memory while others are multiplied there.
#pragma once

#include "kernels/cuda/async.h"
#include "kernels/cuda/linear_epilogue.h"
#include "kernels/cuda/linear_units.h"
#include "kernels/cuda/tile_place.h"

namespace torchweld::kernels::cuda {

// The right and the left side of a product, in units. Rows may come in planes, whose products with
// one and the same weight are added, the last plane's first: of parts of floats those of the lowest
// bits. Tensor cores cut off what a sum does not hold, time after time; so most of it is still
// small.
struct TileSource {
  const void* panels;  // aligned to 16
  int64_t panel_count;
  int64_t units;     // of a panel
  const void* rows;  // aligned to 16
  int64_t row_count;
  int64_t row_bytes;    // from one to the next, a multiple of 16
  int64_t row_words;    // of 16 bytes, that a row has
  int64_t plane_bytes;  // from one plane to the next, a multiple of 16
  int planes;
};

// A block is kWarps of kWarpColumns x kWarpRows warps; of each the tile is kSets * 32 columns times
// kTiles * 8 rows.
template <int kSetsOf, int kWarpColumnsOf, int kWarpRowsOf>
struct TileShape {
  static constexpr int kSets = kSetsOf, kTiles = 4;
  static constexpr int kWarpColumns = kWarpColumnsOf, kWarpRows = kWarpRowsOf;
  static constexpr int kThreads = 32 * kWarpColumns * kWarpRows;
  static constexpr int kColumns = kSets * kStepColumns * kWarpColumns;
  static constexpr int kRows = kTiles * kTokens * kWarpRows;
  static constexpr int kPanels = kColumns / 16;

  static constexpr int kStageUnits = 8, kStages = 4;
  static constexpr int kPanelBytes = kStageUnits * kUnitBytes;
  static constexpr int kRowBytes = kStageUnits * 8;
  static constexpr int kStageBytes = kPanels * kPanelBytes + kRows * kRowBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;

  // Sums on their way to where neighbouring threads write neighbouring columns.
  static constexpr int kOutRows = kWarpRows * kTokens, kOutStride = kColumns + 4;
  static_assert(kOutRows * kOutStride * 4 <= kSharedBytes);
};

template <class Shape>
class Tile {
 public:
  TORCHWELD_INLINE Tile(const TileSource& source, unsigned char* memory)
      : source_(source), memory_(memory), warp_(static_cast<int>(threadIdx.x) / 32) {
    const TilePlace at(blockIdx.x, tiles_of(source.row_count, Shape::kRows),
                       tiles_of(source.panel_count, Shape::kPanels));
    row_ = at.row * Shape::kRows;
    panel_ = at.column * Shape::kPanels;
  }

  static int64_t blocks(const TileSource& source) {
    return tiles_of(source.row_count, Shape::kRows) * tiles_of(source.panel_count, Shape::kPanels);
  }

  // The warp's first panel of a set, and first row of a tile.
  TORCHWELD_INLINE int64_t panel(int set) const {
    return panel_ + 2 * (warp_ % Shape::kWarpColumns * Shape::kSets + set);
  }
  TORCHWELD_INLINE int row_in_block(int tile) const {
    return (warp_ / Shape::kWarpColumns * Shape::kTiles + tile) * kTokens;
  }

  // multiply(weights, activations) for all steps, in the order of k.
  template <class F>
  TORCHWELD_INLINE void for_each_step(const F& multiply) {
    const int plane_stages =
        static_cast<int>((source_.units + Shape::kStageUnits - 1) / Shape::kStageUnits);
    const int stages = plane_stages * source_.planes;
    int plane = source_.planes - 1, in_plane = 0;
    const auto copy_next = [&](int stage) {
      if (stage < stages) copy(stage % Shape::kStages, plane, in_plane);
      commit_copies();  // an empty one where nothing is left, so that counts stay right
      if (++in_plane == plane_stages) in_plane = 0, --plane;
    };
    for (int stage = 0; stage < Shape::kStages - 1; ++stage) copy_next(stage);
    for (int stage = 0; stage < stages; ++stage) {
      wait_for_copies<Shape::kStages - 2>();
      __syncthreads();
      copy_next(stage + Shape::kStages - 1);  // over the stage all have just left
      const unsigned char* from = memory_ + stage % Shape::kStages * Shape::kStageBytes;
#pragma unroll
      for (int step = 0; step < Shape::kStageUnits / kUnitsOfStep; ++step) {
        Word weights[Shape::kSets];
        uint32_t activations[Shape::kTiles][2];
        load(from, step, weights, activations);
        multiply(weights, activations);
      }
    }
  }

  // sums(set, tile, which, four) gives the lane's sums in row 2 t + `which`.
  template <class F>
  TORCHWELD_INLINE void finish(const LinearEnd& end, int64_t columns, const F& sums) {
    wait_for_copies<0>();
    auto* out = reinterpret_cast<float*>(memory_);
    const int first = warp_ / Shape::kWarpColumns * kTokens + 2 * lane_.t;
    const int column = warp_ % Shape::kWarpColumns * Shape::kSets * kStepColumns + 4 * lane_.g;
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; ++tile) {
      __syncthreads();
#pragma unroll
      for (int set = 0; set < Shape::kSets; ++set) {
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          float four[4];
          sums(set, tile, which, four);
          store_four(out + (first + which) * Shape::kOutStride + column + set * kStepColumns, 4,
                     four);
        }
      }
      __syncthreads();
      write(end, columns, tile, out);
    }
  }

 private:
  // A word of 16 bytes lies where eight lanes find eight words in different banks.
  static TORCHWELD_INLINE int place(int line, int word) { return 16 * (word ^ (line & 2)); }

  TORCHWELD_INLINE void copy(int slot, int plane, int stage) const {
    unsigned char* weights = memory_ + slot * Shape::kStageBytes;
    unsigned char* rows = weights + Shape::kPanels * Shape::kPanelBytes;
    const int64_t first = static_cast<int64_t>(stage) * Shape::kStageUnits;
    constexpr int kWords = Shape::kPanels * Shape::kPanelBytes / 16;
    static_assert(kWords % Shape::kThreads == 0);
#pragma unroll
    for (int i = 0; i < kWords / Shape::kThreads; ++i) {
      const int at = i * Shape::kThreads + static_cast<int>(threadIdx.x);
      const int panel = at / 32, unit = at / 4 % 8, word = at % 4;
      const bool exists = panel_ + panel < source_.panel_count && first + unit < source_.units;
      const int64_t of = ((panel_ + panel) * source_.units + first + unit) * kUnitBytes + word * 16;
      copy_async(weights + panel * Shape::kPanelBytes + unit * kUnitBytes + place(unit, word),
                 static_cast<const unsigned char*>(source_.panels) + (exists ? of : 0), exists);
    }
    constexpr int kRowWords = Shape::kRows * Shape::kRowBytes / 16;
    static_assert(kRowWords % Shape::kThreads == 0);
#pragma unroll
    for (int i = 0; i < kRowWords / Shape::kThreads; ++i) {
      const int at = i * Shape::kThreads + static_cast<int>(threadIdx.x);
      const int row = at / 4, word = at % 4;
      const int64_t in_row = first / 2 + word;
      const bool exists = row_ + row < source_.row_count && in_row < source_.row_words;
      const int64_t of =
          plane * source_.plane_bytes + (row_ + row) * source_.row_bytes + in_row * 16;
      copy_async(rows + row * Shape::kRowBytes + place(row, word),
                 static_cast<const unsigned char*>(source_.rows) + (exists ? of : 0), exists);
    }
  }

  TORCHWELD_INLINE void load(const unsigned char* from, int step, Word (&weights)[Shape::kSets],
                             uint32_t (&activations)[Shape::kTiles][2]) const {
    const int unit = step * kUnitsOfStep + lane_.t;
#pragma unroll
    for (int set = 0; set < Shape::kSets; ++set) {
      const int panel = 2 * (warp_ % Shape::kWarpColumns * Shape::kSets + set) + lane_.panel;
      weights[set] = *reinterpret_cast<const Word*>(from + panel * Shape::kPanelBytes +
                                                    unit * kUnitBytes + place(unit, lane_.chunk));
    }
    const unsigned char* rows = from + Shape::kPanels * Shape::kPanelBytes;
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; ++tile) {
      const int row = row_in_block(tile) + lane_.g;
      load_unit(rows + row * Shape::kRowBytes + place(row, unit / 2) + unit % 2 * 8, true,
                activations[tile]);
    }
  }

  // The rows of one tile of all warps.
  TORCHWELD_INLINE void write(const LinearEnd& end, int64_t columns, int tile,
                              const float* out) const {
    constexpr int kFours = Shape::kColumns / 4;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < Shape::kOutRows * kFours;
         i += Shape::kThreads) {
      const int of = i / kFours, four = i % kFours;
      const int64_t row = row_ + (of / kTokens * Shape::kTiles + tile) * kTokens + of % kTokens;
      const FourColumns to(end, panel_ * 16 + 4 * four, columns);
      if (row >= source_.row_count || to.count <= 0) continue;
      float sums[4];
      memcpy(sums, out + of * Shape::kOutStride + 4 * four, sizeof sums);
      to.finish(end, row, sums);
    }
  }

  const TileSource& source_;
  unsigned char* memory_;
  StepLane lane_;
  int warp_;
  int64_t row_, panel_;
};

// For the choice see linear_path.h.
using LargeTile = TileShape<2, 2, 4>;  // 128 columns x 128 rows
using SmallTile = TileShape<1, 2, 2>;  // 64 columns x 64 rows

}  // namespace torchweld::kernels::cuda
