#include "kernels/winograd.h"

#include "kernels/cpu/loop.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

// The points +-kA and +-kB, and the factors of their rows of G.
inline constexpr double kA = 0.75, kB = 1.5;
inline constexpr double kA2 = kA * kA, kB2 = kB * kB;
inline constexpr double kG0 = 1 / (kA2 * kB2);
inline constexpr double kGA = 1 / (2 * kA2 * (kA2 - kB2));
inline constexpr double kGB = 1 / (2 * kB2 * (kB2 - kA2));

__attribute__((always_inline)) inline VecF constant(double value) {
  return broadcast<VecF>((float)value);
}

// A pointer the compiler is to compute where it is used. It would keep all 36 places of a tile's
// points, in memory for want of registers, and read each back just before its use.
template <class T>
__attribute__((always_inline)) inline T* apart(T* p) {
  asm volatile("" : "+r"(p));
  return p;
}

// Half transformed values beyond this many do not fit into registers.
inline constexpr int kRegisters = 24;

// Each struct is one constant matrix: kTo values from kFrom.
struct Input {  // B^T
  static constexpr int kFrom = 6, kTo = 6;
  // 36 values are more than there are registers: two rows at a time, those that share most.
  static constexpr int kParts = 3;
  static constexpr int kRows[kParts][2] = {{1, 2}, {3, 4}, {0, 5}};

  template <int kPart>
  static void part(const VecF* d, VecF* v) {
    if constexpr (kPart == 2) {
      const VecF sum = constant(-kA2 - kB2), product = constant(kA2 * kB2);
      v[0] = fma(product, d[0], fma(sum, d[2], d[4]));
      v[1] = fma(product, d[1], fma(sum, d[3], d[5]));
    } else {
      // The rows of +-kA vanish at +-kB, and the other way round.
      const VecF root = constant(kPart == 0 ? -kB2 : -kA2);
      const VecF even = fma(root, d[2], d[4]);
      const VecF odd = constant(kPart == 0 ? kA : kB) * fma(root, d[1], d[3]);
      v[0] = even + odd;
      v[1] = even - odd;
    }
  }
  static void apply(const VecF* d, VecF* v) {
    part<0>(d, v + 1);
    part<1>(d, v + 3);
    VecF ends[2];
    part<2>(d, ends);
    v[0] = ends[0];
    v[5] = ends[1];
  }
};

struct Output {  // A^T
  static constexpr int kFrom = 6, kTo = 4;
  static void apply(const VecF* m, VecF* y) {
    const VecF even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const VecF even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = fma(constant(kB), odd_b, constant(kA) * odd_a);
    y[2] = fma(constant(kB2), even_b, constant(kA2) * even_a);
    y[3] = fma(constant(kB2 * kB), odd_b, fma(constant(kA2 * kA), odd_a, m[5]));
  }
};

struct GradOutput {  // A
  static constexpr int kFrom = 4, kTo = 6;
  static void apply(const VecF* g, VecF* v) {
    const VecF even_a = fma(constant(kA2), g[2], g[0]);
    const VecF odd_a = constant(kA) * fma(constant(kA2), g[3], g[1]);
    const VecF even_b = fma(constant(kB2), g[2], g[0]);
    const VecF odd_b = constant(kB) * fma(constant(kB2), g[3], g[1]);
    v[0] = g[0];
    v[1] = even_a + odd_a;
    v[2] = even_a - odd_a;
    v[3] = even_b + odd_b;
    v[4] = even_b - odd_b;
    v[5] = g[3];
  }
};

struct Weight {  // G
  static constexpr int kFrom = 3, kTo = 6;
  static void apply(const VecF* w, VecF* u) {
    const VecF even_a = constant(kGA) * fma(constant(kA2), w[2], w[0]);
    const VecF odd_a = constant(kGA * kA) * w[1];
    const VecF even_b = constant(kGB) * fma(constant(kB2), w[2], w[0]);
    const VecF odd_b = constant(kGB * kB) * w[1];
    u[0] = constant(kG0) * w[0];
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = w[2];
  }
};

struct GradWeight {  // G^T
  static constexpr int kFrom = 6, kTo = 3;
  static void apply(const VecF* u, VecF* w) {
    const VecF even_a = constant(kGA) * (u[1] + u[2]), odd_a = constant(kGA * kA) * (u[1] - u[2]);
    const VecF even_b = constant(kGB) * (u[3] + u[4]), odd_b = constant(kGB * kB) * (u[3] - u[4]);
    w[0] = fma(constant(kG0), u[0], even_a + even_b);
    w[1] = odd_a + odd_b;
    w[2] = fma(constant(kA2), even_a, fma(constant(kB2), even_b, u[5]));
  }
};

// store(i, row) for each row of M x M^T, with x(i, j) = load(i, j).
template <class M, class Load, class Store>
__attribute__((always_inline)) inline void transform(const Load& load, const Store& store) {
  VecF half[M::kTo][M::kFrom];
#pragma GCC unroll 6
  for (int j = 0; j < M::kFrom; ++j) {
    VecF from[M::kFrom], to[M::kTo];
#pragma GCC unroll 6
    for (int i = 0; i < M::kFrom; ++i) from[i] = load(i, j);
    M::apply(from, to);
#pragma GCC unroll 6
    for (int i = 0; i < M::kTo; ++i) half[i][j] = to[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < M::kTo; ++i) {
    VecF to[M::kTo];
    M::apply(half[i], to);
    store(i, to);
  }
}

// The same by parts of M, of two rows each: to read again costs less than to put away.
template <class M, int kPart = 0, class Load, class Store>
__attribute__((always_inline)) inline void transform_parts(const Load& load, const Store& store) {
  VecF half[2][M::kFrom];
#pragma GCC unroll 6
  for (int j = 0; j < M::kFrom; ++j) {
    VecF from[M::kFrom], to[2];
#pragma GCC unroll 6
    for (int i = 0; i < M::kFrom; ++i) from[i] = load(i, j);
    M::template part<kPart>(from, to);
    half[0][j] = to[0];
    half[1][j] = to[1];
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    VecF to[M::kTo];
    M::apply(half[i], to);
    store(M::kRows[kPart][i], to);
  }
  if constexpr (kPart + 1 < M::kParts) transform_parts<M, kPart + 1>(load, store);
}

// Channels between two looks at which pixels of a window lie outside its image.
inline constexpr int64_t kChunk = 64;

// f(i, j, floats from the image's first pixel, whether it is inside) for the pixels of a window.
template <int kSize, class F>
__attribute__((always_inline)) inline void for_each_pixel(const WinogradWindow& w, const F& f) {
  const int64_t line = w.width * w.pixel;
  int64_t first = w.y * line + w.x * w.pixel;
#pragma GCC unroll 6
  for (int i = 0; i < kSize; ++i, first += line) {
    // Below zero is far above as an unsigned number.
    const bool row = (uint64_t)(w.y + i) < (uint64_t)w.height;
#pragma GCC unroll 6
    for (int j = 0; j < kSize; ++j) {
      const bool column = (uint64_t)(w.x + j) < (uint64_t)w.width;
      f(i, j, first + j * w.pixel, row & column);
    }
  }
}

// Where the pixels of a window lie, or zeros for those outside.
template <class M, class T>
struct Patch {
  const T* pixels[M::kFrom][M::kFrom];
};

template <class M, class T, class P>
__attribute__((always_inline)) inline void gather(const Patch<M, T>& patch, int64_t c, P part,
                                                  float* points, int64_t point) {
  const auto load_at = [&](int i, int j) __attribute__((always_inline)) {
    return load(patch.pixels[i][j] + c, part);
  };
  const auto store_row = [=](int i, const VecF* row) __attribute__((always_inline)) {
    float* to = apart(points + i * M::kTo * point);
#pragma GCC unroll 6
    for (int j = 0; j < M::kTo; ++j) store(to + j * point, row[j], part);
  };
  if constexpr (M::kTo * M::kFrom > kRegisters) {
    transform_parts<M>(load_at, store_row);
  } else {
    transform<M>(load_at, store_row);
  }
}

template <class M, class T>
void gather(const T* image, const WinogradWindow& window, int64_t channels, float* points,
            int64_t point) {
  static const T zeros[kChunk] __attribute__((aligned(64))) = {};
  for (int64_t chunk = 0; chunk < channels; chunk += kChunk) {
    const int64_t size = channels - chunk < kChunk ? channels - chunk : kChunk;
    Patch<M, T> patch;
    for_each_pixel<M::kFrom>(window, [&](int i, int j, int64_t at, bool is_inside) {
      patch.pixels[i][j] = is_inside ? image + chunk + at : zeros;
    });
    int64_t c = 0;
    for (; c + kLanesF <= size; c += kLanesF) {
      gather<M>(patch, c, Whole{}, points + chunk + c, point);
    }
    if (c < size) gather<M>(patch, c, Part{size - c}, points + chunk + c, point);
  }
}

// Where the pixels of a tile go; those outside the image nowhere.
template <class T>
struct Places {
  T* pixels[Output::kTo][Output::kTo];
  const T* residual[Output::kTo][Output::kTo];
};

template <bool kResidual, class T, class P>
__attribute__((always_inline)) inline void scatter(const float* points, int64_t point,
                                                   const Places<T>& places, int64_t c, P part,
                                                   VecF bias, VecF low, VecF high, int64_t ahead) {
  transform<Output>(
      [=](int i, int j) __attribute__((always_inline)) {
        return load(apart(points + j * point) + i * Output::kFrom * point, part);
      },
      [&](int i, const VecF* row) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int j = 0; j < Output::kTo; ++j) {
          T* to = places.pixels[i][j] + c;
          __builtin_prefetch(to + ahead, 1);
          VecF v = row[j] + bias;
          if (kResidual) v += load(places.residual[i][j] + c, part);
          v = min(high, max(low, v));  // in this order of operands a NaN passes
          store(to, v, part);
        }
      });
}

template <bool kResidual, class T>
void scatter(const float* points, int64_t point, int64_t channels, T* image,
             const WinogradWindow& window, const EpilogueOf<T>& epilogue) {
  const VecF low = broadcast<VecF>(epilogue.low), high = broadcast<VecF>(epilogue.high);
  const float* bias = epilogue.bias;
  // The window after the next in a row.
  const int64_t ahead = 2 * kWinogradTile * window.pixel;
  for (int64_t chunk = 0; chunk < channels; chunk += kChunk) {
    const int64_t size = channels - chunk < kChunk ? channels - chunk : kChunk;
    Places<T> places;
    T nowhere[kChunk];
    for_each_pixel<Output::kTo>(window, [&](int i, int j, int64_t at, bool is_inside) {
      places.pixels[i][j] = is_inside ? image + chunk + at : nowhere;
      if (kResidual) places.residual[i][j] = is_inside ? epilogue.residual + chunk + at : nowhere;
    });
    int64_t c = 0;
    for (; c + kLanesF <= size; c += kLanesF) {
      scatter<kResidual>(points + chunk + c, point, places, c, Whole{},
                         bias != nullptr ? load(bias + chunk + c) : VecF{}, low, high, ahead);
    }
    if (c < size) {
      const Part part{size - c};
      scatter<kResidual>(points + chunk + c, point, places, c, part,
                         bias != nullptr ? load(bias + chunk + c, part) : VecF{}, low, high, ahead);
    }
  }
}

template <class T>
void scatter(const float* points, int64_t point, int64_t channels, T* image,
             const WinogradWindow& window, const EpilogueOf<T>& epilogue) {
  if (epilogue.residual != nullptr) {
    scatter<true>(points, point, channels, image, window, epilogue);
  } else {
    scatter<false>(points, point, channels, image, window, epilogue);
  }
}

template <class P>
__attribute__((always_inline)) inline void weight(const float* from, const WinogradTaps& taps,
                                                  float* to, int64_t point, P part) {
  const int64_t vertical = taps.vertical, horizontal = taps.horizontal;
  transform<Weight>(
      [=](int i, int j) __attribute__((always_inline)) {
        return load(from + (i * vertical + j * horizontal), part);
      },
      [=](int i, const VecF* row) __attribute__((always_inline)) {
        float* at = to + i * Weight::kTo * point;
#pragma GCC unroll 6
        for (int j = 0; j < Weight::kTo; ++j, at += point) store(at, row[j]);
      });
}

void weight(const float* weights, const WinogradTaps& taps, int64_t rows, int64_t columns,
            float* points, int64_t point, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = weights + r * taps.row;
    float* to = points + r * width;
    int64_t j = 0;
    for (; j + kLanesF <= columns; j += kLanesF) weight(from + j, taps, to + j, point, Whole{});
    for (; j < width; j += kLanesF) {
      weight(from + j, taps, to + j, point, Part{columns > j ? columns - j : 0});
    }
  }
}

template <class P>
__attribute__((always_inline)) inline void grad_weight(const float* from, int64_t point, float* to,
                                                       const WinogradTaps& taps, P part) {
  const int64_t vertical = taps.vertical, horizontal = taps.horizontal;
  transform<GradWeight>(
      [=](int i, int j) __attribute__((always_inline)) {
        return load(from + (i * GradWeight::kFrom + j) * point, part);
      },
      [=](int i, const VecF* row) __attribute__((always_inline)) {
        for (int j = 0; j < GradWeight::kTo; ++j) {
          store(to + (i * vertical + j * horizontal), row[j], part);
        }
      });
}

void grad_weight(const float* points, int64_t point, int64_t rows, int64_t columns, float* weights,
                 const WinogradTaps& taps) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = points + r * columns;
    float* to = weights + r * taps.row;
    int64_t j = 0;
    for (; j + kLanesF <= columns; j += kLanesF) {
      grad_weight(from + j, point, to + j, taps, Whole{});
    }
    if (j < columns) grad_weight(from + j, point, to + j, taps, Part{columns - j});
  }
}

}  // namespace

extern const WinogradKernels winograd;
const WinogradKernels winograd{
    .input = gather<Input, float>,
    .input_bf16 = gather<Input, BFloat16>,
    .grad_output = gather<GradOutput, float>,
    .output = scatter<float>,
    .output_bf16 = scatter<BFloat16>,
    .weight = weight,
    .grad_weight = grad_weight,
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
