// Squares of registers, transposed.
#pragma once

#include "kernels/cpu/vec.h"

namespace torchweld::kernels::TORCHWELD_ISA {

// The lower, or upper, halves of two registers, lane by lane in turn.
inline VecF zip_low(VecF a, VecF b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}
inline VecF zip_high(VecF a, VecF b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// to[i * to_row + j] = from[j * from_row + i] for a square of registers: zipping the first half of
// the rows with the second, as often as halves can be halved. Words are moved, whatever they hold.
inline void transpose(const float* from, int64_t from_row, float* to, int64_t to_row) {
  VecF rows[kLanesF], zipped[kLanesF];
#pragma GCC unroll 16
  for (int j = 0; j < kLanesF; ++j) rows[j] = load(from + j * from_row);
#pragma GCC unroll 4
  for (int size = kLanesF; size > 1; size /= 2) {
#pragma GCC unroll 8
    for (int j = 0; j < kLanesF / 2; ++j) {
      zipped[2 * j] = zip_low(rows[j], rows[j + kLanesF / 2]);
      zipped[2 * j + 1] = zip_high(rows[j], rows[j + kLanesF / 2]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < kLanesF; ++j) rows[j] = zipped[j];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanesF; ++i) store(to + i * to_row, rows[i]);
}

}  // namespace torchweld::kernels::TORCHWELD_ISA
