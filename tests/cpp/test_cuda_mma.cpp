// The emulated tensor cores and asynchronous copies: what tests of kernels that use them rest on.
// Where a lane's registers lie in the matrices is written out here once more, from the PTX manual.
#include <vector>

#include "check.h"
#include "kernels/cuda/async.h"
#include "kernels/cuda/mma.h"
#include "kernels/cuda/wgmma.h"

using namespace torchweld::kernels;
using namespace torchweld::kernels::cuda;

namespace {

// "mma.m16n8k32" for .s8: a_i of lane: row = groupID for i in [0, 4) or [8, 12), groupID + 8
// otherwise; column = threadID_in_group * 4 + (i & 3), plus 16 from i = 8 on. b_i: row =
// threadID_in_group * 4 + (i & 3), plus 16 from i = 4 on; column = groupID. c_i: row = groupID,
// plus 8 from i = 2 on; column = threadID_in_group * 2 + (i & 1).
__global__ void multiply_bytes(const int8_t* a, const int8_t* b, int32_t* d) {
  const int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
  uint32_t ra[4] = {}, rb[2] = {};
  for (int i = 0; i < 16; ++i) {
    const int row = i < 4 || (i >= 8 && i < 12) ? group : group + 8;
    const int column = in_group * 4 + (i & 3) + (i >= 8 ? 16 : 0);
    ra[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(a[row * 32 + column])) << (i % 4 * 8);
  }
  for (int i = 0; i < 8; ++i) {
    const int row = in_group * 4 + (i & 3) + (i >= 4 ? 16 : 0);
    rb[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(b[row * 8 + group])) << (i % 4 * 8);
  }
  int32_t rd[4] = {1, 1, 1, 1};
  mma_s8(rd, ra, rb);
  for (int i = 0; i < 4; ++i) {
    d[(group + (i >= 2 ? 8 : 0)) * 8 + in_group * 2 + (i & 1)] = rd[i];
  }
}

// "mma.m16n8k16" for .f16 and .bf16: a_i: row = groupID for i in {0, 1, 4, 5}, plus 8 otherwise;
// column = threadID_in_group * 2 + (i & 1), plus 8 from i = 4 on. b_i: row = threadID_in_group * 2
// + (i & 1), plus 8 from i = 2 on; column = groupID.
template <bool kIsBFloat16>
__global__ void multiply_halves(const uint16_t* a, const uint16_t* b, float* d) {
  const int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
  uint32_t ra[4] = {}, rb[2] = {};
  for (int i = 0; i < 8; ++i) {
    const int row = i == 0 || i == 1 || i == 4 || i == 5 ? group : group + 8;
    const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    ra[i / 2] |= static_cast<uint32_t>(a[row * 16 + column]) << (i % 2 * 16);
  }
  for (int i = 0; i < 4; ++i) {
    const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
    rb[i / 2] |= static_cast<uint32_t>(b[row * 8 + group]) << (i % 2 * 16);
  }
  float rd[4] = {1, 1, 1, 1};
  kIsBFloat16 ? mma_bf16(rd, ra, rb) : mma_f16(rd, ra, rb);
  for (int i = 0; i < 4; ++i) {
    d[(group + (i >= 2 ? 8 : 0)) * 8 + in_group * 2 + (i & 1)] = rd[i];
  }
}

template <class A, class D, class Value>
void check_product(void (*kernel)(const A*, const A*, D*), int depth, const Value& encode) {
  const auto a_at = [](int row, int k) { return row * 3 - k * 5 % 17; };
  const auto b_at = [](int k, int column) { return k % 7 * 4 - column * 3; };
  std::vector<A> a(16 * depth), b(depth * 8);
  std::vector<D> d(16 * 8);
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) a[row * depth + k] = encode(a_at(row, k));
  }
  for (int k = 0; k < depth; ++k) {
    for (int column = 0; column < 8; ++column) b[k * 8 + column] = encode(b_at(k, column));
  }
  CHECK(launch(kernel, 1, 32, nullptr, a.data(), b.data(), d.data()) == cudaSuccess, "launch");
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      int sum = 1;
      for (int k = 0; k < depth; ++k) sum += a_at(row, k) * b_at(k, column);
      CHECK(d[row * 8 + column] == static_cast<D>(sum), "depth %d, row %d, column %d", depth, row,
            column);
    }
  }
}

// "wgmma.mma_async.m64nNk32", A in registers: a_i as mma.m16n8k32's, of the rows from 16 times the
// warp in its warpgroup on; d_i: row = that + groupID, plus 8 where i & 2; column = i / 4 * 8 +
// threadID_in_group * 2 + (i & 1). B, "K-major" with the 128-byte swizzle: a row of 128 bytes for
// each column, of whose 16-byte chunks the number is xored with that of the row, modulo 8, and the
// address of the atom of 8 rows is a multiple of 1024. Products of k from 0 to 31 and 96 to 127.
constexpr int kDepth = 128, kColumns = 128;
__global__ void multiply_async_bytes(const int8_t* a, const int8_t* b, int32_t* d) {
  TORCHWELD_DYNAMIC_SHARED(memory);
  const uint32_t address = (shared_address(memory) + 1023) / 1024 * 1024;
  unsigned char* rows = memory + (address - shared_address(memory));
  const int thread = threadIdx.x;
  for (int chunk = 0; chunk < 8; ++chunk) {
    copy_async(rows + thread / 8 * 1024 + thread % 8 * 128 + (chunk ^ thread % 8) * 16,
               b + thread * kDepth + chunk * 16, true);
  }
  commit_copies();
  wait_for_copies<0>();
  fence_shared();
  __syncthreads();
  const int first = thread / 32 * 16 + thread % 32 / 4, in_group = thread % 4;
  uint32_t ra[2][4] = {};
  for (int i = 0; i < 32; ++i) {
    const int row = first + (i % 16 < 4 || (i % 16 >= 8 && i % 16 < 12) ? 0 : 8);
    const int k = in_group * 4 + (i & 3) + (i % 16 >= 8 ? 16 : 0) + i / 16 * 96;
    ra[i / 16][i % 16 / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(a[row * kDepth + k]))
                              << (i % 4 * 8);
  }
  int32_t rd[kColumns / 2];
  for (int32_t& sum : rd) sum = 1;
  settle(rd);
  fence_registers();
  multiply_async(rd, ra[0], swizzled_rows(address));
  multiply_async(rd, ra[1], swizzled_rows(address + 96));
  commit_products();
  wait_for_products<0>();
  settle(rd);
  for (int i = 0; i < kColumns / 2; ++i) {
    const int row = first + (i & 2) * 4, column = i / 4 * 8 + in_group * 2 + (i & 1);
    d[row * kColumns + column] = rd[i];
  }
}

void check_warpgroup() {
  constexpr int kRows = 64;
  std::vector<int8_t> a(kRows * kDepth), b(kColumns * kDepth);
  std::vector<int32_t> d(kRows * kColumns);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<int8_t>(i * 37 % 251);
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<int8_t>(i * 91 % 253);
  CHECK(launch_with_shared(multiply_async_bytes, 1, kWarpgroup, kColumns * kDepth + 1024, nullptr,
                           a.data(), b.data(), d.data()) == cudaSuccess,
        "launch");
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      int sum = 1;
      for (int k = 0; k < kDepth; ++k) {
        if (k < 32 || k >= 96) sum += a[row * kDepth + k] * b[column * kDepth + k];
      }
      CHECK(d[row * kColumns + column] == sum, "row %d, column %d", row, column);
    }
  }
}

// Copies of group i must be there once at most kGroups - 1 - i are under way, and not before.
__global__ void copy(const uint32_t* from, uint32_t* seen) {
  TORCHWELD_DYNAMIC_SHARED(memory);
  auto* const words = reinterpret_cast<volatile uint32_t*>(memory);
  for (int i = 0; i < 12; ++i) words[i] = 99;
  for (int group = 0; group < 3; ++group) {
    copy_async(memory + group * 16, from + group * 4, group != 1);
    commit_copies();
  }
  wait_for_copies<2>();
  seen[0] = words[3];
  seen[1] = words[4];
  wait_for_copies<1>();
  seen[2] = words[4];
  seen[3] = words[11];
  wait_for_copies<0>();
  seen[4] = words[11];
}

void check_copies() {
  alignas(16) uint32_t from[12];
  for (uint32_t i = 0; i < 12; ++i) from[i] = i;
  uint32_t seen[5];
  CHECK(launch_with_shared(copy, 1, 1, 48, nullptr, from, seen) == cudaSuccess, "launch");
  const uint32_t expected[] = {3, 99, 0, 99, 11};
  for (int i = 0; i < 5; ++i) CHECK(seen[i] == expected[i], "%d: %u", i, seen[i]);
  CHECK(launch_with_shared(copy, 1, 1, 1 << 20, nullptr, from, seen) != cudaSuccess,
        "more shared memory than there is");
}

}  // namespace

int main() {
  check_product<int8_t, int32_t>(multiply_bytes, 32, [](int x) { return static_cast<int8_t>(x); });
  check_product<uint16_t, float>(multiply_halves<true>, 16, [](int x) {
    return from_vec<BFloat16>(static_cast<float>(x)).bits;
  });
  check_product<uint16_t, float>(multiply_halves<false>, 16, [](int x) {
    return from_vec<Float16>(static_cast<float>(x)).bits;
  });
  check_warpgroup();
  check_copies();
}
