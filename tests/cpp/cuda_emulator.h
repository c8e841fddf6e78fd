// Runs CUDA sources on the CPU, as they stand: this directory's cuda_emulator/ comes before CUDA's
// headers, and a test includes the .cu file. Test equipment, as small as it can be: one block at a
// time, its threads as fibers that run until they wait for one another. It knows what our kernels
// use of CUDA and no more; add to it what a new one needs.
//
// A wrong kernel is caught here where it touches memory it should not (AddressSanitizer), where
// threads wait for one that never comes, and where results differ from the CPU's. Data races inside
// a block show only if they change a result in the order of the fibers; memory models, speed and
// limits of a device (registers, shared memory, grids past 2^31) do not show at all.
#pragma once

#include <ucontext.h>

#include <any>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time; not cleared between them, as on a device

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};
using cudaStream_t = struct CUstream_st*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulator {

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

constexpr unsigned kWarp = 32;

// The asynchronous copies of 16 bytes of a thread, in groups, made only when they are waited for.
class Copies {
 public:
  void start(void* to, const void* from) {  // null: zeros
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) {
      std::fprintf(stderr, "CUDA emulator: a copy that is not aligned\n");
      std::abort();
    }
    next_.push_back({to, from});
  }
  void commit() { groups_.push_back(std::exchange(next_, {})); }
  void wait(size_t groups_left) {
    while (groups_.size() > groups_left) {
      for (const Copy& copy : groups_.front()) {
        if (copy.from == nullptr) {
          std::memset(copy.to, 0, 16);
        } else {
          std::memcpy(copy.to, copy.from, 16);
        }
        landed_.push_back(copy.to);
      }
      groups_.pop_front();
    }
  }
  // Where copies have been made since the last time.
  std::vector<void*> landed() { return std::exchange(landed_, {}); }

 private:
  struct Copy {
    void* to;
    const void* from;
  };
  std::vector<Copy> next_;
  std::deque<std::vector<Copy>> groups_;
  std::vector<void*> landed_;
};

class Block {
 public:
  Block(dim3 size, size_t shared, const std::function<void()>& body)
      : body_(body),
        size_(size),
        shared_(std::aligned_alloc(16, (shared + 15) / 16 * 16), std::free),
        async_view_(shared),
        fibers_(size.x * size.y * size.z) {}

  void run() {
    current = this;
    for (size_t i = 0; i < fibers_.size(); ++i) start(i);
    for (size_t left = fibers_.size(); left > 0;) {
      moved_ = false;
      for (size_t i = 0; i < fibers_.size(); ++i) {
        if (fibers_[i].done) continue;
        at_ = i;
        set_thread();
        enter(i);
        if (fibers_[i].done) --left, moved_ = true;
      }
      if (!moved_) fail("threads wait for others that have ended or wait elsewhere");
    }
    current = nullptr;
  }

  // Until all threads of the block that have not ended are here.
  void wait_for_block() {
    Fiber& self = fibers_[at_];
    const unsigned generation = ++self.barriers;
    moved_ = true;
    wait([&] {
      for (const Fiber& other : fibers_) {
        if (!other.done && other.barriers < generation) return false;
      }
      return true;
    });
  }

  using Values = std::array<uint64_t, kWarp>;

  // Gives `value` to the lanes of `mask`, which all must come here; returns theirs by lane.
  const Values& exchange(unsigned mask, uint64_t value) {
    Fiber& self = fibers_[at_];
    const size_t first = at_ / kWarp * kWarp;
    if ((mask >> (at_ % kWarp) & 1) == 0) fail("a lane that is not in its mask");
    self.given = value;
    self.waits_for = mask;
    moved_ = true;
    if (all_wait(mask, first)) {
      // The last to come hands out the values and lets all go.
      Values values{};
      for_lanes(mask, first, [&](size_t lane, Fiber& fiber) { values[lane] = fiber.given; });
      for_lanes(mask, first, [&](size_t, Fiber& fiber) {
        fiber.received = values;
        fiber.waits_for = 0;
      });
    }
    wait([&] { return self.waits_for == 0; });
    return self.received;
  }

  unsigned lane() const { return at_ % kWarp; }

  Copies& copies() { return fibers_[at_].copies; }

  // What a header keeps for each thread.
  template <class T>
  T& own() {
    std::any& own = fibers_[at_].own;
    if (!own.has_value()) own.emplace<T>();
    return *std::any_cast<T>(&own);
  }

  // Dynamic shared memory, not cleared.
  unsigned char* shared() const { return static_cast<unsigned char*>(shared_.get()); }
  // The same as what does not go through threads sees it: as of their last fence.
  std::vector<unsigned char>& async_view() { return async_view_; }

  static inline Block* current = nullptr;

  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "CUDA emulator: %s\n", what);
    std::abort();
  }

 private:
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
    unsigned barriers = 0;
    unsigned waits_for = 0;  // the mask of the exchange it is in
    uint64_t given = 0;
    Values received;
    Copies copies;
    std::any own;
    void* fake_stack = nullptr;
  };
  static constexpr size_t kStack = 1 << 16;

  template <class F>
  void for_lanes(unsigned mask, size_t first, const F& f) {
    for (size_t lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      if (first + lane >= fibers_.size()) fail("a mask with a lane beyond the block");
      f(lane, fibers_[first + lane]);
    }
  }

  bool all_wait(unsigned mask, size_t first) {
    bool all = true;
    for_lanes(mask, first, [&](size_t, Fiber& fiber) { all = all && fiber.waits_for == mask; });
    return all;
  }

  template <class Condition>
  void wait(const Condition& condition) {
    while (!condition()) leave();
    moved_ = true;
  }

  void set_thread() const {
    const auto i = static_cast<unsigned>(at_);
    threadIdx = {i % size_.x, i / size_.x % size_.y, i / size_.x / size_.y};
  }

  void start(size_t i) {
    Fiber& fiber = fibers_[i];
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, [] { current->main(); }, 0);
  }

  void main() {
    entered();
    body_();
    fibers_[at_].done = true;
    leave();
  }

  // AddressSanitizer is told of every change of the stack.
  void enter([[maybe_unused]] size_t i) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack_, fibers_[i].stack.get(), kStack);
#endif
    swapcontext(&scheduler_, &fibers_[i].context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
  }
  void entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fibers_[at_].fake_stack, &scheduler_stack_, &scheduler_size_);
#endif
  }
  void leave() {
    Fiber& fiber = fibers_[at_];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, scheduler_stack_,
                                   scheduler_size_);
#endif
    swapcontext(&fiber.context, &scheduler_);
    entered();
  }

  const std::function<void()>& body_;
  dim3 size_;
  std::unique_ptr<void, void (*)(void*)> shared_;
  std::vector<unsigned char> async_view_;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
  size_t at_ = 0;
  bool moved_ = false;
  [[maybe_unused]] void* scheduler_fake_stack_ = nullptr;
  [[maybe_unused]] const void* scheduler_stack_ = nullptr;
  [[maybe_unused]] size_t scheduler_size_ = 0;
};

template <class T>
T shuffle(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t other = Block::current->exchange(mask, bits)[from % kWarp];
  std::memcpy(&value, &other, sizeof value);
  return value;
}

}  // namespace cuda_emulator

// --- launches ------------------------------------------------------------------------------------
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*)(Params...), cudaFuncAttribute, int bytes) {
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;  // an H100's
}

template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Given&&... args) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x * grid.y * grid.z == 0 || block.x * block.y * block.z - 1u >= 1024u) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = grid;
  blockDim = block;
  const std::function<void()> body = [&] { kernel(args...); };
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        cuda_emulator::Block(block, config->dynamicSmemBytes, body).run();
      }
    }
  }
  return cudaSuccess;
}

// --- what threads do together --------------------------------------------------------------------
inline void __syncthreads() { cuda_emulator::Block::current->wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_emulator::Block::current->exchange(mask, 0);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return cuda_emulator::shuffle(mask, value, static_cast<unsigned>(from));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  const unsigned lane = cuda_emulator::Block::current->lane();
  return cuda_emulator::shuffle(mask, value, lane ^ static_cast<unsigned>(lanes));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
  const unsigned lane = cuda_emulator::Block::current->lane();
  return cuda_emulator::shuffle(mask, value, lane + lanes < 32 ? lane + lanes : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto& votes = cuda_emulator::Block::current->exchange(mask, predicate != 0);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(votes[lane]) << lane;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

template <class T>
T atomicAdd(T* to, T value) {
  const T old = *to;
  *to = old + value;
  return old;
}
template <class T>
T atomicMax(T* to, T value) {
  const T old = *to;
  if (value > old) *to = value;
  return old;
}

// --- intrinsics ----------------------------------------------------------------------------------
inline unsigned __float_as_uint(float x) { return cuda_emulator::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return cuda_emulator::bit_cast<float>(x); }
inline double __longlong_as_double(long long x) { return cuda_emulator::bit_cast<double>(x); }
// Bytes of y:x, one for each digit of the selector.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return result;
}
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return sum;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
void __stcg(T* to, T value) {
  *to = value;
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
