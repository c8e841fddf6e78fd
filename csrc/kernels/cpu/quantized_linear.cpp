// The int8 linear layer. A tile of rows and panels is summed in registers over the whole K, lands
// in a buffer of a few hundred sums that never leaves the first cache, and is finished there: no
// int32 matrix in memory. Sums are exact integers, so neither tile nor unrolling shows in the
// result.
//
// What bounds it beside the multipliers (of 128 products a cycle): eight rows use a cache line of
// the weight up in 4 cycles, five in 2.5, so weights beyond the second cache must come at 16 and 26
// bytes a cycle. A third cache that gives 18 lets eight rows near the peak and holds five at 70 %
// of it; memory, at 9, holds eight at 60 %. GELU by its polynomial takes the same units for 20
// operations where the sums of K products take K / 4: at least a tenth at K = 768, 4 % at 2048.
#include "kernels/quantized_linear.h"

#include "kernels/cpu/int8_tile.h"
#include "kernels/cpu/linear_epilogue.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

constexpr int64_t kTileColumns = 4 * kPanelColumns;
constexpr int64_t kTileSums = kRows * kTileColumns;
// What kFlip adds to every activation.
constexpr int32_t kOffset = kFlip ? 128 : 0;

// --- sums of a tile, [rows][panels * 16] ---------------------------------------------------------

struct TileRange {
  int64_t row, rows, panels;
};

// All of K, exactly.
void sum_whole(const QuantizedLinearBlock&, const TileRange& range, TileArgs& args, int32_t* sums) {
  args.c = sums;
  any_tile(range.rows, range.panels, args);
}

// A longer K, in blocks whose sums fit int32 even with kFlip; joined exactly, then rounded.
void sum_blocks(const QuantizedLinearBlock&, const TileRange& range, TileArgs& args, float* sums) {
  constexpr int64_t kBlockQuads = (1 << 16) / kQuad;
  const int64_t width = range.panels * kPanelColumns, quads = args.quads;
  const int32_t* weight_sum = args.weight_sum;
  const int32_t zeros[kPanelColumns] = {};
  alignas(64) int32_t part[kTileSums];
  int64_t total[kTileSums] = {};
  args.c = part;
  args.weight_sum = zeros;
  const int64_t weight_sum_stride = args.weight_sum_stride;
  args.weight_sum_stride = 0;
  for (int64_t k = 0; k < quads; k += kBlockQuads) {
    args.quads = quads - k < kBlockQuads ? quads - k : kBlockQuads;
    any_tile(range.rows, range.panels, args);
    for (int64_t i = 0; i < range.rows * width; ++i) total[i] += part[i];
    args.a += kBlockQuads * kQuad;
    args.b += kBlockQuads * kQuad * kPanelColumns;
  }
  for (int64_t i = 0; i < range.rows * width; ++i) {
    const int64_t n = i % width;
    const int64_t of_weight = weight_sum[n / kPanelColumns * weight_sum_stride + n % kPanelColumns];
    sums[i] = (float)(total[i] - kOffset * of_weight);
  }
}

// Groups of K, each times its own scale, in their order.
void sum_groups(const QuantizedLinearBlock& block, const TileRange& range, TileArgs& args,
                float* sums) {
  const int64_t width = range.panels * kPanelColumns, quads = args.quads;
  const int64_t groups = (quads + block.group_quads - 1) / block.group_quads;
  alignas(64) int32_t part[kTileSums], weight_sum[kTileColumns];
  args.c = part;
  args.weight_sum = weight_sum;
  args.weight_sum_stride = kPanelColumns;
  memset(sums, 0, (size_t)(range.rows * width) * sizeof(float));
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t rest = quads - g * block.group_quads;
    args.quads = rest < block.group_quads ? rest : block.group_quads;
    for (int64_t p = 0; p < range.panels; ++p) {
      sum_weights(args.b + p * args.panel_stride, args.quads, weight_sum + p * kPanelColumns);
    }
    any_tile(range.rows, range.panels, args);
    for (int64_t r = 0; r < range.rows; ++r) {
      const VecF scale = broadcast<VecF>(block.group_scale[(range.row + r) * groups + g]);
      for (int64_t i = r * width; i < (r + 1) * width; i += kLanesF) {
        store(sums + i, fma(load_sums(part + i), scale, load(sums + i)));
      }
    }
    args.a += block.group_quads * kQuad;
    args.b += block.group_quads * kQuad * kPanelColumns;
  }
}

// --- tiles of a block ----------------------------------------------------------------------------

constexpr int64_t kAhead = 2048;  // bytes

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Has the sums of every tile made, and used once they are there.
template <class Sum>
struct Tiles {
  const QuantizedLinearBlock& block;
  void (*make)(const QuantizedLinearBlock&, const TileRange&, TileArgs&, Sum*);
  void (*before)(const LinearEpilogue&, const LinearTile<Sum>&);
  void (*use)(const LinearEpilogue&, const LinearTile<Sum>&);

  void run() const {
    if (block.rows == 0) return;
    const int64_t panels = ceil_div(block.columns, kPanelColumns);
    // Tiles of about one height: a last one of few rows would cost as much as a high one.
    const int64_t height = ceil_div(block.rows, ceil_div(block.rows, kRows));
    const int64_t width = panels_of(height);
    // If the weight is read only once, it comes from memory: fastest in a few long streams. Else
    // panels outside, rows inside: some panels stay in the second cache while all rows pass.
    int64_t stream = height == block.rows ? panels / width : 0;
    // Their columns of the output must not lie 4096 bytes apart, in the same lines of the cache.
    if (stream > 0 && stream % 16 == 0) --stream;
    for (int64_t p = 0; p < stream; ++p) rows_of(height, p, width, stream);
    for (int64_t p = stream * width; p < panels; p += width) {
      rows_of(height, p, panels - p < width ? panels - p : width, 1);
    }
  }

  // All rows of these panels: `first` and `count` - 1 more at a distance.
  void rows_of(int64_t height, int64_t first, int64_t count, int64_t distance) const {
    alignas(64) Sum sums[kTileSums];
    const int64_t panel_bytes = block.quads * kPanelColumns * kQuad;
    const int8_t* panels = block.panels + first * panel_bytes;
    // One pass looks some lines ahead, several share the panels that come next.
    const int64_t passes = ceil_div(block.rows, height);
    const int64_t step = ceil_div(kPanelColumns * kQuad, passes);
    const int8_t* next = passes == 1 ? panels + kAhead : panels + count * panel_bytes;
    for (int64_t row = 0; row < block.rows; row += height) {
      const int64_t rows = block.rows - row < height ? block.rows - row : height;
      const auto each_tile = [&](auto f) {
        const int64_t adjacent = distance == 1 ? count : 1;
        for (int64_t p = 0; p < count; p += adjacent) {
          const int64_t column = (first + p * distance) * kPanelColumns;
          const int64_t rest = block.columns - column, columns = adjacent * kPanelColumns;
          f(block.epilogue, {.sum = sums + p * kPanelColumns,
                             .stride = count * kPanelColumns,
                             .row = row,
                             .rows = rows,
                             .column = column,
                             .columns = rest < columns ? rest : columns});
        }
      };
      each_tile(before);
      // Passed on by reference: a copy, in long registers, would wait for these words to be in the
      // cache, behind the last tile's output.
      TileArgs args{.a = block.quantized + row * block.quantized_stride,
                    .a_stride = block.quantized_stride,
                    .b = panels,
                    .panel_stride = distance * panel_bytes,
                    .quads = block.quads,
                    .weight_sum = block.weight_sum + first * kPanelColumns,
                    .weight_sum_stride = distance * kPanelColumns,
                    .next = next + row / height * step * block.quads,
                    .next_step = step,
                    .c = nullptr};
      make(block, {row, rows, count}, args, sums);
      each_tile(use);
    }
  }
};

template <class T>
void multiply(const QuantizedLinearBlock& block) {
  if (block.group_quads)
    return Tiles<float>{block, sum_groups, fetch_residual<T, float>, finish<T, float>}.run();
  if (block.quads * kQuad > kMaxSummed)
    return Tiles<float>{block, sum_blocks, fetch_residual<T, float>, finish<T, float>}.run();
  Tiles<int32_t>{block, sum_whole, fetch_residual<T, int32_t>, finish<T, int32_t>}.run();
}

void store_sums(const LinearEpilogue& to, const LinearTile<int32_t>& tile) {
  int32_t* output = static_cast<int32_t*>(to.output) + tile.row * to.output_stride + tile.column;
  for (int64_t r = 0; r < tile.rows; ++r, output += to.output_stride) {
    memcpy(output, tile.sum + r * tile.stride, (size_t)tile.columns * sizeof(int32_t));
  }
}

void accumulate(const QuantizedLinearBlock& block) {
  Tiles<int32_t>{block, sum_whole, fetch_residual<float, int32_t>, store_sums}.run();
}

// --- quantization --------------------------------------------------------------------------------

// Largest magnitude as the bits of a float: as integers, finite < infinity < NaN, so one maximum
// finds the range and whatever is not finite.
template <class T>
int32_t largest_bits(const T* x, int64_t size) {
  const VecI32 magnitude = VecI32{} + 0x7fffffff;
  const auto larger = [](VecI32 a, VecI32 b) { return a > b ? a : b; };
  VecI32 most[4] = {};
  int64_t k = 0;
  for (; k + 4 * kLanesF <= size; k += 4 * kLanesF) {
    UNROLL for (int i = 0; i < 4; ++i) {
      most[i] = larger(most[i], (VecI32)load(x + k + i * kLanesF) & magnitude);
    }
  }
  for (; k + kLanesF <= size; k += kLanesF)
    most[0] = larger(most[0], (VecI32)load(x + k) & magnitude);
  if (k < size) most[0] = larger(most[0], (VecI32)load_partial(x + k, size - k) & magnitude);
  most[0] = larger(larger(most[0], most[1]), larger(most[2], most[3]));
  int32_t result = 0;
  for (int i = 0; i < kLanesF; ++i) result = most[0][i] > result ? most[0][i] : result;
  return result;
}

inline void store_quantized(int8_t* p, VecF x, VecF inverse) {
  // 1.5 * 2^23 rounds half to even, and its own low byte is zero: what is left there is q.
  const VecF rounded = x * inverse + 12582912.0f;
  const VecI8 q = low_bytes((VecI32)rounded) ^ kFlip;
  memcpy(p, &q, sizeof q);
}

constexpr int64_t whole_quads(int64_t size) { return ceil_div(size, kQuad) * kQuad; }

template <class T>
float quantize_group(const T* x, int64_t size, int8_t* quantized) {
  constexpr int32_t kInfinityBits = 0x7f800000;
  constexpr float kTiny = 0x1p-126f;
  const int32_t bits = largest_bits(x, size);
  if (bits >= kInfinityBits) {
    memset(quantized, kFlip, (size_t)whole_quads(size));
    return __builtin_nanf("");
  }
  float largest;
  memcpy(&largest, &bits, sizeof largest);
  const float quotient = largest / 127.0f;
  const float scale = quotient < kTiny ? kTiny : quotient;
  const VecF inverse = broadcast<VecF>(1.0f / scale);
  int64_t k = 0;
  for (; k + kLanesF <= size; k += kLanesF) store_quantized(quantized + k, load(x + k), inverse);
  if (k < size) {
    int8_t last[kLanesF];
    store_quantized(last, load_partial(x + k, size - k), inverse);
    memcpy(quantized + k, last, (size_t)whole_quads(size - k));
  }
  return scale;
}

template <class T>
void quantize(const QuantizeRows& rows) {
  const int64_t size = rows.group_size ? rows.group_size : rows.in_features;
  float* scale = rows.scale;
  for (int64_t r = 0; r < rows.rows; ++r) {
    const T* x = static_cast<const T*>(rows.input) + r * rows.input_stride;
    int8_t* quantized = rows.quantized + r * rows.quantized_stride;
    int64_t k = 0;
    do {  // a row of no elements has a scale too
      const int64_t rest = rows.in_features - k;
      *scale++ = quantize_group(x + k, rest < size ? rest : size, quantized + k);
      k += size;
    } while (k < rows.in_features);
  }
}

}  // namespace

extern const QuantizedLinearKernels quantized_linear;
const QuantizedLinearKernels quantized_linear{
    .quantize = {quantize<float>, nullptr, quantize<BFloat16>, quantize<Float16>},
    .multiply = {multiply<float>, nullptr, multiply<BFloat16>, multiply<Float16>},
    .accumulate = accumulate,
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
