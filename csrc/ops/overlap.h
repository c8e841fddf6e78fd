// Whether tensors share memory.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

namespace torchweld::ops {

// Where a tensor lies: from the first byte to behind the last one.
using MemoryRange = std::pair<const char*, const char*>;

// Whether two of them share memory.
inline bool overlap(std::vector<MemoryRange> ranges) {
  std::sort(ranges.begin(), ranges.end());
  for (size_t k = 1; k < ranges.size(); ++k) {
    if (ranges[k].first < ranges[k - 1].second) return true;
  }
  return false;
}

}  // namespace torchweld::ops
