#include "kernels/conv_bn_relu.h"

#include "kernels/cpu/activation.h"
#include "kernels/cpu/loop.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

// One value per column: one register for every kLanes columns of a run, or one group of registers
// for all of a plane.
template <class T, Layout kLayout>
struct Columns {
  using Vec = typename Math<T>::Vec;
  using Scalar = typename Math<T>::Scalar;
  static constexpr int kLanes = Math<T>::kLanes;
  static constexpr bool kPlanes = kLayout == Layout::planes;
  static constexpr int kRegisters = kPlanes ? kGroup : kMaxColumns / kLanes;

  // The register that holds the sums of the elements at `offset` of a run.
  static constexpr int64_t index(int64_t offset, int p) { return kPlanes ? p : offset / kLanes; }
  static int64_t columns(const Runs& runs) { return kPlanes ? 1 : runs.size; }
  static int64_t registers(const Runs& runs) {
    return kPlanes ? kGroup : (runs.size + kLanes - 1) / kLanes;
  }

  static Vec coefficient(const void* column, int64_t offset) {
    const Scalar* c = static_cast<const Scalar*>(column);
    if constexpr (kPlanes) {
      return broadcast<Vec>(*c);
    } else {
      return load(c + offset);
    }
  }

  // The sum in column k, in double.
  static double total(const Vec* sums, int64_t k) {
    if constexpr (!kPlanes) return sums[k / kLanes][k % kLanes];
    double total = 0;
    for (int p = 0; p < kGroup; ++p) {
      for (int lane = 0; lane < kLanes; ++lane) total += sums[p][lane];
    }
    return total;
  }
};

// Runs that are summed in the arithmetic type before they are merged in double: few enough for
// accuracy, and small enough to stay in cache for a second sweep.
template <class T, Layout kLayout>
int64_t runs_per_tile(const Runs& runs) {
  if (kLayout == Layout::columns) return 32;
  const int64_t count = 2048 / runs.size;
  return count > 0 ? count : 1;
}

// f(first run, tile) over the tiles of a span. A plane longer than a tile is cut by the caller.
template <class T, Layout kLayout, class F>
void for_each_tile(const Runs& runs, const F& f) {
  const int64_t step = runs_per_tile<T, kLayout>(runs);
  for (int64_t first = 0; first < runs.count; first += step) {
    const int64_t rest = runs.count - first;
    f(first, Runs{rest < step ? rest : step, runs.size, runs.stride});
  }
}

// Two steps per tile: about its mean in the arithmetic type, whatever that mean lost in rounding
// corrected by the sum of deviations from it; then tiles merged in double by Chan's formula
// (Chan, Golub, LeVeque 1979). Accurate for means far larger than the deviation.
template <class T, Layout kLayout>
void statistics(const void* data, const Runs& runs, double* mean, double* m2) {
  using C = Columns<T, kLayout>;
  using Vec = typename C::Vec;
  using Scalar = typename C::Scalar;
  const T* x = static_cast<const T*>(data);
  const int64_t columns = C::columns(runs), registers = C::registers(runs);
  for (int64_t k = 0; k < columns; ++k) mean[k] = m2[k] = 0;
  double count = 0;

  for_each_tile<T, kLayout>(runs, [&](int64_t first, const Runs& tile) {
    const T* begin = x + first * runs.stride;
    const double size = (double)tile.count * (C::kPlanes ? tile.size : 1);
    Vec sums[C::kRegisters], squares[C::kRegisters], centers[C::kRegisters];

    for (int64_t j = 0; j < registers; ++j) sums[j] = Vec{};
    for (int64_t run = 0; run < tile.count; ++run) {
      for_each_register<C::kLanes>(tile.size, [&](int64_t i, int p, auto part) {
        prefetch(begin + run * tile.stride + i);
        sums[C::index(i, p)] += load(begin + run * tile.stride + i, part);
      });
    }
    if constexpr (C::kPlanes) {
      const Vec center = broadcast<Vec>((Scalar)(C::total(sums, 0) / size));
      for (int64_t j = 0; j < registers; ++j) centers[j] = center;
    } else {
      for (int64_t j = 0; j < registers; ++j) centers[j] = sums[j] * (Scalar)(1 / size);
    }

    for (int64_t j = 0; j < registers; ++j) sums[j] = squares[j] = Vec{};
    for (int64_t run = 0; run < tile.count; ++run) {
      for_each_register<C::kLanes>(tile.size, [&](int64_t i, int p, auto part) {
        const int64_t j = C::index(i, p);
        const Vec d = keep(load(begin + run * tile.stride + i, part) - centers[j], part);
        sums[j] += d;
        squares[j] = fma(d, d, squares[j]);
      });
    }

    const double total = count + size;
    const double weight = size / total;
    for (int64_t k = 0; k < columns; ++k) {
      const double deviation = C::total(sums, k);
      const double center = centers[k / C::kLanes][k % C::kLanes];
      const double tile_m2 = C::total(squares, k) - deviation * deviation / size;
      const double delta = center + deviation / size - mean[k];
      mean[k] += delta * weight;
      m2[k] += (tile_m2 < 0 ? 0 : tile_m2) + delta * delta * count * weight;
    }
    count = total;
  });
}

template <class T, Layout kLayout, Activation kActivation>
struct Normalize {
  using C = Columns<T, kLayout>;
  using Vec = typename C::Vec;

  explicit Normalize(const NormalizeArguments& a)
      : activate{broadcast<Vec>((typename C::Scalar)a.negative_slope)},
        columns(a.columns),
        x(static_cast<const T*>(a.x)),
        residual(static_cast<const T*>(a.residual)) {}

  // d and z of the elements at `offset` of the run that begins at `run`. Forward and backward both
  // come here, so the backward sees the very z the forward activated.
  template <class P>
  Vec normalized(int64_t run, int64_t offset, P part, Vec& d) const {
    prefetch(x + run + offset);
    d = load(x + run + offset, part) - C::coefficient(columns.mean, offset);
    Vec z = fma(d, C::coefficient(columns.scale, offset), C::coefficient(columns.shift, offset));
    if (residual != nullptr) z = z + load(residual + run + offset, part);
    return z;
  }

  Activate<kActivation, Vec> activate;
  ChannelCoefficients columns;
  const T* x;
  const T* residual;
};

template <class T, Layout kLayout, Activation kActivation>
void normalize(const NormalizeArguments& a) {
  const Normalize<T, kLayout, kActivation> op(a);
  T* y = static_cast<T*>(a.out);
  for (int64_t r = 0; r < a.runs.count; ++r) {
    const int64_t run = r * a.runs.stride;
    for_each_register<Math<T>::kLanes>(a.runs.size, [&](int64_t i, int, auto part) {
      typename Math<T>::Vec d;
      store(y + run + i, op.activate.value(op.normalized(run, i, part, d)), part);
    });
  }
}

template <class T, Layout kLayout, Activation kActivation>
void reduce(const NormalizeArguments& a, double* first, double* second) {
  using C = Columns<T, kLayout>;
  using Vec = typename C::Vec;
  const Normalize<T, kLayout, kActivation> op(a);
  const T* grad_y = static_cast<const T*>(a.grad_y);
  const int64_t columns = C::columns(a.runs), registers = C::registers(a.runs);
  for (int64_t k = 0; k < columns; ++k) first[k] = second[k] = 0;

  for_each_tile<T, kLayout>(a.runs, [&](int64_t tile_begin, const Runs& tile) {
    Vec sums[C::kRegisters], products[C::kRegisters];
    for (int64_t j = 0; j < registers; ++j) sums[j] = products[j] = Vec{};
    for (int64_t r = 0; r < tile.count; ++r) {
      const int64_t run = (tile_begin + r) * tile.stride;
      for_each_register<C::kLanes>(tile.size, [&](int64_t i, int p, auto part) {
        const int64_t j = C::index(i, p);
        Vec d;
        const Vec z = round_to<T>(op.normalized(run, i, part, d));
        prefetch(grad_y + run + i);
        const Vec g = keep(op.activate.gradient(load(grad_y + run + i, part), z), part);
        sums[j] += g;
        products[j] = fma(g, d, products[j]);
      });
    }
    for (int64_t k = 0; k < columns; ++k) {
      first[k] += C::total(sums, k);
      second[k] += C::total(products, k);
    }
  });
}

template <class T, Layout kLayout, Activation kActivation>
void apply(const NormalizeArguments& a) {
  using C = Columns<T, kLayout>;
  using Vec = typename C::Vec;
  const Normalize<T, kLayout, kActivation> op(a);
  const T* grad_y = static_cast<const T*>(a.grad_y);
  T* grad_x = static_cast<T*>(a.out);
  T* grad_residual = static_cast<T*>(a.grad_residual);
  for (int64_t r = 0; r < a.runs.count; ++r) {
    const int64_t run = r * a.runs.stride;
    for_each_register<C::kLanes>(a.runs.size, [&](int64_t i, int, auto part) {
      Vec d;
      const Vec z = round_to<T>(op.normalized(run, i, part, d));
      prefetch(grad_y + run + i);
      const Vec g = op.activate.gradient(load(grad_y + run + i, part), z);
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
    .statistics = {{statistics<float, Layout::planes>, statistics<double, Layout::planes>,
                    statistics<BFloat16, Layout::planes>, statistics<Float16, Layout::planes>},
                   {statistics<float, Layout::columns>, statistics<double, Layout::columns>,
                    statistics<BFloat16, Layout::columns>, statistics<Float16, Layout::columns>}},
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
