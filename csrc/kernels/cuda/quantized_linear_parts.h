// A share of K, for a block that is one of several that sum the same tile or columns.
#pragma once

#include "kernels/cuda/quantized_linear.h"
#include "kernels/cuda/tile_place.h"

namespace torchweld::kernels::cuda {

// `blocks` finish a product alone; with parts there are as many for each.
struct KPart {
  TORCHWELD_INLINE KPart(const QuantizedLinearParams& params, int64_t blocks)
      : splits(params.splits > 1 ? params.splits : 1),
        split(blockIdx.x / blocks),
        block(blockIdx.x % blocks) {}
  static int64_t blocks(const QuantizedLinearParams& params, int64_t alone) {
    return params.splits > 1 ? alone * params.splits : alone;
  }

  // Of `steps`, those of one of `sharers` of this part; `index` says which.
  TORCHWELD_INLINE int64_t begin(int64_t steps, int64_t sharers = 1, int64_t index = 0) const {
    return steps * (split * sharers + index) / (splits * sharers);
  }
  TORCHWELD_INLINE int64_t end(int64_t steps, int64_t sharers = 1, int64_t index = 0) const {
    return begin(steps, sharers, index + 1);
  }

  // Where the sums go.
  TORCHWELD_INLINE LinearEnd end_of(const QuantizedLinearParams& params) const {
    LinearEnd result = params.end;
    if (splits > 1) {
      result.of.output = params.parts + split * params.rows * params.columns;
      result.of.output_stride = params.columns;
      result.stores_sums = true;
    }
    return result;
  }

  int64_t splits, split, block;
};

}  // namespace torchweld::kernels::cuda
