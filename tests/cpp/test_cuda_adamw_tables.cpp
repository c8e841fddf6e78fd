// The tables of an AdamW step on CUDA, as the host makes them and brings them to the device.
#include "adamw_run.h"
#include "ops/cuda/adamw_batches.h"

using namespace torchweld::kernels;
using namespace torchweld::kernels::cuda;
using namespace torchweld::ops;

namespace {

void check_writes() {
  for (int64_t words : {1, 480, 481, 10000}) {
    Array<uint64_t> from(words), to(words);
    for (int64_t i = 0; i < words; ++i) from[i] = static_cast<uint64_t>(i * i + 1);
    CHECK(launch_write(&to[0], &from[0], 8 * words, nullptr) == cudaSuccess, "write");
    CHECK(to == from, "%ld words", static_cast<long>(words));
  }
  CHECK(launch_chunks(nullptr, 0, nullptr, nullptr) == cudaSuccess, "nothing to do");
}

void check_chunk_sizes() {
  constexpr int kMultiprocessors = 132;
  for (int64_t elements : {int64_t{1}, int64_t{1} << 20, int64_t{25'000'000}, int64_t{1} << 33}) {
    const int64_t size = adamw_chunk_size(elements, kMultiprocessors);
    CHECK(size % kAdamWBlock == 0 && size >= kAdamWLeastChunk && size <= 1 << 15, "%ld",
          static_cast<long>(size));
    const bool fills = (elements + size - 1) / size >= 8 * kMultiprocessors;
    CHECK(fills || size == kAdamWLeastChunk, "%ld elements", static_cast<long>(elements));
  }
  CHECK(adamw_chunk_size(1'000'000, kMultiprocessors) * 3 * kMultiprocessors < 1'000'000,
        "a small model has chunks for all");
  CHECK(adamw_chunk_size(int64_t{1} << 33, kMultiprocessors) == 1 << 15, "large chunks");
}

// Each element of each tensor is in one chunk, and chunks of one kind lie together.
void check_batches() {
  const AdamWKind plain{DType::float32, AdamWState::like_param, AdamWRounding::nearest, false};
  const AdamWKind other{DType::float64, AdamWState::like_param, AdamWRounding::nearest, false};
  const std::vector<AdamWKind> kinds{plain, other, plain, plain, other};
  const std::vector<int64_t> sizes{5000, 3, 0, 2048, 4097};
  const auto at = [](int64_t place) { return reinterpret_cast<const char*>(place << 20); };
  for (bool shared : {false, true}) {
    std::vector<MemoryRange> params;
    for (size_t t = 0; t < kinds.size(); ++t) {
      const char* begin = at(shared && t == 3 ? 1 : static_cast<int64_t>(t) + 1);
      params.emplace_back(begin, begin + sizes[t] * size_of(kinds[t].param));
    }
    ChunkRuns runs(2048, 10);
    const std::vector<AdamWBatch> batches = batches_of(params, sizes, kinds, runs);
    CHECK(batches.size() == (shared ? 4u : 2u), "%zu batches", batches.size());
    CHECK(runs.end() == 10 + 3 + 1 + 1 + 3, "%ld chunks", static_cast<long>(runs.end()));
    int64_t next = 10;
    for (const AdamWBatch& batch : batches) {
      CHECK(batch.first == next, "batches without gaps");
      CHECK(batch.tensor.has_value() == shared, "alone where memory is shared");
      next += batch.count;
      for (const ChunkRun& run : runs.runs()) {
        const bool inside = run.first >= batch.first && run.first < next;
        CHECK(!inside || kinds[static_cast<size_t>(run.tensor)] == batch.kind, "of one kind");
      }
    }
    CHECK(next == runs.end(), "all chunks are in a batch");
    for (const ChunkRun& run : runs.runs()) {
      CHECK((sizes[static_cast<size_t>(run.tensor)] + 2047) / 2048 == run.count, "all elements");
    }
  }
}

void check_changes() {
  const Words words{1, 2, 3, 4};
  const auto is = [&](const Words& now, size_t first, size_t last) {
    const auto found = changed(words, now);
    CHECK(found.first == first && found.second == last, "%zu, %zu", found.first, found.second);
  };
  is({1, 2, 3, 4}, 4, 4);
  is({1, 9, 3, 4}, 1, 2);
  is({9, 2, 3, 9}, 0, 4);
  is({1, 2, 3}, 0, 3);
  Words appended{7};
  append(appended, std::vector<Chunk>{{1, 2}, {3, 4}});
  CHECK(appended.size() == 3 && appended[0] == 7, "appended");
}

}  // namespace

int main() {
  check_writes();
  check_chunk_sizes();
  check_batches();
  check_changes();
}
