// The AdamW step. Formula and rounding order follow torch's fused CPU step
// (aten/src/ATen/native/cpu/FusedAdamKernel.cpp), with its contractions written out as fma, so that
// every instruction set gives the same bits. Torch's own scalar tail contracts differently from its
// vector body; here the body's formula is used throughout.
#include "kernels/adamw.h"

#include "kernels/cpu/vec.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

template <class T>
struct Step {
  using Vec = typename Math<T>::Vec;
  using Scalar = typename Math<T>::Scalar;
  static constexpr int kLanes = Math<T>::kLanes;

  explicit Step(const AdamWScalars& s)
      : decay(broadcast<Vec>((Scalar)s.decay)),
        grad_scale(broadcast<Vec>((Scalar)s.grad_scale)),
        beta2(broadcast<Vec>((Scalar)s.beta2)),
        c2(broadcast<Vec>((Scalar)(1.0 - s.beta2))),
        step_size(broadcast<Vec>((Scalar)-s.step_size)),
        bias_root(broadcast<Vec>((Scalar)s.bias_root)),
        eps(broadcast<Vec>((Scalar)s.eps)) {
    // lerp(m, g, c1) as torch's: from the nearer end, so that c1 = 1 gives g exactly.
    const Scalar c1 = (Scalar)(1.0 - s.beta1);
    from_m = (c1 < 0 ? -c1 : c1) < (Scalar)0.5;
    lerp_weight = broadcast<Vec>(from_m ? c1 : c1 - 1);
  }

  Vec decay, grad_scale, beta2, c2, step_size, bias_root, eps, lerp_weight;
  bool from_m;

  void update(Vec& p, Vec g, Vec& m, Vec& v, Vec* v_max) const {
    g = g * grad_scale;
    p = p * decay;
    m = fma(lerp_weight, g - m, from_m ? m : g);
    v = fma(c2 * g, g, v * beta2);
    Vec second = v;
    if (v_max != nullptr) {
      // NaN wins, as in torch.maximum.
      *v_max = ((*v_max > v) | (*v_max != *v_max)) ? *v_max : v;
      second = *v_max;
    }
    const Vec denominator = sqrt(second) / bias_root + eps;
    p = p + (step_size * m) / denominator;
  }
};

template <class T>
void adamw_step(const AdamWSpan& span, const AdamWScalars& scalars) {
  const Step<T> step(scalars);
  constexpr int kLanes = Step<T>::kLanes;
  T* p = static_cast<T*>(span.param);
  const T* g = static_cast<const T*>(span.grad);
  T* m = static_cast<T*>(span.exp_avg);
  T* v = static_cast<T*>(span.exp_avg_sq);
  T* v_max = static_cast<T*>(span.max_exp_avg_sq);

  int64_t i = 0;
  for (; i + kLanes <= span.size; i += kLanes) {
    auto pv = load(p + i), mv = load(m + i), vv = load(v + i);
    if (v_max != nullptr) {
      auto xv = load(v_max + i);
      step.update(pv, load(g + i), mv, vv, &xv);
      store(v_max + i, xv);
    } else {
      step.update(pv, load(g + i), mv, vv, nullptr);
    }
    store(p + i, pv);
    store(m + i, mv);
    store(v + i, vv);
  }
  if (const int64_t rest = span.size - i; rest > 0) {
    auto pv = load_partial(p + i, rest), mv = load_partial(m + i, rest), vv = load_partial(v + i, rest);
    auto xv = v_max != nullptr ? load_partial(v_max + i, rest) : vv;
    step.update(pv, load_partial(g + i, rest), mv, vv, v_max != nullptr ? &xv : nullptr);
    if (v_max != nullptr) store_partial(v_max + i, xv, rest);
    store_partial(p + i, pv, rest);
    store_partial(m + i, mv, rest);
    store_partial(v + i, vv, rest);
  }
}

// Eight partial sums, whatever the register width, so that the order of additions, and with it the
// result, is the same on every instruction set.
template <class T>
double sum_of_squares(const void* data, int64_t size) {
  constexpr int kSums = 8;
  constexpr int kLanes = Math<T>::kLanes;
  const T* x = static_cast<const T*>(data);
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const auto v = load(x + i);
    for (int lane = 0; lane < kLanes; ++lane) {
      const double value = v[lane];
      sums[(i + lane) % kSums] += value * value;
    }
  }
  if (i < size) {
    const auto v = load_partial(x + i, size - i);
    for (int lane = 0; i + lane < size; ++lane) {
      const double value = v[lane];
      sums[(i + lane) % kSums] += value * value;
    }
  }
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace

extern const AdamWKernels adamw;
const AdamWKernels adamw{
    .step = {adamw_step<float>, adamw_step<double>, adamw_step<BFloat16>, adamw_step<Float16>},
    .sum_of_squares = {sum_of_squares<float>, sum_of_squares<double>, sum_of_squares<BFloat16>,
                       sum_of_squares<Float16>},
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
