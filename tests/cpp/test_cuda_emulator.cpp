// The CUDA emulator itself: what a test of a kernel rests on.
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

namespace {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) {
  cudaLaunchConfig_t config{grid, block, 0, nullptr};
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

__global__ void number_threads(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned place = block * blockDim.x * blockDim.y * blockDim.z + thread;
  out[place] += static_cast<int>(place);
}

void check_every_thread_runs_once() {
  std::vector<int> out(2 * 3 * 4 * 5 * 3 * 2);
  CHECK(launch(number_threads, {2, 3, 4}, {5, 3, 2}, out.data()) == cudaSuccess, "launch");
  for (size_t i = 0; i < out.size(); ++i) CHECK(out[i] == static_cast<int>(i), "thread %zu", i);
  CHECK(launch(number_threads, {1}, {1025}, out.data()) != cudaSuccess, "too many threads");
  CHECK(launch(number_threads, {0}, {1}, out.data()) != cudaSuccess, "no blocks");
}

// Through shared memory: wrong at the first barrier that does not hold all.
__global__ void reverse_twice(const int* in, int* out) {
  __shared__ int shared[96];
  const unsigned i = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    shared[i] = round == 0 ? in[i] : out[i];
    __syncthreads();
    out[i] = shared[95 - i] + 1;
    __syncthreads();
  }
}

void check_barriers() {
  std::vector<int> in(96), out(96);
  for (int i = 0; i < 96; ++i) in[i] = i * i;
  launch(reverse_twice, {1}, {96}, in.data(), out.data());
  for (int i = 0; i < 96; ++i) CHECK(out[i] == i * i + 2, "element %d", i);
}

// Halves of a warp go around a loop different numbers of times.
__global__ void sum_of_half_warps(float* sums, int* votes) {
  const unsigned lane = threadIdx.x % 32, mask = 0xffffu << (lane & 16);
  for (unsigned round = 0; round <= threadIdx.x / 16; ++round) {
    float sum = static_cast<float>(threadIdx.x + round);
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(mask, sum, step);
    sums[threadIdx.x] = sum;
  }
  if (threadIdx.x < 32) {
    votes[lane] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
    votes[lane] += __any_sync(0xffffffffu, lane == 31) + __all_sync(0xffffffffu, lane < 31);
    votes[lane] += __shfl_sync(0xffffffffu, static_cast<int>(lane), 7);
    votes[lane] += static_cast<int>(__shfl_down_sync(0xffffffffu, lane, 30));
  }
}

void check_warps() {
  std::vector<float> sums(64);
  std::vector<int> votes(32);
  launch(sum_of_half_warps, {1}, {64}, sums.data(), votes.data());
  for (int i = 0; i < 64; ++i) {
    const int half = i / 16;
    CHECK(sums[i] == 16 * 16 * half + 120 + 16 * half, "thread %d: %g", i, sums[i]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int down = lane < 2 ? lane + 30 : lane;
    CHECK(votes[lane] == 0x49249249 + 1 + 7 + down, "lane %d: %x", lane, votes[lane]);
  }
}

__global__ void count(int* total, int* largest) {
  atomicAdd(total, 1);
  atomicMax(largest, static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x));
}

void check_atomics() {
  int total = 0, largest = 0;
  launch(count, {3}, {40}, &total, &largest);
  CHECK(total == 120 && largest == 119, "%d, %d", total, largest);
}

__global__ void wait_for_nobody() {
  if (threadIdx.x == 0) __shfl_sync(3u, 1, 0);
}

__global__ void write_beyond(char* out) { out[threadIdx.x] = 1; }

// Whether the process dies of a launch.
template <class F>
bool dies(const F& f) {
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    f();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

void check_faults_are_found() {
  CHECK(dies([] { launch(wait_for_nobody, {1}, {2}); }), "a lane that never comes");
#if defined(__SANITIZE_ADDRESS__)
  std::vector<char> out(31);
  CHECK(dies([&] { launch(write_beyond, {1}, {32}, out.data()); }), "a write out of range");
#else
  (void)write_beyond;
#endif
}

void check_halves() {
  for (unsigned bits = 0; bits < 0x7c00; ++bits) {
    const float value = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    CHECK(__half_as_ushort(__float2half_rn(value)) == bits, "%x", bits);
  }
  const auto rounded = [](float x) { return __half_as_ushort(__float2half_rn(x)); };
  CHECK(rounded(1 + 0x1p-11f) == 0x3c00 && rounded(1 + 0x3p-11f) == 0x3c02, "ties to even");
  CHECK(rounded(-65519.0f) == 0xfbff && rounded(-65520.0f) == 0xfc00, "overflow");
  CHECK(rounded(0x1p-14f - 0x1p-26f) == 0x0400 && rounded(-0x1p-25f) == 0x8000, "subnormals");
  CHECK(std::isnan(__half2float(__float2half_rn(NAN))) && rounded(INFINITY) == 0x7c00,
        "no numbers");
}

}  // namespace

int main() {
  check_every_thread_runs_once();
  check_barriers();
  check_warps();
  check_atomics();
  check_faults_are_found();
  check_halves();
}
