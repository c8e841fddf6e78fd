// Batch statistics of a channels_last tensor that is computed block by block, taken while a block
// is still in cache.
#pragma once

#include <cstdint>
#include <vector>

namespace torchweld::ops {

using Channels = std::vector<double>;  // one value per channel

// Values per channel, their mean, and the sum of squared deviations from it.
struct Moments {
  double count;
  Channels mean, m2;
};

class BlockMoments {
 public:
  // Before the first block: how many there will be.
  void start(int64_t blocks, int64_t channels);

  // Takes in `pixels` rows of `columns` channels from channel `first` on, `row` floats apart. Calls
  // for one block and channel must come from one thread, in an order fixed by the shape; different
  // blocks or channels may come at once. A block's channels come in the same panels every time, and
  // in the end all of them with as many pixels.
  void add(int64_t block, const float* data, int64_t pixels, int64_t row, int64_t first,
           int64_t columns);

  // The statistics of all blocks, merged in their order.
  Moments merged() const;

 private:
  int64_t blocks_ = 0;
  int64_t channels_ = 0;
  // Per block: count, mean and m2 of every channel.
  std::vector<double> partials_;
};

}  // namespace torchweld::ops
