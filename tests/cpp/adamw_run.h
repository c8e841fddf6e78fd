// A parameter with its AdamW states, in buffers of exactly the size a kernel may touch.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "buffer.h"
#include "check.h"

namespace torchweld::kernels {

struct AdamWMode {
  DType dtype;
  AdamWState state = AdamWState::like_param;
  AdamWRounding rounding = AdamWRounding::nearest;
  bool amsgrad = false;
};

inline std::vector<AdamWMode> adamw_modes() {
  std::vector<AdamWMode> modes;
  for (int d = 0; d < 4; ++d) {
    for (int s = 0; s < 3; ++s) {
      for (int r = 0; r < 4; ++r) {
        const AdamWMode mode{static_cast<DType>(d), static_cast<AdamWState>(s),
                             static_cast<AdamWRounding>(r)};
        const auto& kernels = *table(Capability::scalar).adamw;
        const bool exists = kernels.step(mode.dtype, mode.state, mode.rounding) != nullptr;
        CHECK(exists == (kernels.observe(mode.dtype, mode.state, mode.rounding) != nullptr),
              "a step that can be made can be observed: %d %d %d", d, s, r);
        CHECK(exists == adamw_exists(mode.dtype, mode.state, mode.rounding), "%d %d %d", d, s, r);
        if (!exists) continue;
        modes.push_back(mode);
        if (mode.state != AdamWState::int8) {
          modes.push_back({mode.dtype, mode.state, mode.rounding, true});
        }
      }
    }
  }
  return modes;
}

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float of_bfloat16(uint16_t bits) { return float_of_bits(uint32_t{bits} << 16); }
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of_float(value);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline double of_float16(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 31  ? (mantissa == 0 ? INFINITY : NAN)
                           : exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(1024 + mantissa, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

// The magnitude of an int8 code, as kernels/adamw.h writes it.
inline double code_value(int code) { return std::ldexp(8 + code % 8, code / 8) - 8; }

template <class T>
struct Array {
  explicit Array(int64_t size, T value = T{}) : size(size) {
    CHECK(size >= 0, "size %ld", static_cast<long>(size));
    data = std::make_unique<T[]>(static_cast<size_t>(size));
    std::fill_n(data.get(), size, value);
  }
  Array(const Array& other) : Array(other.size) { std::copy_n(other.data.get(), size, data.get()); }
  bool operator==(const Array& other) const {
    return size == other.size && std::memcmp(data.get(), other.data.get(), size * sizeof(T)) == 0;
  }
  T& operator[](int64_t i) const { return data[i]; }
  int64_t size;
  std::unique_ptr<T[]> data;
};

struct AdamWRun {
  AdamWRun(int64_t size, AdamWMode mode)
      : size(size),
        mode(mode),
        width(static_cast<int64_t>(size_of(mode.dtype))),
        state_width(static_cast<int64_t>(state_size(mode.dtype, mode.state, mode.rounding))),
        p(size * width),
        g(size * width),
        m(size * state_width),
        v(size * state_width),
        x(mode.amsgrad ? size * state_width : 0),
        c(mode.rounding >= AdamWRounding::kahan ? size : 0),
        m_scale(mode.state == AdamWState::int8 ? blocks() : 0),
        v_scale(m_scale.size) {}

  int64_t blocks() const { return (size + kAdamWBlock - 1) / kAdamWBlock; }

  AdamWSpan span(int64_t index = 0) const {
    return {.param = p.data.get(),
            .grad = g.data.get(),
            .exp_avg = m.data.get(),
            .exp_avg_sq = v.data.get(),
            .max_exp_avg_sq = mode.amsgrad ? x.data.get() : nullptr,
            .compensation = c.size > 0 ? c.data.get() : nullptr,
            .exp_avg_scale = m_scale.size > 0 ? m_scale.data.get() : nullptr,
            .exp_avg_sq_scale = v_scale.size > 0 ? v_scale.data.get() : nullptr,
            .size = size,
            .index = index};
  }

  void step(const AdamWScalars& scalars, Capability capability = detect_capability(),
            int64_t index = 0) const {
    step_part(scalars, capability, 0, size, index);
  }

  void step_part(const AdamWScalars& scalars, Capability capability, int64_t begin, int64_t count,
                 int64_t index = 0) const {
    table(capability)
        .adamw->step(mode.dtype, mode.state, mode.rounding)(
            part(span(index), mode.dtype, mode.state, mode.rounding, begin, count), scalars);
  }

  // Random gradients and parameters of a model's size; moments as a few steps leave them.
  void fill(unsigned seed) const {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < size; ++i) set(p, width, i, mode.dtype, 0.1 * normal(random));
    for (int k = 1; k <= 2; ++k) {
      for (int64_t i = 0; i < size; ++i) set(g, width, i, mode.dtype, 0.01 * normal(random));
      step(scalars_of(k), Capability::scalar);
    }
  }

  static AdamWScalars scalars_of(int64_t step, double lr = 1e-3, uint64_t seed = 0) {
    return {.decay = 1 - lr * 0.01,
            .beta1 = 0.9,
            .beta2 = 0.999,
            .step_size = lr / (1 - std::pow(0.9, step)),
            .bias_root = std::sqrt(1 - std::pow(0.999, step)),
            .eps = 1e-8,
            .grad_scale = 1,
            .key = adamw_key(seed, step, 7)};
  }

  static void set(const Array<char>& to, int64_t width, int64_t i, DType dtype, double value) {
    const float single = static_cast<float>(value);
    uint16_t half = to_bfloat16(single);
    if (dtype == DType::float16) {  // toward zero; no subnormals
      const uint32_t bits = bits_of_float(single);
      const int32_t exponent = static_cast<int32_t>((bits >> 23) & 255) - 112;
      half = static_cast<uint16_t>((bits >> 16 & 0x8000) |
                                   (exponent <= 0 ? 0 : exponent << 10 | (bits >> 13 & 1023)));
    }
    const void* from = width == 8   ? static_cast<const void*>(&value)
                       : width == 4 ? static_cast<const void*>(&single)
                                    : &half;
    std::memcpy(&to[0] + i * width, from, width);
  }

  static double get(const Array<char>& from, int64_t width, int64_t i, DType dtype) {
    double value;
    float single;
    uint16_t half;
    const char* at = &from[0] + i * width;
    if (width == 8) return std::memcpy(&value, at, 8), value;
    if (width == 4) return std::memcpy(&single, at, 4), single;
    std::memcpy(&half, at, 2);
    return dtype == DType::float16 ? of_float16(half) : of_bfloat16(half);
  }

  double grad(int64_t i) const { return get(g, width, i, mode.dtype); }
  void set_grad(int64_t i, double value) const { set(g, width, i, mode.dtype, value); }
  void set_weight(int64_t i, double value) const { set(p, width, i, mode.dtype, value); }

  // With what its compensation holds.
  double weight(int64_t i) const {
    const double param = get(p, width, i, mode.dtype);
    if (mode.rounding == AdamWRounding::kahan) {
      return static_cast<float>(param) + of_bfloat16(static_cast<uint16_t>(c[i]));
    }
    if (mode.rounding == AdamWRounding::split) {
      uint16_t high;
      std::memcpy(&high, &p[0] + i * 2, 2);
      return float_of_bits((uint32_t{high} << 16) + static_cast<uint32_t>(int32_t{c[i]}));
    }
    return param;
  }

  double exp_avg(int64_t i) const {
    if (mode.state != AdamWState::int8) return get(m, state_width, i, state_dtype());
    const int code = static_cast<uint8_t>(m[i]);
    const double value = code_value(code & 127) / code_value(127) * m_scale[i / kAdamWBlock];
    return code & 128 ? -value : value;
  }

  double exp_avg_sq(int64_t i) const {
    if (mode.state != AdamWState::int8) return get(v, state_width, i, state_dtype());
    return code_value(static_cast<uint8_t>(v[i])) / code_value(255) * v_scale[i / kAdamWBlock];
  }

  double max_exp_avg_sq(int64_t i) const { return get(x, state_width, i, state_dtype()); }

  DType state_dtype() const {
    const bool as_param =
        mode.state == AdamWState::like_param && mode.rounding == AdamWRounding::nearest;
    return as_param ? mode.dtype : DType::bfloat16;
  }

  bool operator==(const AdamWRun& o) const {
    return p == o.p && g == o.g && m == o.m && v == o.v && x == o.x && c == o.c &&
           m_scale == o.m_scale && v_scale == o.v_scale;
  }

  int64_t size;
  AdamWMode mode;
  int64_t width, state_width;
  Array<char> p, g, m, v, x;
  Array<int16_t> c;
  Array<float> m_scale, v_scale;
};

// One step in double, from the states of `before`.
struct ExactStep {
  ExactStep(const AdamWRun& before, int64_t i, const AdamWScalars& s) {
    const double g = before.grad(i) * s.grad_scale;
    m = s.beta1 * before.exp_avg(i) + (1 - s.beta1) * g;
    v = s.beta2 * before.exp_avg_sq(i) + (1 - s.beta2) * g * g;
    v_max = before.mode.amsgrad ? std::max(before.max_exp_avg_sq(i), v) : v;
    update = -s.step_size * m / (std::sqrt(v_max) / s.bias_root + s.eps);
    p = before.weight(i) * s.decay + update;
  }
  double m, v, v_max, update, p;
};

}  // namespace torchweld::kernels
