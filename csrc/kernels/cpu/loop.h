// A loop over a run of elements, a register at a time, its end included.
#pragma once

#include "kernels/cpu/vec.h"

namespace torchweld::kernels::TORCHWELD_ISA {

// Asks for what a pass will read some time later. The hardware's own prefetch stops at the end of a
// page, and a pass over two or three tensors reaches one all the time: reductions and gradients run
// up to twice as fast with this.
template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch((const char*)p + 8192);
}

// How much of a register a step of a loop uses: all of it, or the first `count` lanes.
struct Whole {};
struct Part {
  int64_t count;
};

template <class T>
inline auto load(const T* p, Whole) {
  return load(p);
}
template <class T>
inline auto load(const T* p, Part part) {
  return load_partial(p, part.count);
}
template <class T>
inline void store(T* p, typename Math<T>::Vec v, Whole) {
  store(p, v);
}
template <class T>
inline void store(T* p, typename Math<T>::Vec v, Part part) {
  store_partial(p, v, part.count);
}
template <class T>
inline void stream(T* p, typename Math<T>::Vec v, Whole) {
  stream(p, v);
}
template <class T>
inline void stream(T* p, typename Math<T>::Vec v, Part part) {
  store_partial(p, v, part.count);
}

// Zero in the lanes beyond the part.
template <class Vec>
inline Vec keep(Vec v, Whole) {
  return v;
}
template <class Vec>
inline Vec keep(Vec v, Part part) {
  for (int64_t i = part.count; i < (int64_t)(sizeof(v) / sizeof(v[0])); ++i) v[i] = 0;
  return v;
}

// Registers are taken in groups of 64 bytes of arithmetic type, however narrow they are: register p
// of a group has its own accumulator, so sums are formed in the same order on every instruction
// set.
inline constexpr int kGroup = 64 / kVectorBytes;

// f(offset, p, Whole or Part) over [0, size); p counts registers within a group.
template <int kLanes, class F>
__attribute__((always_inline)) inline void for_each_register(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + kGroup * kLanes <= size; i += kGroup * kLanes) {
#pragma GCC unroll 4
    for (int p = 0; p < kGroup; ++p) f(i + p * kLanes, p, Whole{});
  }
#pragma GCC unroll 4
  for (int p = 0; p < kGroup; ++p, i += kLanes) {
    if (i + kLanes <= size) {
      f(i, p, Whole{});
    } else if (i < size) {
      f(i, p, Part{size - i});
    }
  }
}

}  // namespace torchweld::kernels::TORCHWELD_ISA
