// The int4 product of few rows, as fast as the weight comes from memory. A block has 32 columns;
// its warps take spans of K in turn, up to four steps each, and ask for the next span before they
// multiply this one: 4 KB a warp are on their way. The integer sums of a warp go to shared memory,
// where one thread for four columns of a row adds them up, and joins those of groups in their
// order: no bit depends on the division of K.
#include "kernels/cuda/async.h"
#include "kernels/cuda/linear_epilogue.h"
#include "kernels/cuda/linear_int4.h"
#include "kernels/cuda/linear_units.h"
#include "kernels/cuda/quantize_row.h"

namespace torchweld::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSteps = 4;  // the most of a span

// K as steps of 32, each within one group. A piece is as much of a group as a warp sums at once.
struct Spans {
  int octets;        // of a group
  int steps;         // of a group; the last may be partly empty
  int span;          // steps of a span
  int piece;         // steps of a piece
  int pieces;        // of a span
  int group_pieces;  // of a group; 1 if a span has several
  int total;         // pieces of all K
};

Spans spans_of(int64_t groups, int64_t group_size, int most_pieces) {
  Spans s{};
  s.octets = groups > 0 ? static_cast<int>(group_size / kOctet) : 1;  // without K none has a size
  s.steps = (s.octets + kUnitsOfStep - 1) / kUnitsOfStep;
  s.span = kSteps;
  const auto fits = [&] {
    return s.steps % s.span == 0 || (s.span % s.steps == 0 && s.span / s.steps <= most_pieces);
  };
  while (!fits()) --s.span;
  s.piece = s.span < s.steps ? s.span : s.steps;
  s.pieces = s.span / s.piece;
  s.group_pieces = s.steps / s.piece;
  s.total = static_cast<int>(groups * s.group_pieces);
  return s;
}

// A step after the other of one span.
struct Walk {
  TORCHWELD_INLINE Walk(const Spans& s, int span) {
    const int piece = span * s.pieces;
    group = s.group_pieces == 1 ? piece : piece / s.group_pieces;
    step = (piece - group * s.group_pieces) * s.piece;
  }
  TORCHWELD_INLINE void next(const Spans& s) {
    if (++step == s.steps) step = 0, ++group;
  }
  // The lane's unit, and whether there is one.
  TORCHWELD_INLINE int unit(const Spans& s, int t) const {
    return group * s.octets + step * kUnitsOfStep + t;
  }
  TORCHWELD_INLINE bool exists(const Spans& s, int groups, int t) const {
    return group < groups && step * kUnitsOfStep + t < s.octets;
  }
  int group;
  int step;
};

// What warps leave for the thread that joins: [kWarps * pieces] times
constexpr int kRowWords = 36;  // sums of 32 columns in a row, that of the activations, no conflicts
constexpr int kScaleWords = 32;
constexpr int kZeroWords = 8;
struct Slots {
  TORCHWELD_INLINE Slots(unsigned char* memory, int slots, int rows)
      : sums(reinterpret_cast<int32_t*>(memory)),
        scales(reinterpret_cast<float*>(sums + slots * rows * kRowWords)),
        zeros(reinterpret_cast<uint8_t*>(scales + slots * kScaleWords)),
        rows(rows) {}
  TORCHWELD_INLINE int32_t* row(int slot, int i) const {
    return sums + (slot * rows + i) * kRowWords;
  }
  static constexpr int64_t bytes(int slots, int64_t rows) {
    return slots * (rows * kRowWords + kScaleWords + kZeroWords) * 4;
  }
  int32_t* sums;
  float* scales;
  uint8_t* zeros;
  int rows;
};

// The thread of four columns of a row.
struct Join {
  TORCHWELD_INLINE void add(const LinearInt4Params& p, const Spans& s, const Slots& slots, int slot,
                            int row, int quarter, int64_t to, int64_t column) {
    const int32_t* from = slots.row(slot, row);
    int32_t of_columns[4];
    memcpy(of_columns, from + 4 * quarter, sizeof of_columns);
#pragma unroll
    for (int i = 0; i < 4; ++i) part[i] += of_columns[i];
    activations += from[kStepColumns];
    if (++pieces < s.group_pieces) return;
    const uint8_t* zero = slots.zeros + slot * kStepColumns + 4 * quarter;
    const float* scale = slots.scales + slot * kScaleWords + 4 * quarter;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t sum = part[i] - zero[i] * activations;
      if (p.sums != nullptr && column + i < p.columns) {
        p.sums[(to * p.groups + group) * p.columns + column + i] = sum;
      }
      total[i] = fma(static_cast<float>(sum), scale[i], total[i]);
      part[i] = 0;
    }
    activations = pieces = 0;
    ++group;
  }
  int32_t part[4] = {}, activations = 0;
  int pieces = 0, group = 0;
  float total[4] = {};
};

struct Ready {};  // rows that are quantized

template <class T, int kTiles>
__global__ void __launch_bounds__(kThreads, 2)
    few_rows(LinearInt4Params p, Spans s, Int4Input input) {
  TORCHWELD_DYNAMIC_SHARED(memory);
  const StepLane lane;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t panels = (p.columns + kPanelColumns - 1) / kPanelColumns, pairs = (panels + 1) / 2;
  const int64_t pair = blockIdx.x % pairs, row = blockIdx.x / pairs * (kTiles * kTokens);
  const int64_t left = p.rows - row;
  const int rows = left < kTiles * kTokens ? static_cast<int>(left) : kTiles * kTokens;
  const int slots = kWarps * s.pieces;
  const int64_t panel = 2 * pair + lane.panel;
  const uint8_t* weights = p.panels + panel * p.groups * s.octets * kUnitBytes + lane.chunk * 16;

  const auto groups = static_cast<int>(p.groups);
  const auto ask = [&](int span, Word(&words)[kSteps]) {
    Walk walk(s, span);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const bool exists = i < s.span && panel < panels && walk.exists(s, groups, lane.t);
      words[i] = load_weights(weights + int64_t{kUnitBytes} * walk.unit(s, lane.t), exists);
      walk.next(s);
    }
  };
  Word words[kSteps];
  ask(warp, words);

  const int8_t* quantized = p.quantized + row * p.quantized_stride;
  unsigned char* first_slot = memory;
  if constexpr (!__is_same(T, Ready)) {
    using Quantizer = RowQuantizer<T, kThreads>;
    __shared__ typename Quantizer::Shared shared;
    __shared__ float scales[kTokens];
    auto* to = reinterpret_cast<int8_t*>(memory);
    for (int i = 0; i < rows; ++i) {
      const float scale = Quantizer::run(
          static_cast<const T*>(input.data) + i * input.stride, input.in_features,
          to + i * p.quantized_stride, p.quantized_stride, static_cast<int>(threadIdx.x), &shared);
      if (threadIdx.x == 0) {
        scales[i] = scale;
        if (input.scale != nullptr && blockIdx.x == 0) input.scale[i] = scale;
      }
      __syncthreads();
    }
    quantized = to;
    p.end.of.input_scale = scales;
    first_slot += rows * p.quantized_stride;
  }

  Join join;
  const int joined_row = static_cast<int>(threadIdx.x) / 8;
  const int quarter = static_cast<int>(threadIdx.x) % 8;
  const int64_t column = pair * kStepColumns + 4 * quarter;
  const int rounds = (s.total + slots - 1) / slots;
  for (int round = 0; round < rounds; ++round) {
    const int span = round * kWarps + warp;
    Word next[kSteps];
    ask(span + kWarps, next);
    // Activations, scales and zeros are in flight together.
    uint32_t b[kSteps][kTiles][2];
    Walk walk(s, span);
    const int group = walk.group;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const bool exists = i < s.span && walk.exists(s, groups, lane.t);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int token = n * kTokens + lane.g;
        load_unit(quantized + token * p.quantized_stride + kOctet * walk.unit(s, lane.t),
                  exists && token < rows, b[i][n]);
      }
      walk.next(s);
    }
    uint16_t scale[kSteps];
    uint8_t zero[kSteps];
    const int of_warp = static_cast<int>(threadIdx.x) % 32;
    const int64_t scales_panel = 2 * pair + of_warp / kPanelColumns;
#pragma unroll
    for (int f = 0; f < kSteps; ++f) {
      const bool exists = f < s.pieces && group + f < groups && scales_panel < panels;
      const int64_t at =
          (scales_panel * p.groups + group + f) * kPanelColumns + of_warp % kPanelColumns;
      scale[f] = exists ? p.weight_scale[at].bits : uint16_t{0};
      zero[f] = exists ? p.weight_zero[at] : uint8_t{0};
    }

    const Slots to(first_slot + (round & 1) * Slots::bytes(slots, rows), slots, rows);
    int slot = warp * s.pieces, steps = 0;
    StepSums<int32_t> sums[kTiles];
    int32_t activations[kTiles] = {};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (i >= s.span) break;
      const StepWeights<Int4Weights> step(words[i]);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        step.multiply(b[i][n], sums[n]);
        activations[n] = __dp4a(static_cast<int>(b[i][n][0]), 0x01010101, activations[n]);
        activations[n] = __dp4a(static_cast<int>(b[i][n][1]), 0x01010101, activations[n]);
      }
      if (++steps < s.piece) continue;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        activations[n] += __shfl_xor_sync(0xffffffffu, activations[n], 1);
        activations[n] += __shfl_xor_sync(0xffffffffu, activations[n], 2);
        const int token = n * kTokens + lane.g;
        if (lane.t == 0 && token < rows) to.row(slot, token)[kStepColumns] = activations[n];
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          const int of = n * kTokens + 2 * lane.t + which;
          int32_t four[4];
          sums[n].row(which, four);
          if (of < rows) store_four(to.row(slot, of) + 4 * lane.g, 4, four);
        }
        sums[n] = {};
        activations[n] = 0;
      }
      steps = 0;
      ++slot;
    }
#pragma unroll
    for (int f = 0; f < kSteps; ++f) {
      if (f >= s.pieces) break;
      const int at = (warp * s.pieces + f) * kStepColumns + of_warp;
      to.scales[at] = to_vec(BFloat16{scale[f]});
      to.zeros[at] = zero[f];
    }
    __syncthreads();
    if (joined_row < rows) {
      const int rest = s.total - round * slots, count = rest < slots ? rest : slots;
      for (int i = 0; i < count; ++i) {
        join.add(p, s, to, i, joined_row, quarter, row + joined_row, column);
      }
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) words[i] = next[i];
  }
  if (joined_row >= rows || p.sums != nullptr) return;
  const FourColumns four(p.end, column, p.columns);
  if (four.count > 0) four.finish(p.end, row + joined_row, join.total);
}

template <class T, int kTiles>
cudaError_t launch_for(const LinearInt4Params& p, const Int4Input& input, int64_t row_bytes,
                       cudaStream_t stream) {
  if (p.groups * p.group_size > INT32_MAX) return cudaErrorInvalidValue;
  // At most 80 KB of shared memory, so that two blocks fit.
  const Spans s = spans_of(p.groups, p.group_size, kSteps / kTiles);
  const int64_t panels = (p.columns + kPanelColumns - 1) / kPanelColumns;
  const int64_t tiles = (p.rows + kTiles * kTokens - 1) / (kTiles * kTokens);
  const int64_t rows = p.rows < kTiles * kTokens ? p.rows : kTiles * kTokens;
  const int64_t shared = 2 * Slots::bytes(kWarps * s.pieces, rows) + row_bytes;
  return launch_with_shared(few_rows<T, kTiles>, (panels + 1) / 2 * tiles, kThreads, shared, stream,
                            p, s, input);
}

}  // namespace

cudaError_t launch_int4_few_rows(const LinearInt4Params& p, cudaStream_t stream) {
  return p.rows <= kTokens ? launch_for<Ready, 1>(p, {}, 0, stream)
                           : launch_for<Ready, 2>(p, {}, 0, stream);
}

bool int4_quantizes_on_the_way(int64_t rows, int64_t padded_in_features) {
  return rows <= 4 && rows * int4_stride(padded_in_features) <= 32 << 10;
}

cudaError_t launch_linear_int4_of(const Int4Input& input, const LinearInt4Params& params,
                                  cudaStream_t stream) {
  LinearInt4Params p = params;
  p.quantized_stride = int4_stride(p.groups * p.group_size);
  const int64_t bytes = p.rows * p.quantized_stride;
  if (input.dtype == DType::float32) return launch_for<float, 1>(p, input, bytes, stream);
  if (input.dtype == DType::bfloat16) return launch_for<BFloat16, 1>(p, input, bytes, stream);
  if (input.dtype == DType::float16) return launch_for<Float16, 1>(p, input, bytes, stream);
  return cudaErrorInvalidValue;
}

cudaError_t launch_linear_int4(const LinearInt4Params& p, LinearPath path, cudaStream_t stream) {
  const bool in_steps = p.group_size % (kUnitsOfStep * kOctet) == 0;
  if (path == LinearPath::few_rows || !in_steps || p.sums != nullptr) {
    return launch_int4_few_rows(p, stream);
  }
  return launch_int4_tiles(p, path != LinearPath::small_tiles, stream);
}

}  // namespace torchweld::kernels::cuda
