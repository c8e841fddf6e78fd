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

// Each struct is one constant matrix: kTo values from kFrom.
struct Input {  // B^T
  static constexpr int kFrom = 6, kTo = 6;
  static void apply(const VecF* d, VecF* v) {
    const VecF a2 = constant(-kA2), b2 = constant(-kB2);
    const VecF sum = constant(-kA2 - kB2), product = constant(kA2 * kB2);
    const VecF even_a = fma(b2, d[2], d[4]), odd_a = constant(kA) * fma(b2, d[1], d[3]);
    const VecF even_b = fma(a2, d[2], d[4]), odd_b = constant(kB) * fma(a2, d[1], d[3]);
    v[0] = fma(product, d[0], fma(sum, d[2], d[4]));
    v[1] = even_a + odd_a;
    v[2] = even_a - odd_a;
    v[3] = even_b + odd_b;
    v[4] = even_b - odd_b;
    v[5] = fma(product, d[1], fma(sum, d[3], d[5]));
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

// store(i, j, value) for each value of M x M^T, with x(i, j) = load(i, j).
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
#pragma GCC unroll 6
    for (int j = 0; j < M::kTo; ++j) store(i, j, to[j]);
  }
}

// f(first channel, Whole or Part).
template <class F>
__attribute__((always_inline)) inline void for_channels(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kLanesF <= channels; c += kLanesF) f(c, Whole{});
  if (c < channels) f(c, Part{channels - c});
}

bool inside(const WinogradWindow& w, int64_t i, int64_t j) {
  const int64_t y = w.y + i, x = w.x + j;
  return y >= 0 && y < w.height && x >= 0 && x < w.width;
}

template <class M, bool kEdge, class T>
void gather(const T* image, const WinogradWindow& window, int64_t channels, float* points,
            int64_t point) {
  const int64_t line = window.width * window.pixel;
  const int64_t first = window.y * line + window.x * window.pixel;
  for_channels(channels, [&](int64_t c, auto part) {
    transform<M>(
        [&](int i, int j) {
          if (kEdge && !inside(window, i, j)) return VecF{};
          return load(image + (first + i * line + j * window.pixel + c), part);
        },
        [&](int i, int j, VecF v) { store(points + (i * M::kTo + j) * point + c, v, part); });
  });
}

template <class M, class T>
void gather(const T* image, const WinogradWindow& window, int64_t channels, float* points,
            int64_t point) {
  const int last = M::kFrom - 1;
  if (inside(window, 0, 0) && inside(window, last, last)) {
    gather<M, false>(image, window, channels, points, point);
  } else {
    gather<M, true>(image, window, channels, points, point);
  }
}

template <bool kEdge, class T>
void scatter(const float* points, int64_t point, int64_t channels, T* image,
             const WinogradWindow& window, const EpilogueOf<T>& epilogue) {
  const int64_t line = window.width * window.pixel;
  const int64_t first = window.y * line + window.x * window.pixel;
  const VecF low = broadcast<VecF>(epilogue.low), high = broadcast<VecF>(epilogue.high);
  for_channels(channels, [&](int64_t c, auto part) {
    const VecF bias = epilogue.bias != nullptr ? load(epilogue.bias + c, part) : VecF{};
    transform<Output>(
        [&](int i, int j) { return load(points + (i * Output::kFrom + j) * point + c, part); },
        [&](int i, int j, VecF v) {
          if (kEdge && !inside(window, i, j)) return;
          const int64_t at = first + i * line + j * window.pixel + c;
          v += bias;
          if (epilogue.residual != nullptr) v += load(epilogue.residual + at, part);
          v = v < low ? low : v;
          v = v > high ? high : v;
          store(image + at, v, part);
        });
  });
}

template <class T>
void scatter(const float* points, int64_t point, int64_t channels, T* image,
             const WinogradWindow& window, const EpilogueOf<T>& epilogue) {
  const int last = Output::kTo - 1;
  if (inside(window, 0, 0) && inside(window, last, last)) {
    scatter<false>(points, point, channels, image, window, epilogue);
  } else {
    scatter<true>(points, point, channels, image, window, epilogue);
  }
}

void weight(const float* weight, const WinogradTaps& taps, int64_t rows, int64_t columns,
            float* points, int64_t point, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto columns_from = [&](int64_t first, auto part) {
      const float* from = weight + (r * taps.row + first);
      float* to = points + r * width + first;
      transform<Weight>(
          [&](int i, int j) {
            return load(from + (i * taps.vertical + j * taps.horizontal), part);
          },
          [&](int i, int j, VecF v) { store(to + (i * Weight::kTo + j) * point, v); });
    };
    int64_t first = 0;
    for (; first + kLanesF <= columns; first += kLanesF) columns_from(first, Whole{});
    for (; first < width; first += kLanesF) {
      columns_from(first, Part{columns > first ? columns - first : 0});
    }
  }
}

void grad_weight(const float* points, int64_t point, int64_t rows, int64_t columns, float* weight,
                 const WinogradTaps& taps) {
  for (int64_t r = 0; r < rows; ++r) {
    for_channels(columns, [&](int64_t c, auto part) {
      const float* from = points + r * columns + c;
      float* to = weight + (r * taps.row + c);
      transform<GradWeight>(
          [&](int i, int j) { return load(from + (i * GradWeight::kFrom + j) * point, part); },
          [&](int i, int j, VecF v) {
            store(to + (i * taps.vertical + j * taps.horizontal), v, part);
          });
    });
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
