// The end of a linear layer's tile: scales, bias, activation, residual, one rounding, store.
#pragma once

#include "kernels/linear_epilogue.h"
#include "kernels/vec_math.h"

namespace torchweld::kernels::TORCHWELD_ISA {

// Sums of some rows and columns of a block, int32_t or float, padded to whole registers.
template <class Sum>
struct LinearTile {
  const Sum* sum;  // [rows][stride]
  int64_t stride;
  int64_t row, rows;  // of the block
  int64_t column, columns;
};

inline VecF load_sums(const float* p) { return load(p); }
inline VecF load_sums(const int32_t* p) {
  VecI32 sums;
  memcpy(&sums, p, sizeof sums);
  return __builtin_convertvector(sums, VecF);
}

// Has the residual of a tile fetched while its sums are made: its rows lie too far apart for the
// processor to foresee.
template <class T, class Sum>
void fetch_residual(const LinearEpilogue& to, const LinearTile<Sum>& tile) {
  if (!to.residual) return;
  const int64_t element = to.residual_is_float ? sizeof(float) : sizeof(T);
  const int64_t bytes = tile.columns * element;
  for (int64_t r = tile.row; r < tile.row + tile.rows; ++r) {
    const char* row = (const char*)to.residual + (r * to.residual_stride + tile.column) * element;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
    __builtin_prefetch(row + bytes - 1);
  }
}

template <LinearActivation A>
inline VecF activate(VecF x) {
  if constexpr (A == LinearActivation::relu) return relu(x);
  if constexpr (A == LinearActivation::gelu) return gelu(x);
  if constexpr (A == LinearActivation::gelu_tanh) return gelu_tanh(x);
  if constexpr (A == LinearActivation::silu) return silu(x);
  return x;
}

template <class T, LinearActivation A, class Sum>
void finish(const LinearEpilogue& to, const LinearTile<Sum>& tile) {
  const VecF one = broadcast<VecF>(1.0f);
  T* output = static_cast<T*>(to.output) + tile.row * to.output_stride;
  int64_t residual = tile.row * to.residual_stride;
  for (int64_t r = 0; r < tile.rows;
       ++r, output += to.output_stride, residual += to.residual_stride) {
    const VecF input_scale = to.input_scale ? broadcast<VecF>(to.input_scale[tile.row + r]) : one;
    // The registers of columns [n, n + count), of which load and store know how many there are.
    const auto columns = [&](int64_t n, auto load_some,
                             auto store_some) __attribute__((always_inline)) {
      const VecF x = load_sums(tile.sum + r * tile.stride + (n - tile.column)) * input_scale;
      const VecF scale = to.weight_scale ? load_some(to.weight_scale + n) : one;
      const VecF bias = to.bias ? load_some(to.bias + n) : VecF{};
      VecF y = activate<A>(fma(x, scale, bias));
      if (to.residual_is_float) {
        y = y + load_some(static_cast<const float*>(to.residual) + residual + n);
      } else if (to.residual) {
        y = y + load_some(static_cast<const T*>(to.residual) + residual + n);
      }
      store_some(output + n, y);
    };
    int64_t n = tile.column;
    const int64_t end = tile.column + tile.columns;
    for (; n + kLanesF <= end; n += kLanesF) {
      columns(n, [](const auto* p) { return load(p); }, [](T* p, VecF y) { store(p, y); });
    }
    if (n < end) {
      const int64_t count = end - n;
      columns(
          n, [&](const auto* p) { return load_partial(p, count); },
          [&](T* p, VecF y) { store_partial(p, y, count); });
    }
  }
}

template <class T, class Sum>
void finish(const LinearEpilogue& to, const LinearTile<Sum>& tile) {
  switch (to.activation) {
    case LinearActivation::identity:
      return finish<T, LinearActivation::identity>(to, tile);
    case LinearActivation::relu:
      return finish<T, LinearActivation::relu>(to, tile);
    case LinearActivation::gelu:
      return finish<T, LinearActivation::gelu>(to, tile);
    case LinearActivation::gelu_tanh:
      return finish<T, LinearActivation::gelu_tanh>(to, tile);
    case LinearActivation::silu:
      return finish<T, LinearActivation::silu>(to, tile);
  }
}

}  // namespace torchweld::kernels::TORCHWELD_ISA
