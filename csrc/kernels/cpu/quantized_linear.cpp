// The int8 linear layer. A tile of kRows x kPanels panels is summed in registers over the whole K,
// lands in a buffer of a few hundred int32 that never leaves the first cache, and is finished
// there: no int32 matrix in memory. Sums are exact integers, so neither tile nor unrolling shows in
// the result.
#include "kernels/quantized_linear.h"

#include "kernels/cpu/linear_epilogue.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

#define UNROLL _Pragma("GCC unroll 16")

// --- tiles ---------------------------------------------------------------------------------------
// Each instruction set defines: the largest tile; how a quantized byte is stored (xor kFlip); and
// tile<R, P>, which writes the sums of R rows times P panels to c, [R][P * 16].

[[maybe_unused]] inline int32_t load_quad(const int8_t* p) {
  int32_t quad;
  memcpy(&quad, p, sizeof quad);
  return quad;
}

struct TileArgs {
  const int8_t* a;
  int64_t a_stride;
  const int8_t* b;
  int64_t panel_stride;
  int64_t quads;
  const int32_t* weight_sum;
  int32_t* c;
};

#if defined(__AVX512VNNI__)

constexpr int kRows = 8;
constexpr int kPanels = 3;
// vpdpbusd wants one side unsigned: activations are stored plus 128, and 128 times the column's sum
// is taken off again. Nothing saturates, and what wraps wraps back.
constexpr int8_t kFlip = -128;

template <int R, int P>
__attribute__((noinline)) void tile(const TileArgs& t) {
  // Few rows leave the multiplier waiting on its own result; more sums in flight hide that.
  constexpr int U = R == 1 ? 4 : R == 2 ? 2 : 1;
  __m512i acc[U][R][P];
  UNROLL for (int u = 0; u < U; ++u) {
    UNROLL for (int r = 0; r < R; ++r) {
      UNROLL for (int p = 0; p < P; ++p) {
        acc[u][r][p] = _mm512_setzero_si512();
        // Hides from GCC 12 that this is zero: it would spill the sums (35 % of peak, not 95 %).
        __asm__("" : "+v"(acc[u][r][p]));
      }
    }
  }
  const auto step = [&](int64_t k, __m512i(&sum)[R][P]) __attribute__((always_inline)) {
    __m512i b[P];
    UNROLL for (int p = 0; p < P; ++p) b[p] = _mm512_loadu_si512(t.b + p * t.panel_stride + k * 64);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m512i a = _mm512_set1_epi32(load_quad(t.a + r * t.a_stride + k * kQuad));
      UNROLL for (int p = 0; p < P; ++p) sum[r][p] = _mm512_dpbusd_epi32(sum[r][p], a, b[p]);
    }
  };
  int64_t k = 0;
  for (; k + U <= t.quads; k += U) {
    UNROLL for (int u = 0; u < U; ++u) step(k + u, acc[u]);
  }
  for (; k < t.quads; ++k) step(k, acc[0]);
  UNROLL for (int p = 0; p < P; ++p) {
    VecU32 sums;  // unsigned: 128 times a sum may wrap
    memcpy(&sums, t.weight_sum + p * kPanelColumns, sizeof sums);
    const __m512i offset = (__m512i)(sums * 128);
    UNROLL for (int r = 0; r < R; ++r) {
      __m512i sum = acc[0][r][p];
      UNROLL for (int u = 1; u < U; ++u) sum = _mm512_add_epi32(sum, acc[u][r][p]);
      _mm512_storeu_si512(t.c + (r * P + p) * kPanelColumns, _mm512_sub_epi32(sum, offset));
    }
  }
}

#elif defined(__AVX2__)

// Without VNNI: |a| * (b with the sign of a), summed in pairs to int16. Both sides lie within 127,
// and 2 * 127 * 127 = 32258 fits: exact, where unsigned times signed bytes would saturate.
constexpr int8_t kFlip = 0;

#if defined(__AVX512BW__)

constexpr int kRows = 8;
constexpr int kPanels = 2;
constexpr int kHalves = 1;
typedef __m512i Bytes;
inline Bytes zero() { return _mm512_setzero_si512(); }
inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline void store_sums(void* p, Bytes v) { _mm512_storeu_si512(p, v); }

struct Left {
  explicit Left(int32_t quad) {
    const __m512i a = _mm512_set1_epi32(quad);
    magnitude = _mm512_abs_epi8(a);
    negative = _mm512_movepi8_mask(a);
  }
  Bytes dot(Bytes sum, Bytes b) const {
    b = _mm512_mask_sub_epi8(b, negative, _mm512_setzero_si512(), b);
    const __m512i pairs = _mm512_maddubs_epi16(magnitude, b);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
  __m512i magnitude;
  __mmask64 negative;
};

#else

constexpr int kRows = 4;
constexpr int kPanels = 1;
constexpr int kHalves = 2;
typedef __m256i Bytes;
inline Bytes zero() { return _mm256_setzero_si256(); }
inline Bytes load_bytes(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline void store_sums(void* p, Bytes v) { _mm256_storeu_si256((__m256i*)p, v); }

struct Left {
  explicit Left(int32_t quad) : a(_mm256_set1_epi32(quad)), magnitude(_mm256_abs_epi8(a)) {}
  Bytes dot(Bytes sum, Bytes b) const {
    const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(b, a));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  __m256i a, magnitude;
};

#endif

template <int R, int P>
__attribute__((noinline)) void tile(const TileArgs& t) {
  constexpr int kVectors = P * kHalves;
  Bytes acc[R][kVectors];
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = zero();
      __asm__("" : "+v"(acc[r][v]));
    }
  }
  for (int64_t k = 0; k < t.quads; ++k) {
    Bytes b[kVectors];
    UNROLL for (int v = 0; v < kVectors; ++v) {
      b[v] = load_bytes(t.b + v / kHalves * t.panel_stride + k * 64 + v % kHalves * sizeof(Bytes));
    }
    UNROLL for (int r = 0; r < R; ++r) {
      const Left left(load_quad(t.a + r * t.a_stride + k * kQuad));
      UNROLL for (int v = 0; v < kVectors; ++v) acc[r][v] = left.dot(acc[r][v], b[v]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int v = 0; v < kVectors; ++v) {
      store_sums((char*)(t.c + r * P * kPanelColumns) + v * sizeof(Bytes), acc[r][v]);
    }
  }
}

#else

constexpr int kRows = 2;
constexpr int kPanels = 1;
constexpr int8_t kFlip = 0;

template <int R, int P>
void tile(const TileArgs& t) {
  for (int r = 0; r < R; ++r) {
    int32_t sum[kPanelColumns] = {};
    const int8_t* a = t.a + r * t.a_stride;
    for (int64_t k = 0; k < t.quads; ++k, a += kQuad) {
      const int8_t* b = t.b + k * kPanelColumns * kQuad;
      for (int n = 0; n < kPanelColumns; ++n, b += kQuad) {
        sum[n] += a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
      }
    }
    memcpy(t.c + r * kPanelColumns, sum, sizeof sum);
  }
}

#endif

// The tile compiled for exactly this many rows and panels.
template <int R, int P>
inline void any_tile(int64_t rows, int64_t panels, const TileArgs& args) {
  if constexpr (P > 1) {
    if (panels < P) return any_tile<R, P - 1>(rows, panels, args);
  }
  if constexpr (R > 1) {
    if (rows < R) return any_tile<R - 1, P>(rows, panels, args);
  }
  tile<R, P>(args);
}

// --- what becomes of a tile ----------------------------------------------------------------------

constexpr int kTileColumns = kPanels * kPanelColumns;

template <class T>
struct ToOutput {
  static void run(const LinearEpilogue& to, const LinearTile<int32_t>& tile) {
    finish<T>(to, tile);
  }
};

struct ToSums {
  static void run(const LinearEpilogue& to, const LinearTile<int32_t>& tile) {
    int32_t* output = static_cast<int32_t*>(to.output) + tile.row * to.output_stride + tile.column;
    for (int64_t r = 0; r < tile.rows; ++r, output += to.output_stride) {
      memcpy(output, tile.sum + r * tile.stride, (size_t)tile.columns * sizeof(int32_t));
    }
  }
};

// Panels outside, rows inside: a group of panels stays in the second cache while all rows pass.
template <class Finish>
void for_each_tile(const QuantizedLinearBlock& block) {
  const int64_t panel_stride = block.quads * kPanelColumns * kQuad;
  alignas(64) int32_t sum[kRows * kTileColumns];
  for (int64_t n = 0; n < block.columns; n += kTileColumns) {
    const int64_t rest = block.columns - n;
    const int64_t columns = rest < kTileColumns ? rest : kTileColumns;
    const int64_t panels = (columns + kPanelColumns - 1) / kPanelColumns;
    for (int64_t row = 0; row < block.rows; row += kRows) {
      const int64_t rows = block.rows - row < kRows ? block.rows - row : kRows;
      any_tile<kRows, kPanels>(rows, panels,
                               {.a = block.quantized + row * block.quantized_stride,
                                .a_stride = block.quantized_stride,
                                .b = block.panels + n / kPanelColumns * panel_stride,
                                .panel_stride = panel_stride,
                                .quads = block.quads,
                                .weight_sum = block.weight_sum + n,
                                .c = sum});
      Finish::run(block.epilogue, {.sum = sum,
                                   .stride = panels * kPanelColumns,
                                   .row = row,
                                   .rows = rows,
                                   .column = n,
                                   .columns = columns});
    }
  }
}

template <class T>
void multiply(const QuantizedLinearBlock& block) {
  for_each_tile<ToOutput<T>>(block);
}

void accumulate(const QuantizedLinearBlock& block) { for_each_tile<ToSums>(block); }

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

template <class T>
float quantize_row(const T* x, int64_t size, int8_t* quantized) {
  constexpr int32_t kInfinityBits = 0x7f800000;
  constexpr float kTiny = 0x1p-126f;
  const int32_t bits = largest_bits(x, size);
  if (bits >= kInfinityBits) {
    memset(quantized, kFlip, (size_t)((size + kQuad - 1) / kQuad * kQuad));
    return __builtin_nanf("");
  }
  float largest;
  memcpy(&largest, &bits, sizeof largest);
  const float quotient = largest / 127.0f;
  const float scale = quotient < kTiny ? kTiny : quotient;
  const VecF inverse = broadcast<VecF>(1.0f / scale);
  int64_t k = 0;
  for (; k + kLanesF <= size; k += kLanesF) store_quantized(quantized + k, load(x + k), inverse);
  if (k < size) store_quantized(quantized + k, load_partial(x + k, size - k), inverse);
  return scale;
}

template <class T>
void quantize(const QuantizeRows& rows) {
  const T* x = static_cast<const T*>(rows.input);
  for (int64_t r = 0; r < rows.rows; ++r) {
    rows.scale[r] = quantize_row(x + r * rows.input_stride, rows.in_features,
                                 rows.quantized + r * rows.quantized_stride);
  }
}

// --- dequantization ------------------------------------------------------------------------------

template <class T>
void dequantize(const DequantizePanels& block) {
  constexpr int64_t kChunk = 256;
  T* row = static_cast<T*>(block.output);
  for (int64_t n = 0; n < block.columns; ++n, row += block.in_features) {
    const int8_t* column = block.panels + n / kPanelColumns * block.quads * kPanelColumns * kQuad +
                           n % kPanelColumns * kQuad;
    const VecF scale = broadcast<VecF>(block.weight_scale[n]);
    for (int64_t k = 0; k < block.in_features; k += kChunk) {
      const int64_t size = block.in_features - k < kChunk ? block.in_features - k : kChunk;
      int8_t chunk[kChunk] = {};
      for (int64_t i = 0; i < size; i += kQuad) {
        memcpy(chunk + i, column + (k + i) * kPanelColumns, kQuad);
      }
      for (int64_t i = 0; i < size; i += kLanesF) {
        VecI8 q;
        memcpy(&q, chunk + i, sizeof q);
        const VecF value = __builtin_convertvector(widen(q), VecF) * scale;
        if (size - i >= kLanesF) {
          store(row + k + i, value);
        } else {
          store_partial(row + k + i, value, size - i);
        }
      }
    }
  }
}

}  // namespace

extern const QuantizedLinearKernels quantized_linear;
const QuantizedLinearKernels quantized_linear{
    .quantize = {quantize<float>, nullptr, quantize<BFloat16>, quantize<Float16>},
    .multiply = {multiply<float>, nullptr, multiply<BFloat16>, multiply<Float16>},
    .accumulate = accumulate,
    .dequantize = {dequantize<float>, nullptr, dequantize<BFloat16>, dequantize<Float16>},
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
