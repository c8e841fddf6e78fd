// The end of a linear layer's tile: scales, bias, activation, residual, one rounding, store. The
// arithmetic of kernels/cpu/linear_epilogue.h and its bits; dtypes are looked at when it runs, once
// for several elements, which costs less than a kernel for each.
#pragma once

#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_end.h"
#include "kernels/vec_math.h"

namespace torchweld::kernels::cuda {

template <class F>
TORCHWELD_INLINE void for_four(float (&x)[4], const F& f) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = f(x[i]);
}

// Asked once for four: they go through it side by side.
TORCHWELD_INLINE void activate(LinearActivation activation, float (&four)[4]) {
  switch (activation) {
    case LinearActivation::relu:
      return for_four(four, [](float x) { return relu(x); });
    case LinearActivation::gelu:
      return for_four(four, [](float x) { return gelu(x); });
    case LinearActivation::gelu_tanh:
      return for_four(four, [](float x) { return gelu_tanh(x); });
    case LinearActivation::silu:
      return for_four(four, [](float x) { return silu(x); });
    case LinearActivation::identity:
      return;
  }
}

// Neighbours that move as one, where memory lies so that they can.
template <class T>
struct alignas(sizeof(T) * 4) Four {
  T x[4];
};

template <class T>
TORCHWELD_INLINE void load_four(const T* from, int count, float (&to)[4]) {
  Four<T> four{};
  if (count == 4 && reinterpret_cast<uintptr_t>(from) % sizeof four == 0) {
    four = *reinterpret_cast<const Four<T>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) four.x[i] = from[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = static_cast<float>(to_vec(four.x[i]));
}

// Elements [at, at + count) as float, the others zero; at most 4.
TORCHWELD_INLINE void load_four(const void* from, DType dtype, int64_t at, int count,
                                float (&to)[4]) {
  switch (dtype) {
    case DType::float32:
      return load_four(static_cast<const float*>(from) + at, count, to);
    case DType::float64:
      return load_four(static_cast<const double*>(from) + at, count, to);
    case DType::bfloat16:
      return load_four(static_cast<const BFloat16*>(from) + at, count, to);
    case DType::float16:
      return load_four(static_cast<const Float16*>(from) + at, count, to);
  }
}

template <class T>
TORCHWELD_INLINE void store_four(T* to, int count, const T (&from)[4]) {
  Four<T> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four.x[i] = from[i];
  if (count == 4 && reinterpret_cast<uintptr_t>(to) % sizeof four == 0) {
    *reinterpret_cast<Four<T>*>(to) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) to[i] = four.x[i];
    }
  }
}

template <class T>
TORCHWELD_INLINE void store_rounded(void* to, int64_t at, int count, const float (&from)[4]) {
  T rounded[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) rounded[i] = from_vec<T>(from[i]);
  store_four(static_cast<T*>(to) + at, count, rounded);
}

// Elements [at, at + count) of a dtype other than float64.
TORCHWELD_INLINE void store_four(void* to, DType dtype, int64_t at, int count,
                                 const float (&from)[4]) {
  if (dtype == DType::float32) return store_rounded<float>(to, at, count, from);
  if (dtype == DType::bfloat16) return store_rounded<BFloat16>(to, at, count, from);
  store_rounded<Float16>(to, at, count, from);
}

// What is the same for four neighbouring columns in every row.
struct FourColumns {
  TORCHWELD_INLINE FourColumns(const LinearEnd& end, int64_t first, int64_t columns)
      : column(first), count(columns - first < 4 ? static_cast<int>(columns - first) : 4) {
    if (end.stores_sums) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scale[i] = end.of.weight_scale != nullptr && i < count ? end.of.weight_scale[column + i] : 1;
    }
    if (end.bias != nullptr) load_four(end.bias, end.bias_dtype, column, count, bias);
  }

  // The sums of one row, int32_t or float. Not for a column beyond the last, whose count is not
  // positive.
  template <class Sum>
  TORCHWELD_INLINE void finish(const LinearEnd& end, int64_t row, const Sum (&sum)[4]) const {
    const LinearEpilogue& to = end.of;
    const int64_t at = row * to.output_stride + column;
    if constexpr (__is_same(Sum, int32_t)) {
      if (end.stores_sums) return store_four(static_cast<int32_t*>(to.output) + at, count, sum);
    }
    const float input_scale = to.input_scale != nullptr ? to.input_scale[row] : 1.0f;
    float residual[4] = {};
    if (to.residual != nullptr) {
      load_four(to.residual, to.residual_is_float ? DType::float32 : end.output_dtype,
                row * to.residual_stride + column, count, residual);
    }
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = static_cast<float>(sum[i]) * input_scale;
      y[i] = fma(x, scale[i], bias[i]);
    }
    activate(to.activation, y);
    if (to.residual != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = y[i] + residual[i];
    }
    store_four(to.output, end.output_dtype, at, count, y);
  }

  int64_t column;
  int count;
  float scale[4], bias[4] = {};
};

}  // namespace torchweld::kernels::cuda
