// The tables of a step on CUDA as the host makes them: without torch, so that they can be tested
// where there is no GPU.
#pragma once

#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/cuda/adamw.h"
#include "ops/overlap.h"

namespace torchweld::ops {

// Elements of a chunk such that `elements` fill a device of `multiprocessors`, with the tables and
// the start of a block still of no weight: a power of two.
inline int64_t adamw_chunk_size(int64_t elements, int multiprocessors) {
  // Eight blocks of threads are at work on a multiprocessor at a time, and several rounds of them
  // even out that the last one is not full.
  constexpr int64_t kBlocks = 8 * 4, kMost = 1 << 15;
  int64_t size = kernels::cuda::kAdamWLeastChunk;
  while (size < kMost && elements / (2 * size) >= kBlocks * multiprocessors) size *= 2;
  return size;
}

// Cuts tensors into chunks: the tables that launch_chunks() makes one of, which begins with chunk
// number `first`.
class ChunkRuns {
 public:
  explicit ChunkRuns(int64_t chunk_size, int64_t first = 0)
      : chunk_size_(chunk_size), end_(first) {}

  void add(size_t tensor, int64_t size) {
    const int64_t count = (size + chunk_size_ - 1) / chunk_size_;
    if (count == 0) return;
    runs_.push_back({end_, static_cast<int32_t>(tensor), static_cast<int32_t>(count)});
    end_ += count;
  }

  const std::vector<kernels::cuda::ChunkRun>& runs() const { return runs_; }
  int64_t end() const { return end_; }

 private:
  int64_t chunk_size_, end_;
  std::vector<kernels::cuda::ChunkRun> runs_;
};

// What one launch steps: `count` chunks from `first` on.
struct AdamWBatch {
  kernels::cuda::AdamWKind kind;
  int64_t first, count;
  std::optional<size_t> tensor;  // the only one, where parameters share memory
};

// Chunks of all tensors, those of one kind together; where parameters share memory, those of one
// tensor: launches run one after the other, as stock steps parameters. `params`: where they lie;
// `sizes`: elements.
inline std::vector<AdamWBatch> batches_of(const std::vector<MemoryRange>& params,
                                          const std::vector<int64_t>& sizes,
                                          const std::vector<kernels::cuda::AdamWKind>& kinds,
                                          ChunkRuns& runs) {
  const bool one_by_one = overlap(params);
  std::vector<AdamWBatch> batches;
  std::vector<char> done(kinds.size());
  for (size_t k = 0; k < kinds.size(); ++k) {
    if (done[k]) continue;
    const int64_t first = runs.end();
    const size_t end = one_by_one ? k + 1 : kinds.size();
    for (size_t other = k; other < end; ++other) {
      if (done[other] || !(kinds[other] == kinds[k])) continue;
      done[other] = 1;
      runs.add(other, sizes[other]);
    }
    if (runs.end() == first) continue;
    batches.push_back({kinds[k], first, runs.end() - first, std::nullopt});
    if (one_by_one) batches.back().tensor = k;
  }
  return batches;
}

// Tables that lie behind one another on a device, as words.
using Words = std::vector<uint64_t>;

static_assert(std::has_unique_object_representations_v<kernels::cuda::Values> &&
              std::has_unique_object_representations_v<kernels::cuda::AdamWTensor> &&
              std::has_unique_object_representations_v<kernels::cuda::ChunkRun>);

template <class T>
void append(Words& words, const std::vector<T>& table) {
  static_assert(sizeof(T) % sizeof(uint64_t) == 0 && alignof(T) <= alignof(uint64_t));
  const size_t at = words.size();
  words.resize(at + table.size() * (sizeof(T) / sizeof(uint64_t)));
  if (!table.empty()) std::memcpy(&words[at], table.data(), table.size() * sizeof(T));
}

// The words [first, last) outside of which both are the same; all of them where the sizes differ.
inline std::pair<size_t, size_t> changed(const Words& before, const Words& now) {
  size_t first = 0, last = now.size();
  if (before.size() != now.size()) return {first, last};
  while (first < last && before[first] == now[first]) ++first;
  while (first < last && before[last - 1] == now[last - 1]) --last;
  return {first, last};
}

}  // namespace torchweld::ops
