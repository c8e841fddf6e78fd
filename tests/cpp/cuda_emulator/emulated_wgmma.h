// What kernels/cuda/wgmma.h says of the products of a warpgroup, on the emulator: made as late as
// they may be, from what is in registers and shared memory then, so that a kernel that does not
// wait, or writes too early, gets a wrong answer. Sums under way are hidden from the kernel. Of
// shared memory they see what was there at the fences of the threads that copied it.
#pragma once

#include <deque>
#include <map>

#include "kernels/cuda/lane.h"

namespace torchweld::kernels::cuda {

struct Product {
  int32_t* d;
  const uint32_t* a;
  uint64_t b;
  unsigned columns;
};

// Of one thread.
struct Products {
  std::vector<Product> next;
  std::deque<std::vector<Product>> groups;
  std::map<int32_t*, std::vector<int32_t>> sums;  // of what is under way
  bool are_registers_fenced = false;
};

inline cuda_emulator::Block& emulated_block() { return *cuda_emulator::Block::current; }
inline Products& own_products() { return emulated_block().own<Products>(); }

// As if other shared memory lay before: whoever needs an alignment must see to it.
inline constexpr uint32_t kSharedBegins = 1040;
inline uint32_t shared_address(const void* shared) {
  const auto* byte = static_cast<const unsigned char*>(shared);
  return static_cast<uint32_t>(byte - emulated_block().shared()) + kSharedBegins;
}

inline void fence_shared() {
  auto& block = emulated_block();
  for (void* to : block.copies().landed()) {
    const auto at = static_cast<unsigned char*>(to) - block.shared();
    std::memcpy(block.async_view().data() + at, to, 16);
  }
}

inline void fence_registers() { own_products().are_registers_fenced = true; }

template <int kSize>
void multiply_async(int32_t (&d)[kSize], const uint32_t (&a)[4], uint64_t b) {
  Products& own = own_products();
  if (!own.are_registers_fenced) emulated_block().fail("a product of registers without a fence");
  own.next.push_back({d, a, b, 2 * kSize});
  if (own.sums.count(d) == 0) {
    own.sums[d].assign(d, d + kSize);
    std::fill(d, d + kSize, 0x5a5a5a5a);
  }
}

inline void commit_products() {
  Products& own = own_products();
  own.groups.push_back(std::exchange(own.next, {}));
}

// The four k from `k` on of a column of B, as the PTX manual reads a descriptor: the bits of
// addresses and distances from the fifth on; 128-byte swizzle takes bits 7 to 9 of an address to
// its bits 4 to 6.
inline uint32_t word_of_rows(uint64_t descriptor, unsigned column, unsigned k) {
  auto& block = emulated_block();
  const auto field = [&](int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4;
  };
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
    block.fail("a descriptor of another kind");
  const uint32_t address = field(0) + column / 8 * field(32) + column % 8 * 128 + k;
  const uint32_t at = (address ^ (address >> 7 & 7) << 4) - kSharedBegins;
  if (at > block.async_view().size() - 4) block.fail("a product beyond shared memory");
  uint32_t word;
  std::memcpy(&word, block.async_view().data() + at, sizeof word);
  return word;
}

// `a` by lane: that of all k of a row is in four lanes, a quad of k in each word.
inline void emulated_product(const Product& product, int32_t* sums,
                             const std::array<const uint32_t*, 32>& a) {
  const unsigned lane = emulated_block().lane(), g = lane / 4, t = lane % 4;
  for (unsigned column = 0; column < product.columns; ++column) {
    if (column % 8 / 2 != t) continue;
    for (unsigned below = 0; below < 2; ++below) {
      int32_t& sum = sums[column / 8 * 4 + below * 2 + column % 2];
      for (unsigned word = 0; word < 8; ++word) {
        const uint32_t left = a[4 * g + word % 4][below + word / 4 * 2];
        sum = __dp4a(static_cast<int>(left),
                     static_cast<int>(word_of_rows(product.b, column, 4 * word)), sum);
      }
    }
  }
}

template <int kGroups>
void wait_for_products() {
  auto& block = emulated_block();
  Products& own = own_products();
  own.are_registers_fenced = false;
  while (own.groups.size() > kGroups) {
    const std::vector<Product> group = std::move(own.groups.front());
    own.groups.pop_front();
    // All lanes are here; none goes on before all have read its registers.
    const auto all = block.exchange(0xffffffffu, reinterpret_cast<uintptr_t>(&group));
    for (size_t i = 0; i < group.size(); ++i) {
      std::array<const uint32_t*, 32> a;
      for (size_t lane = 0; lane < 32; ++lane) {
        a[lane] = (*reinterpret_cast<const std::vector<Product>*>(all[lane]))[i].a;
      }
      emulated_product(group[i], own.sums[group[i].d].data(), a);
    }
    block.exchange(0xffffffffu, 0);
  }
  if (own.groups.empty() && own.next.empty()) {
    for (const auto& [d, sums] : own.sums) std::copy(sums.begin(), sums.end(), d);
    own.sums.clear();
  }
}

template <int kSize>
void settle(int32_t (&)[kSize]) {}

}  // namespace torchweld::kernels::cuda
