// Copies from global to shared memory that go on while a thread computes, and shared memory of a
// size the launch decides.
#pragma once

#include "kernels/cuda/launch.h"

#if defined(__CUDACC__)

// Declares `name`, the shared memory a launch asked for: bytes, aligned to 16.
#define TORCHWELD_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace torchweld::kernels::cuda {

// Starts to copy 16 bytes, both ends aligned; zeros if not `exists`, and `from` is not read then.
TORCHWELD_INLINE void copy_async(void* shared, const void* from, bool exists) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}

// Makes one group of the copies this thread has started since the last.
TORCHWELD_INLINE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most the kGroups groups committed last are under way. What other threads copied is there
// behind a barrier that follows.
template <int kGroups>
TORCHWELD_INLINE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace torchweld::kernels::cuda

#else
#include <emulated_async.h>
#endif

namespace torchweld::kernels::cuda {

// What a launch may ask for on every device that has these copies, beside some static memory. A
// kernel for certain devices may say more.
inline constexpr int64_t kMostShared = 96 << 10;
// Below this much, with any static memory beside it, no leave is needed.
inline constexpr int64_t kLeastShared = 40 << 10;

// As launch(), with dynamic shared memory. The leave is the same for all launches of a kernel: one
// for as much as this launch needs could come between those of another host thread.
template <int64_t kMost = kMostShared, class... Params>
cudaError_t launch_with_shared(void (*kernel)(Params...), int64_t blocks, int threads,
                               int64_t shared, cudaStream_t stream,
                               typename Same<Params>::Type... params) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX || shared > kMost) return cudaErrorInvalidConfiguration;
  if (shared > kLeastShared) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMost));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim.x = static_cast<unsigned>(blocks);
  config.blockDim.x = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace torchweld::kernels::cuda
