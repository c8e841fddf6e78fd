// Which kernel makes a product of a linear layer: the one rule of all of them.
//
// Up to kFewRows rows the weight is read once by as many warps as it takes to keep memory busy, and
// no tile is filled. From there on tensor cores decide, and each kind of tile has a price: its
// area over the rate at which a multiprocessor multiplies it, times how often the multiprocessors
// must take one. Rates are products per clock, by reasoning, not yet measured: of 4096 that wgmma
// reaches for int8, 60 %, bounded by what the second cache delivers, so more for the tile that
// reads less; of 2048 that mma.sync reaches, half for a tile of 128 x 128, and a third for one of
// 64 x 64. `python -m benchmarks.cuda_linear_rule` fits them to measured times.
//
// Where there are fewer tiles than half the multiprocessors, integers may be summed by several
// blocks for each: K is split, and a second kernel adds the parts. That costs a launch and the
// parts' way through memory, about as much as kLeastTileK of a tile, or kLeastFewK of few rows.
//
// The float sums of a weight-only layer are not split: their bits depend on the number of rows
// alone.
#pragma once

#include <stdint.h>

namespace torchweld::kernels::cuda {

constexpr int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

enum class LinearPath { few_rows, small_tiles, large_tiles, warpgroups, wide_warpgroups };
inline constexpr const char* kLinearPathNames[] = {"few_rows", "small_tiles", "large_tiles",
                                                   "warpgroups", "wide_warpgroups"};

inline constexpr int64_t kFewRows = 32;

struct LinearDevice {
  int multiprocessors;
  bool has_wgmma;  // compute capability 9.0, and a build with sm_90a
};

struct LinearTileKind {
  LinearPath path;
  int64_t rows, columns, products_per_clock;
};
inline constexpr LinearTileKind kLinearTiles[] = {
    {LinearPath::small_tiles, 64, 64, 700},
    {LinearPath::large_tiles, 128, 128, 1100},
    {LinearPath::warpgroups, 128, 128, 2200},
    {LinearPath::wide_warpgroups, 256, 128, 2600},
};

constexpr bool takes(LinearPath path, int64_t rows, const LinearDevice& device) {
  if (path == LinearPath::few_rows) return rows <= kFewRows;
  const bool needs_wgmma = path == LinearPath::warpgroups || path == LinearPath::wide_warpgroups;
  return device.has_wgmma || !needs_wgmma;
}

constexpr int64_t tiles_of(const LinearTileKind& kind, int64_t rows, int64_t columns) {
  return tiles_of(rows, kind.rows) * tiles_of(columns, kind.columns);
}

constexpr LinearPath choose_tiles(int64_t rows, int64_t columns, const LinearDevice& device) {
  LinearPath best = LinearPath::small_tiles;
  double least = -1;
  for (const LinearTileKind& kind : kLinearTiles) {
    if (!takes(kind.path, rows, device)) continue;
    const int64_t turns = tiles_of(tiles_of(kind, rows, columns), device.multiprocessors);
    const double price = static_cast<double>(turns * kind.rows * kind.columns) /
                         static_cast<double>(kind.products_per_clock);
    if (least < 0 || price < least) least = price, best = kind.path;
  }
  return best;
}

constexpr LinearPath choose_path(int64_t rows, int64_t columns, const LinearDevice& device) {
  return rows <= kFewRows ? LinearPath::few_rows : choose_tiles(rows, columns, device);
}

inline constexpr int64_t kFewColumns = 32;  // of a block, on the path of few rows
inline constexpr int64_t kLeastTileK = 512, kLeastFewK = 4096, kMostSplits = 16;

constexpr int64_t choose_splits(LinearPath path, int64_t rows, int64_t columns, int64_t k,
                                const LinearDevice& device) {
  int64_t blocks = tiles_of(columns, kFewColumns), least_k = kLeastFewK;
  for (const LinearTileKind& kind : kLinearTiles) {
    if (kind.path == path) blocks = tiles_of(kind, rows, columns), least_k = kLeastTileK;
  }
  if (blocks == 0) return 1;
  const int64_t idle = device.multiprocessors / blocks, long_enough = k / least_k;
  const int64_t most = idle < long_enough ? idle : long_enough;
  return most < 2 ? 1 : most < kMostSplits ? most : kMostSplits;
}

}  // namespace torchweld::kernels::cuda
