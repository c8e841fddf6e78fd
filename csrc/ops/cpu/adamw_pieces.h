// A list of tensors as one line of elements, cut into pieces for threads.
#pragma once

#include <algorithm>
#include <vector>

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
  // of few elements stays on one thread. `descending`: each thread from its last piece to its
  // first. f must not throw.
  template <class F>
  void for_each(bool descending, const F& f) const {
    parallel_for(end_, kGrain, [&](int64_t begin, int64_t end) {
      const int64_t first =
          std::upper_bound(places_.begin(), places_.end(), begin) - places_.begin() - 1;
      const int64_t last = std::lower_bound(places_.begin(), places_.end(), end) - places_.begin();
      for (int64_t i = first; i < last; ++i) {
        const int64_t t = descending ? last - 1 - (i - first) : i;
        for_pieces(static_cast<size_t>(t), begin, end, descending, f);
      }
    });
  }

 private:
  // Elements worth a thread of their own.
  static constexpr int64_t kGrain = 1 << 15;
  // What a tensor costs whatever its size, in elements.
  static constexpr int64_t kTensorCost = 256;

  template <class F>
  void for_pieces(size_t t, int64_t begin, int64_t end, bool descending, const F& f) const {
    // A piece belongs to the range its first element lies in.
    const auto reached = [&](int64_t place) {
      const int64_t pieces = (place - places_[t] + piece_ - 1) / piece_;
      return std::clamp<int64_t>(pieces, 0, (sizes_[t] + piece_ - 1) / piece_);
    };
    const int64_t first = reached(std::max(begin, places_[t])), last = reached(end);
    for (int64_t i = first; i < last; ++i) {
      const int64_t k = descending ? last - 1 - (i - first) : i;
      const int64_t at = k * piece_;
      f(t, at, std::min(piece_, sizes_[t] - at), firsts_[t] + k);
    }
  }

  int64_t piece_, count_ = 0, end_ = 0;
  std::vector<int64_t> sizes_, places_, firsts_;
};

}  // namespace torchweld::ops
