// Loops over torch's own threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "ops/torch_compat.h"

namespace torchweld::ops {

// The threads parallel_for splits its range over.
inline int64_t get_num_threads() { return torch::stable::get_num_threads(); }

// What is left of one worker's share of a range. It takes from the front; others, when theirs is
// done, from the back.
class alignas(64) Share {
 public:
  void set(int64_t begin, int64_t end) { left_ = pack(begin, end); }

  // Takes half of what is left, at least `grain`; false if there is nothing.
  bool take(int64_t grain, bool from_front, int64_t& begin, int64_t& end) {
    uint64_t left = left_.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t first = static_cast<int64_t>(left >> 32), last = left & 0xffffffff;
      if (first >= last) return false;
      const int64_t count = std::min(last - first, std::max(grain, (last - first) / 2));
      begin = from_front ? first : last - count;
      end = begin + count;
      const uint64_t rest = from_front ? pack(end, last) : pack(first, begin);
      if (left_.compare_exchange_weak(left, rest, std::memory_order_relaxed)) return true;
    }
  }

 private:
  static uint64_t pack(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }
  std::atomic<uint64_t> left_{0};
};

// f(begin, end) over [0, size) on torch's own threads, in parts of at least `grain`. Every thread
// begins with a share of its own, the same one in every loop of that size, and helps the others
// when it is done: tasks differ, and so do the cores of a busy machine. What f computes must not
// depend on the parts, and it must not throw: an exception cannot leave a worker thread.
template <class F>
void parallel_for(int64_t size, int64_t grain, const F& f) {
  if (size <= 0) return;
  grain = std::max<int64_t>(1, grain);
  const int64_t workers = std::min(get_num_threads(), (size + grain - 1) / grain);
  if (workers <= 1) return f(int64_t{0}, size);
  if (size >= int64_t{1} << 32) {
    torch::stable::parallel_for(0, size, grain, f);
    return;
  }
  std::vector<Share> shares(workers);
  for (int64_t w = 0; w < workers; ++w) {
    shares[w].set(size * w / workers, size * (w + 1) / workers);
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      int64_t begin, end;
      for (int64_t k = 0; k < workers; ++k) {
        Share& share = shares[(worker + k) % workers];
        while (share.take(grain, k == 0, begin, end)) f(begin, end);
      }
    }
  });
}

}  // namespace torchweld::ops
