// A sum of squares in double whose order of additions, and with it the result, is the same on every
// instruction set.
#pragma once

#include "kernels/cpu/vec.h"

namespace torchweld::kernels::TORCHWELD_ISA {

// Element i goes into partial sum i % kSize whatever the register width.
template <class T>
class SquareSums {
 public:
  static constexpr int kSize = 32;  // four registers of the widest set: enough to hide an addition
  static constexpr int kRegisters = kSize / Math<T>::kLanes;

  // `x` holds the elements of register `r` of kRegisters.
  void add(int r, typename Math<T>::Vec x) {
    VecD wide[kWide];
    widen(x, wide);
    for (int j = 0; j < kWide; ++j) add_square(sums_[r * kWide + j], wide[j]);
  }

  // Squares of differences of two floats, which are exact in double.
  void add_difference(int r, typename Math<T>::Vec x, typename Math<T>::Vec y) {
    VecD a[kWide], b[kWide];
    widen(x, a);
    widen(y, b);
    for (int j = 0; j < kWide; ++j) add_square(sums_[r * kWide + j], a[j] - b[j]);
  }

  // Sum l + n is added to sum l for n = kSize / 2, ..., 1: whole registers first.
  double total() const {
    VecD sums[kVectors];
    memcpy(sums, sums_, sizeof sums);
    for (int n = kVectors / 2; n > 0; n /= 2) {
      for (int r = 0; r < n; ++r) sums[r] += sums[r + n];
    }
    double lanes[kLanesD];
    memcpy(lanes, sums, sizeof lanes);
    for (int n = kLanesD / 2; n > 0; n /= 2) {
      for (int l = 0; l < n; ++l) lanes[l] += lanes[l + n];
    }
    return lanes[0];
  }

 private:
  static void add_square(VecD& sum, VecD x) { sum = fma(x, x, sum); }

  static constexpr int kWide = sizeof(typename Math<T>::Scalar) == 8 ? 1 : 2;  // VecD to a register
  static constexpr int kVectors = kSize / kLanesD;
  VecD sums_[kVectors] = {};
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
