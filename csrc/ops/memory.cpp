#include "ops/memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

#include "ops/config.h"

namespace torchweld::ops {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct Block {
  char* data;
  size_t size;  // a multiple of kHugePage
};

void release(const Block& block) { munmap(block.data, block.size); }

// A block on a huge-page border; its data is null when there is no memory.
Block map(size_t size) {
  void* memory =
      mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return {nullptr, 0};
  char* begin = static_cast<char*>(memory);
  const size_t before = -reinterpret_cast<uintptr_t>(begin) & (kHugePage - 1);
  if (before > 0) munmap(begin, before);
  munmap(begin + before + size, kHugePage - before);
  madvise(begin + before, size, MADV_HUGEPAGE);
  return {begin + before, size};
}

class Pool {
 public:
  // A block of at least `size` bytes.
  Block take(size_t size) {
    size = (size + kHugePage - 1) / kHugePage * kHugePage;
    {
      const std::lock_guard lock(mutex_);
      // The last that fits: what was freed last is likeliest still in cache.
      for (size_t i = idle_.size(); i-- > 0;) {
        if (idle_[i].size < size || idle_[i].size > size + size / 8) continue;
        const Block block = idle_[i];
        idle_.erase(idle_.begin() + static_cast<ptrdiff_t>(i));
        held_ -= block.size;
        return block;
      }
    }
    const Block block = map(size);
    if (block.data) return block;
    trim(0);  // what lies idle may be what is missing
    return map(size);
  }

  void give_back(const Block& block) noexcept {
    try {
      const std::lock_guard lock(mutex_);
      idle_.push_back(block);
      held_ += block.size;
    } catch (const std::bad_alloc&) {
      release(block);
      return;
    }
    trim(static_cast<size_t>(config().memory_pool.load()));
  }

  // Releases what was freed longest ago, until no more than `most` bytes are held.
  void trim(size_t most) {
    const std::lock_guard lock(mutex_);
    size_t count = 0;
    for (; held_ > most; ++count) {
      held_ -= idle_[count].size;
      release(idle_[count]);
    }
    idle_.erase(idle_.begin(), idle_.begin() + static_cast<ptrdiff_t>(count));
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
  std::vector<Block> idle_;  // oldest first
  size_t held_ = 0;
};

Pool& pool() {
  // Never destroyed: torch may free a tensor after the library's static objects are gone.
  static Pool* const pool = new Pool;
  // A child has one thread, and nobody to unlock what another one held. fork() waits for that.
  [[maybe_unused]] static const int registered =
      pthread_atfork([] { pool->lock(); }, [] { pool->unlock(); }, [] { pool->unlock(); });
  return *pool;
}

}  // namespace

void trim_memory_pool() { pool().trim(static_cast<size_t>(config().memory_pool.load())); }

Tensor empty(const IntList& sizes, ScalarType type, torch::headeronly::MemoryFormat format) {
  const auto dtype = to_dtype(type);
  size_t bytes = dtype ? size_of(*dtype) : 1;  // others are bytes
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  IntList strides(sizes.size());
  if (format == torch::headeronly::MemoryFormat::ChannelsLast) {
    const int64_t c = std::max<int64_t>(sizes[1], 1), h = std::max<int64_t>(sizes[2], 1),
                  w = std::max<int64_t>(sizes[3], 1);
    strides = {c * h * w, 1, w * c, c};
  } else {
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) {
      strides[i] = stride;
    }
  }
  if (bytes >= kSmallestPooled && config().memory_pool > 0) {
    if (const Block block = pool().take(bytes); block.data) {
      return torch::stable::from_blob(block.data, sizes, strides,
                                      torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                      type, [block](void*) { pool().give_back(block); });
    }
  }
  // Not stable::empty, which looks its operator up by name with every call.
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace torchweld::ops
