// Which tile of a product a block makes.
#pragma once

#include "kernels/cuda/lane.h"
#include "kernels/cuda/linear_path.h"

namespace torchweld::kernels::cuda {

// Neighbours in a band of kBand rows of tiles run at about the same time, and find what they share
// in the second cache.
struct TilePlace {
  static constexpr int64_t kBand = 8;

  TORCHWELD_INLINE TilePlace(int64_t block, int64_t down, int64_t across) {
    const int64_t first = block / (kBand * across) * kBand;
    const int64_t height = down - first < kBand ? down - first : kBand;
    const int64_t in_band = block % (kBand * across);
    row = first + in_band % height;
    column = in_band / height;
  }
  int64_t row, column;  // of tiles
};

}  // namespace torchweld::kernels::cuda
