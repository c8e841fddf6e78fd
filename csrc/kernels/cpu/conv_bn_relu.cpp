#include "kernels/conv_bn_relu_math.h"
#include "kernels/cpu/conv_bn_relu_statistics.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

// One value per column: one register for every kLanes columns of a run, or one group of registers
// for all of a plane.
template <class T, Layout kLayout>
struct Columns {
  using Vec = typename Math<T>::Vec;
  using Scalar = typename Math<T>::Scalar;
  static constexpr int kLanes = Math<T>::kLanes;

  static Vec coefficient(const void* column, int64_t offset) {
    const Scalar* c = static_cast<const Scalar*>(column);
    if constexpr (kLayout == Layout::planes) {
      return broadcast<Vec>(*c);
    } else {
      return load(c + offset);
    }
  }
};

template <class T, Layout kLayout, Activation kActivation>
struct Normalize {
  using C = Columns<T, kLayout>;
  using Vec = typename C::Vec;

  explicit Normalize(const NormalizeArguments& a)
      : activate{broadcast<Vec>((typename C::Scalar)a.negative_slope)},
        columns(a.columns),
        x(static_cast<const T*>(a.x)),
        residual(static_cast<const T*>(a.residual)),
        grad_y(static_cast<const T*>(a.grad_y)) {}

  // d and z of the elements at `offset` of the run that begins at `run`. Forward and backward both
  // come here, so the backward sees the very z the forward activated.
  template <class P>
  Vec normalized(int64_t run, int64_t offset, P part, Vec& d) const {
    d = load(x + run + offset, part) - C::coefficient(columns.mean, offset);
    Vec z = fma(d, C::coefficient(columns.scale, offset), C::coefficient(columns.shift, offset));
    if (residual != nullptr) z = z + load(residual + run + offset, part);
    return z;
  }

  // The gradient through the activation there.
  template <class P>
  Vec gradient(int64_t run, int64_t offset, P part, Vec& d) const {
    const Vec z = round_to<T>(normalized(run, offset, part, d));
    return activate.gradient(load(grad_y + run + offset, part), z);
  }

  Activate<kActivation, T> activate;
  ChannelCoefficients columns;
  const T* x;
  const T* residual;
  const T* grad_y;
};

template <class T, Layout kLayout, Activation kActivation>
void normalize(const NormalizeArguments& a) {
  const Normalize<T, kLayout, kActivation> op(a);
  T* y = static_cast<T*>(a.out);
  const uint64_t first = (uint64_t)y, step = (uint64_t)a.runs.stride * sizeof(T);
  const bool streamed = a.streamed && (first | step) % 64 == 0;
  for (int64_t r = 0; r < a.runs.count; ++r) {
    const int64_t run = r * a.runs.stride;
    for_each_register<Math<T>::kLanes>(a.runs.size, [&](int64_t i, int, auto part) {
      typename Math<T>::Vec d;
      prefetch(op.x + run + i);
      const auto value = op.activate.value(op.normalized(run, i, part, d));
      if (streamed) {
        stream(y + run + i, value, part);
      } else {
        store(y + run + i, value, part);
      }
    });
  }
  if (streamed) drain();
}

// A loop over runs sums kStrip registers of columns in registers, and coefficients stay there too:
// to load and store all that for every run takes longer than the rest. It turns to the next columns
// after kStripRuns runs, and what it fetches ahead is in the order of memory, not in its own.
#if defined(__AVX512F__)
inline constexpr int kStrip = 4;
#else
inline constexpr int kStrip = 2;
#endif
inline constexpr int64_t kStripRuns = 8;

template <class T, Activation kActivation>
struct ReduceColumns {
  using Vec = typename Math<T>::Vec;
  static constexpr int kLanes = Math<T>::kLanes;

  // Adds kStripRuns runs, or what is left of them, from `begin` on.
  void add(int64_t begin, const Runs& runs) {
    int64_t k = 0;
    for (; k + kStrip * kLanes <= runs.size; k += kStrip * kLanes) {
      add_strip<kStrip>(begin, runs, k, Whole{});
    }
    for (; k + kLanes <= runs.size; k += kLanes) add_strip<1>(begin, runs, k, Whole{});
    if (k < runs.size) add_strip<1>(begin, runs, k, Part{runs.size - k});
  }

  template <int kRegisters, class P>
  void add_strip(int64_t begin, const Runs& runs, int64_t column, P part) {
    const bool dense = runs.stride == runs.size;
    const int64_t ahead_step = dense ? kRegisters * kLanes : runs.stride;
    int64_t ahead = begin + kStripRuns * runs.stride + (dense ? column * runs.count : column);
    Vec* to[2] = {sums + column / kLanes, products + column / kLanes};
    Vec sum[kRegisters], product[kRegisters];
#pragma GCC unroll 4
    for (int j = 0; j < kRegisters; ++j) sum[j] = to[0][j], product[j] = to[1][j];
    for (int64_t r = 0; r < runs.count; ++r, ahead += ahead_step) {
#pragma GCC unroll 4
      for (int j = 0; j < kRegisters; ++j) {
        __builtin_prefetch(op.x + ahead + j * kLanes);
        __builtin_prefetch(op.grad_y + ahead + j * kLanes);
        Vec d;
        const Vec g = op.gradient(begin + r * runs.stride, column + j * kLanes, part, d);
        sum[j] += g;
        product[j] = fma(g, d, product[j]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kRegisters; ++j) to[0][j] = sum[j], to[1][j] = product[j];
  }

  // Adds the sums to those in double, and begins anew.
  void flush(int64_t size, double* first, double* second) {
    for (int64_t k = 0; k < size; k += kLanes) {
      add_lanes(first + k, sums[k / kLanes], size - k);
      add_lanes(second + k, products[k / kLanes], size - k);
      sums[k / kLanes] = products[k / kLanes] = Vec{};
    }
  }

  static void add_lanes(double* to, Vec lanes, int64_t count) {
    if (count < kLanes) {
      for (int64_t k = 0; k < count; ++k) to[k] += lanes[k];
      return;
    }
    VecD wide[kLanes / kLanesD];
    widen(lanes, wide);
#pragma GCC unroll 2
    for (int h = 0; h < kLanes / kLanesD; ++h) {
      store(to + h * kLanesD, load(to + h * kLanesD) + wide[h]);
    }
  }

  const Normalize<T, Layout::columns, kActivation> op;
  Vec sums[kMaxColumns / kLanes] = {}, products[kMaxColumns / kLanes] = {};
};

template <class T, Activation kActivation>
void reduce_columns(const NormalizeArguments& a, double* first, double* second) {
  ReduceColumns<T, kActivation> columns{Normalize<T, Layout::columns, kActivation>(a)};
  for (int64_t k = 0; k < a.runs.size; ++k) first[k] = second[k] = 0;
  for_each_tile<T, Layout::columns>(a.runs, [&](int64_t begin, const Runs& tile) {
    for (int64_t r = 0; r < tile.count; r += kStripRuns) {
      const int64_t left = tile.count - r, count = left < kStripRuns ? left : kStripRuns;
      columns.add((begin + r) * tile.stride, {count, tile.size, tile.stride});
    }
    columns.flush(tile.size, first, second);
  });
}

template <class T, Activation kActivation>
void reduce_planes(const NormalizeArguments& a, double* first, double* second) {
  using C = Columns<T, Layout::planes>;
  using Vec = typename C::Vec;
  const Normalize<T, Layout::planes, kActivation> op(a);
  *first = *second = 0;
  for_each_tile<T, Layout::planes>(a.runs, [&](int64_t begin, const Runs& tile) {
    Vec sums[kGroup] = {}, products[kGroup] = {};
    for (int64_t r = 0; r < tile.count; ++r) {
      const int64_t run = (begin + r) * tile.stride;
      for_each_register<C::kLanes>(tile.size, [&](int64_t i, int p, auto part) {
        prefetch(op.x + run + i);
        prefetch(op.grad_y + run + i);
        Vec d;
        const Vec g = keep(op.gradient(run, i, part, d), part);
        sums[p] += g;
        products[p] = fma(g, d, products[p]);
      });
    }
    *first += total<T>(sums);
    *second += total<T>(products);
  });
}

template <class T, Layout kLayout, Activation kActivation>
void reduce(const NormalizeArguments& a, double* first, double* second) {
  if constexpr (kLayout == Layout::columns) {
    reduce_columns<T, kActivation>(a, first, second);
  } else {
    reduce_planes<T, kActivation>(a, first, second);
  }
}

template <class T, Layout kLayout, Activation kActivation>
void apply(const NormalizeArguments& a) {
  using C = Columns<T, kLayout>;
  using Vec = typename C::Vec;
  const Normalize<T, kLayout, kActivation> op(a);
  T* grad_x = static_cast<T*>(a.out);
  T* grad_residual = static_cast<T*>(a.grad_residual);
  for (int64_t r = 0; r < a.runs.count; ++r) {
    const int64_t run = r * a.runs.stride;
    for_each_register<C::kLanes>(a.runs.size, [&](int64_t i, int, auto part) {
      prefetch(op.x + run + i);
      prefetch(op.grad_y + run + i);
      Vec d;
      const Vec g = op.gradient(run, i, part, d);
      if (grad_residual != nullptr) store(grad_residual + run + i, g, part);
      if (grad_x != nullptr) {
        const Vec scale = C::coefficient(a.columns.scale, i);
        // Frozen statistics: no 0 * d, which would carry an infinite x into the gradient.
        if (a.columns.slope == nullptr) {
          store(grad_x + run + i, scale * g, part);
        } else {
          const Vec line =
              fma(C::coefficient(a.columns.slope, i), d, C::coefficient(a.columns.offset, i));
          store(grad_x + run + i, fma(scale, g, line), part);
        }
      }
    });
  }
}

}  // namespace

#define TORCHWELD_EACH_ACTIVATION(kernel, layout, T)                                   \
  {kernel<T, layout, Activation::identity>, kernel<T, layout, Activation::relu>,       \
   kernel<T, layout, Activation::relu6>,    kernel<T, layout, Activation::leaky_relu>, \
   kernel<T, layout, Activation::silu>,     kernel<T, layout, Activation::hardswish>}
#define TORCHWELD_EACH_DTYPE(kernel, layout)            \
  {TORCHWELD_EACH_ACTIVATION(kernel, layout, float),    \
   TORCHWELD_EACH_ACTIVATION(kernel, layout, double),   \
   TORCHWELD_EACH_ACTIVATION(kernel, layout, BFloat16), \
   TORCHWELD_EACH_ACTIVATION(kernel, layout, Float16)}
#define TORCHWELD_EACH_LAYOUT(kernel) \
  {TORCHWELD_EACH_DTYPE(kernel, Layout::planes), TORCHWELD_EACH_DTYPE(kernel, Layout::columns)}

extern const ConvBNReLUKernels conv_bn_relu;
const ConvBNReLUKernels conv_bn_relu{
    .normalize = TORCHWELD_EACH_LAYOUT(normalize),
    .reduce = TORCHWELD_EACH_LAYOUT(reduce),
    .apply = TORCHWELD_EACH_LAYOUT(apply),
    .statistics = {{statistics_of_planes<float>, statistics_of_planes<double>,
                    statistics_of_planes<BFloat16>, statistics_of_planes<Float16>},
                   {statistics_of_columns<float>, statistics_of_columns<double>,
                    statistics_of_columns<BFloat16>, statistics_of_columns<Float16>}},
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
