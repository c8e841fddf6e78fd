// A list of tensors as one line of elements, cut into pieces for threads.
#pragma once

#include <algorithm>
#include <vector>

#include "ops/parallel.h"
#include "ops/torch_compat.h"

namespace torchweld::ops {

// Cuts run through the elements and not between tensors: that serves a thousand biases as well as
// one embedding. Where a piece begins and ends depends on sizes alone, never on threads.
class Pieces {
 public:
  // `piece`: the most elements of one.
  explicit Pieces(int64_t piece) : piece_(piece) {}

  void add(int64_t size) {
    sizes_.push_back(size);
    places_.push_back(end_);
    firsts_.push_back(count_);
    count_ += (size + piece_ - 1) / piece_;
    end_ += size + kTensorCost;
  }

  int64_t count() const { return count_; }

  // f(tensor, begin, size, number of the piece) for every piece, in one parallel region; a model
  // of few elements stays on one thread. f must not throw.
  template <class F>
  void for_each(const F& f) const {
    parallel_for(end_, kGrain, [&](int64_t begin, int64_t end) { for_range(begin, end, f); });
  }
  // Likewise for the pieces of one tensor.
  template <class F>
  void for_each_of(size_t tensor, const F& f) const {
    const int64_t place = places_[tensor];
    parallel_for(sizes_[tensor], kGrain,
                 [&](int64_t begin, int64_t end) { for_range(place + begin, place + end, f); });
  }

 private:
  // Elements worth a thread of their own.
  static constexpr int64_t kGrain = 1 << 15;
  // What a tensor costs whatever its size, in elements.
  static constexpr int64_t kTensorCost = 256;

  // The pieces that begin in [begin, end).
  template <class F>
  void for_range(int64_t begin, int64_t end, const F& f) const {
    if (places_.empty()) return;
    size_t t = std::upper_bound(places_.begin(), places_.end(), begin) - places_.begin() - 1;
    for (; t < places_.size() && places_[t] < end; ++t) {
      const int64_t first = (std::max(begin - places_[t], int64_t{0}) + piece_ - 1) / piece_;
      for (int64_t k = first; k * piece_ < std::min(sizes_[t], end - places_[t]); ++k) {
        const int64_t at = k * piece_;
        f(t, at, std::min(piece_, sizes_[t] - at), firsts_[t] + k);
      }
    }
  }

  int64_t piece_, count_ = 0, end_ = 0;
  std::vector<int64_t> sizes_, places_, firsts_;
};

}  // namespace torchweld::ops
