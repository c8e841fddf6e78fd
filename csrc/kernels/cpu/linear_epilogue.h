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

// Columns outside, rows inside: what belongs to a column is loaded once, and a register takes ten
// instructions, few enough for the next tile's product to begin beside the last of them.
template <class T, LinearActivation A, class Sum>
void finish(const LinearEpilogue& to, const LinearTile<Sum>& tile) {
  static constexpr float kOne = 1.0f;
  const float* const input_scale = to.input_scale ? to.input_scale + tile.row : &kOne;
  const int64_t input_scale_step = to.input_scale ? 1 : 0;
  // Copies: the compiler cannot know that nothing written below is one of these.
  const int64_t rows = tile.rows, stride = tile.stride, output_stride = to.output_stride;
  const int64_t residual_element = to.residual_is_float ? sizeof(float) : sizeof(T);
  const int64_t residual_step = to.residual_stride * residual_element;
  const bool residual_is_float = to.residual_is_float;
  // The register of columns from n on, of which load and store know how many there are.
  const auto column = [&](int64_t n, auto load_some,
                          auto store_some) __attribute__((always_inline)) {
    const VecF scale = to.weight_scale ? load_some(to.weight_scale + n) : broadcast<VecF>(1.0f);
    const VecF bias = to.bias ? load_some(to.bias + n) : VecF{};
    const Sum* sum = tile.sum + (n - tile.column);
    const float* row_scale = input_scale;
    T* output = static_cast<T*>(to.output) + tile.row * output_stride + n;
    const char* residual = static_cast<const char*>(to.residual);
    if (residual) residual += tile.row * residual_step + n * residual_element;
    for (int64_t r = 0; r < rows; ++r) {
      VecF y = activate<A>(fma(load_sums(sum) * *row_scale, scale, bias));
      if (residual) {
        y = y +
            (residual_is_float ? load_some((const float*)residual) : load_some((const T*)residual));
        residual += residual_step;
      }
      store_some(output, y);
      sum += stride;
      row_scale += input_scale_step;
      output += output_stride;
    }
  };
  int64_t n = tile.column;
  const int64_t end = tile.column + tile.columns;
  for (; n + kLanesF <= end; n += kLanesF) {
    column(n, [](const auto* p) { return load(p); }, [](T* p, VecF y) { store(p, y); });
  }
  if (n < end) {
    const int64_t count = end - n;
    column(
        n, [&](const auto* p) { return load_partial(p, count); },
        [&](T* p, VecF y) { store_partial(p, y, count); });
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
