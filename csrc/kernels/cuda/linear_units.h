// Packed weights as tensor cores read them. Memory of a panel is a row of units of 64 bytes: for
// each of 16 columns one word, which holds an octet of 4-bit or a quad of 8-bit weights. What a
// unit meets of a row of activations is 8 bytes in either case: eight int8, or four 16-bit floats.
//
// The weight is the left factor of mma, its columns in the rows there; activations are the right
// one. A step is four units of two panels, 512 bytes: lane = 4 g + t loads 16 of them, the words of
// four neighbouring columns 4 (g % 4).. of panel g / 4 in unit t. These are the lane's registers
// of two products: row g has the first column and row g + 8 the second one, then the third and
// the fourth. Which k stands where is the weight's own affair as long as the activations, 8 bytes
// at unit t of the row g, stand likewise. So weights go from memory to tensor cores without a
// shuffle, and the lane ends up with the sums of its four columns in the rows 2 t and 2 t + 1.
#pragma once

#include "kernels/cuda/launch.h"
#include "kernels/cuda/mma.h"

namespace torchweld::kernels::cuda {

inline constexpr int kUnitBytes = 64;
inline constexpr int kUnitsOfStep = 4;
inline constexpr int kStepColumns = 32;
inline constexpr int kTokens = 8;  // rows of activations in one product

// Where a lane stands in a warp's step.
struct StepLane {
  TORCHWELD_INLINE StepLane()
      : g(static_cast<int>(threadIdx.x) % 32 / 4),
        t(static_cast<int>(threadIdx.x) % 4),
        panel(g / 4),
        chunk(g % 4) {}
  int g, t, panel, chunk;
};

// The sums of a lane's four columns in two rows.
template <class Sum>
struct StepSums {
  Sum of[2][4] = {};  // [product][register]

  TORCHWELD_INLINE void row(int which, Sum (&to)[4]) const {
    to[0] = of[0][which];
    to[1] = of[0][which + 2];
    to[2] = of[1][which];
    to[3] = of[1][which + 2];
  }
};

// A right factor: 8 bytes, and 0 where there are none.
TORCHWELD_INLINE void load_unit(const void* from, bool exists, uint32_t (&to)[2]) {
  uint2 words{0, 0};
  if (exists) words = *static_cast<const uint2*>(from);
  to[0] = words.x;
  to[1] = words.y;
}

// The weights of a step: read once, so not kept in the first cache.
TORCHWELD_INLINE Word load_weights(const void* from, bool exists) {
  return exists ? __ldcg(static_cast<const Word*>(from)) : Word{0, 0, 0, 0};
}

// --- words to left factors -----------------------------------------------------------------------

// Octets: the low halves of the bytes are a quad, the high ones the next.
struct Int4Weights {
  using Sum = int32_t;
  static TORCHWELD_INLINE void expand(uint32_t first, uint32_t second, uint32_t (&a)[4]) {
    a[0] = first & 0x0f0f0f0fu;
    a[1] = second & 0x0f0f0f0fu;
    a[2] = first >> 4 & 0x0f0f0f0fu;
    a[3] = second >> 4 & 0x0f0f0f0fu;
  }
  static TORCHWELD_INLINE void multiply(Sum (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
    mma_s8(d, a, b);
  }
};

// a + b of pairs of 16-bit floats.
#if defined(__CUDACC__)
TORCHWELD_INLINE uint32_t add_bf16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return result;
}
TORCHWELD_INLINE uint32_t add_f16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
#else
template <class T>
uint32_t add_pairs(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t x) { return to_vec(T{static_cast<uint16_t>(x)}); };
  const uint32_t low = from_vec<T>(half(a) + half(b)).bits;
  return low | static_cast<uint32_t>(from_vec<T>(half(a >> 16) + half(b >> 16)).bits) << 16;
}
inline uint32_t add_bf16x2(uint32_t a, uint32_t b) { return add_pairs<BFloat16>(a, b); }
inline uint32_t add_f16x2(uint32_t a, uint32_t b) { return add_pairs<Float16>(a, b); }
#endif

// Bytes to 16-bit floats, exactly: as the last bits of a number whose last bit counts 1, less that
// number.
template <class T>
struct Int8Weights {
  using Sum = float;
  static TORCHWELD_INLINE void expand(uint32_t first, uint32_t second, uint32_t (&a)[4]) {
    convert(first, a[0], a[2]);
    convert(second, a[1], a[3]);
  }
  static TORCHWELD_INLINE void multiply(Sum (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
    if constexpr (__is_same(T, Float16)) {
      mma_f16(d, a, b);
    } else {
      mma_bf16(d, a, b);
    }
  }

 private:
  // The first two bytes, and the last two.
  static TORCHWELD_INLINE void convert(uint32_t bytes, uint32_t& low, uint32_t& high) {
    if constexpr (__is_same(T, Float16)) {
      // 1024 + (x + 128), and -1152.
      const uint32_t shifted = bytes ^ 0x80808080u;
      low = add_f16x2(__byte_perm(shifted, 0x64646464u, 0x4140), 0xe480e480u);
      high = add_f16x2(__byte_perm(shifted, 0x64646464u, 0x4342), 0xe480e480u);
    } else {
      // 128 + the last seven bits, and -128, or -256 if the sign is set.
      const uint32_t digits = bytes & 0x7f7f7f7fu, signs = bytes & 0x80808080u;
      low = add_bf16x2(__byte_perm(digits, 0x43434343u, 0x4140),
                       __byte_perm(signs, 0xc3c3c3c3u, 0x4140));
      high = add_bf16x2(__byte_perm(digits, 0x43434343u, 0x4342),
                        __byte_perm(signs, 0xc3c3c3c3u, 0x4342));
    }
  }
};

// The eight bits of a bfloat16 that x and y begin with, in the halves of a word; what is left of
// them stays, exactly. Of infinities and NaN nothing is.
TORCHWELD_INLINE uint32_t take_pair(float& x, float& y) {
  constexpr uint32_t kBits = 0xffff0000u, kQuiet = 0x400000u;
  const uint32_t first = (bits_of(x) | (x != x ? kQuiet : 0)) & kBits;
  const uint32_t second = (bits_of(y) | (y != y ? kQuiet : 0)) & kBits;
  const auto rest = [](float from, uint32_t bits) {
    return (bits & 0x7f800000u) == 0x7f800000u ? 0.0f : from - float_of(bits);
  };
  x = rest(x, first);
  y = rest(y, second);
  return first >> 16 | second;
}

// The two products of a step.
template <class Weights>
struct StepWeights {
  TORCHWELD_INLINE explicit StepWeights(Word words) {
    Weights::expand(words.x, words.y, a[0]);
    Weights::expand(words.z, words.w, a[1]);
  }
  TORCHWELD_INLINE void multiply(const uint32_t (&b)[2],
                                 StepSums<typename Weights::Sum>& sums) const {
    Weights::multiply(sums.of[0], a[0], b);
    Weights::multiply(sums.of[1], a[1], b);
  }
  uint32_t a[2][4];
};

}  // namespace torchweld::kernels::cuda
