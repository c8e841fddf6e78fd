#include "kernels/dequantize.h"

#include "kernels/cpu/transpose.h"
#include "kernels/quantized_linear.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

constexpr int64_t kQuadBytes = kPanelColumns * kQuad;  // a quad of all columns of a panel
constexpr int64_t kTileQuads = kPanel / kQuad;

// The first `quads` of a panel as bytes [16][64], column by column; at most kTileQuads.
void columns_of(const void* panel, int64_t quads, int8_t* columns) {
  if (quads == kTileQuads) {
    for (int64_t quad = 0; quad < kTileQuads; quad += kLanesF) {
      for (int64_t n = 0; n < kPanelColumns; n += kLanesF) {
        transpose(static_cast<const float*>(panel) + quad * kPanelColumns + n, kPanelColumns,
                  reinterpret_cast<float*>(columns) + n * kTileQuads + quad, kTileQuads);
      }
    }
    return;
  }
  memset(columns, 0, kPanelColumns * kPanel);
  for (int64_t quad = 0; quad < quads; ++quad) {
    for (int64_t n = 0; n < kPanelColumns; ++n) {
      memcpy(columns + n * kPanel + quad * kQuad,
             static_cast<const int8_t*>(panel) + quad * kQuadBytes + n * kQuad, kQuad);
    }
  }
}

void backward(const DequantizeBackward& d) {
  const int64_t quads = d.quads - d.first / kQuad;
  alignas(64) int8_t columns[kPanelColumns * kPanel];
  for (int64_t n = 0; n < d.columns; n += kPanelColumns) {
    const int8_t* panel = d.panels + n * d.quads * kQuad + d.first * kPanelColumns;
    columns_of(panel, quads < kTileQuads ? quads : kTileQuads, columns);
    const int64_t count = d.columns - n < kPanelColumns ? d.columns - n : kPanelColumns;
    for (int64_t i = 0; i < count; ++i) {
      const VecF scale = broadcast<VecF>(d.weight_scale[n + i]);
      float* to = d.output + (n + i) * kPanel;
#pragma GCC unroll 16
      for (int k = 0; k < kPanel; k += kLanesF) {
        VecI8 q;
        memcpy(&q, columns + i * kPanel + k, sizeof q);
        store(to + k, __builtin_convertvector(widen(q), VecF) * scale);
      }
    }
  }
}

// The low half bytes of eight octets, then the high ones, as the quads they are of a panel.
int64_t unpack_octets(const uint8_t* octets, int64_t count, int8_t* quads) {
  for (int64_t octet = 0; octet < count; ++octet) {
    for (int64_t i = 0; i < kQuadBytes; ++i) {
      const uint8_t byte = octets[octet * kQuadBytes + i];
      quads[2 * octet * kQuadBytes + i] = byte & 15;
      quads[(2 * octet + 1) * kQuadBytes + i] = byte >> 4;
    }
  }
  return 2 * count;
}

void int4_backward(const DequantizeInt4Backward& d) {
  const int64_t octets = d.groups * d.group_size / 8;
  const int64_t left = octets - d.first / 8;
  alignas(64) int8_t quads[kTileQuads * kQuadBytes];
  alignas(64) int8_t columns[kPanelColumns * kPanel];
  for (int64_t n = 0; n < d.columns; n += kPanelColumns) {
    const int64_t panel = n / kPanelColumns;
    const uint8_t* from = d.panels + (panel * octets + d.first / 8) * kQuadBytes;
    const int64_t count = unpack_octets(from, left < 8 ? left : 8, quads);
    columns_of(quads, count, columns);
    const BFloat16* scales = d.weight_scale + panel * d.groups * kPanelColumns;
    const uint8_t* zeros = d.weight_zero + panel * d.groups * kPanelColumns;
    const int64_t rows = d.columns - n < kPanelColumns ? d.columns - n : kPanelColumns;
    // A group may end within the tile, at a multiple of 8.
    for (int64_t k = 0; k < 4 * count;) {
      const int64_t group = (d.first + k) / d.group_size;
      const int64_t group_end = (group + 1) * d.group_size - d.first;
      const int64_t end = group_end < 4 * count ? group_end : 4 * count;
      for (int64_t i = 0; i < rows; ++i) {
        uint32_t bits = (uint32_t)scales[group * kPanelColumns + i].bits << 16;
        float scale;
        memcpy(&scale, &bits, sizeof scale);
        const int32_t zero = zeros[group * kPanelColumns + i];
        const int8_t* u = columns + i * kPanel;
        float* to = d.output + (n + i) * kPanel;
        int64_t j = k;
        for (; j + kLanesF <= end; j += kLanesF) {
          VecI8 q;
          memcpy(&q, u + j, sizeof q);
          store(to + j, __builtin_convertvector(widen(q) - zero, VecF) * broadcast<VecF>(scale));
        }
        for (; j < end; ++j) to[j] = (float)(u[j] - zero) * scale;
      }
      k = end;
    }
    for (int64_t i = 0; i < rows && 4 * count < kPanel; ++i) {
      memset(d.output + (n + i) * kPanel + 4 * count, 0, (size_t)(kPanel - 4 * count) * 4);
    }
  }
}

template <class T>
void widen_all(const void* from, int64_t size, float* to) {
  const T* x = static_cast<const T*>(from);
  int64_t i = 0;
  for (; i + kLanesF <= size; i += kLanesF) store(to + i, load(x + i));
  if (i < size) store_partial(to + i, load_partial(x + i, size - i), size - i);
}

template <class T>
void narrow_all(const float* from, int64_t size, void* to) {
  T* y = static_cast<T*>(to);
  int64_t i = 0;
  for (; i + kLanesF <= size; i += kLanesF) store(y + i, load(from + i));
  if (i < size) store_partial(y + i, load_partial(from + i, size - i), size - i);
}

}  // namespace

extern const DequantizeKernels dequantize;
const DequantizeKernels dequantize{
    .backward = backward,
    .int4_backward = int4_backward,
    .widen = {widen_all<float>, nullptr, widen_all<BFloat16>, widen_all<Float16>},
    .narrow = {narrow_all<float>, nullptr, narrow_all<BFloat16>, narrow_all<Float16>},
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
