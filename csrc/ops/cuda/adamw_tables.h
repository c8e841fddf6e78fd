// The tables of a step on CUDA: filled on the host, then brought to the device.
#pragma once

#include <utility>
#include <vector>

#include "kernels/cuda/adamw.h"
#include "ops/adamw.h"
#include "ops/cuda/context.h"

namespace torchweld::ops {

// Cuts tensors into chunks: the tables that launch_chunks() makes one of.
class ChunkRuns {
 public:
  explicit ChunkRuns(int64_t chunk_size) : chunk_size_(chunk_size) {}

  void add(size_t tensor, int64_t size) {
    const int64_t count = (size + chunk_size_ - 1) / chunk_size_;
    if (count == 0) return;
    runs_.push_back({count_, static_cast<int32_t>(tensor), static_cast<int32_t>(count)});
    count_ += count;
  }

  const std::vector<kernels::cuda::ChunkRun>& runs() const { return runs_; }
  int64_t count() const { return count_; }
  int64_t chunk_size() const { return chunk_size_; }

 private:
  int64_t chunk_size_, count_ = 0;
  std::vector<kernels::cuda::ChunkRun> runs_;
};

// What one launch steps: `count` chunks from `first` on.
struct AdamWBatch {
  kernels::cuda::AdamWKind kind;
  int64_t first, count;
};

// Whether two parameters do.
inline bool share_memory(const std::vector<kernels::cuda::AdamWTensor>& tensors,
                         const std::vector<kernels::cuda::AdamWKind>& kinds) {
  std::vector<MemoryRange> ranges;
  for (size_t k = 0; k < tensors.size(); ++k) {
    const auto* begin = static_cast<const char*>(tensors[k].span.param);
    const auto bytes = tensors[k].span.size * static_cast<int64_t>(size_of(kinds[k].param));
    if (bytes > 0) ranges.emplace_back(begin, begin + bytes);
  }
  return overlap(std::move(ranges));
}

// Chunks of all tensors, those of one kind together; where parameters share memory, those of one
// tensor: launches run one after the other, as stock steps parameters.
inline std::vector<AdamWBatch> batches_of(const std::vector<kernels::cuda::AdamWTensor>& tensors,
                                          const std::vector<kernels::cuda::AdamWKind>& kinds,
                                          ChunkRuns& runs) {
  const bool one_by_one = share_memory(tensors, kinds);
  std::vector<AdamWBatch> batches;
  std::vector<char> done(kinds.size());
  for (size_t k = 0; k < kinds.size(); ++k) {
    if (done[k]) continue;
    const int64_t first = runs.count();
    const size_t end = one_by_one ? k + 1 : kinds.size();
    for (size_t other = k; other < end; ++other) {
      if (done[other] || !(kinds[other] == kinds[k])) continue;
      done[other] = 1;
      runs.add(other, tensors[other].span.size);
    }
    if (runs.count() > first) batches.push_back({kinds[k], first, runs.count() - first});
  }
  return batches;
}

// Copies a vector to a place of its own; see launch_write().
template <class T>
void write(const CudaContext& context, T* to, const std::vector<T>& from) {
  static_assert(sizeof(T) % 8 == 0);
  context.check(kernels::cuda::launch_write(
      to, from.data(), static_cast<int64_t>(from.size() * sizeof(T)), context.stream()));
}

}  // namespace torchweld::ops
