// The gradient of the int4 linear layer for its input. Tensor cores want neighbours along the sum,
// here the layer's columns, in one word: of the 16 bytes a lane reads, four columns by an octet, it
// makes the words of eight input features. A weight (u - zero) * scale has twelve bits, two
// bfloat16 hold it exactly, and there are floats in registers only.
#include "kernels/cuda/async.h"
#include "kernels/cuda/linear_epilogue.h"
#include "kernels/cuda/linear_int4.h"
#include "kernels/cuda/linear_units.h"

namespace torchweld::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kStages = 3;
constexpr int kPanels = 2;   // in a step
constexpr int kOctets = 16;  // two by two warps, each with 64 input features x 32 rows
constexpr int kTileRows = 64;
constexpr int kTiles = 4;  // of 8 rows, in a warp
constexpr int kPanelBytes = kOctets * kUnitBytes;
constexpr int kRowBytes = kPanels * 16 * 2;
constexpr int kFirstBits = 0x4b000000;  // 2^23, whose last bit counts 1

template <int kParts>
constexpr int kStageBytes = kPanels * kPanelBytes + kParts * kTileRows * kRowBytes;

// A piece of 16 bytes of a row lies where the lanes that read at once find all banks.
TORCHWELD_INLINE int place(int line, int piece) { return 16 * (piece ^ (line & 2)); }

// Scales and zeros of a lane's four columns, in the group of its octet.
struct Columns {
  TORCHWELD_INLINE void load(const LinearInt4Gradient& p, int64_t panel, int64_t group, int first) {
    const bool exists = panel * kPanelColumns < p.columns && group < p.groups;
    const int64_t at = (panel * p.groups + group) * kPanelColumns + first;
    load_unit(p.weight_scale + at, exists, scales);
    zeros = exists ? *reinterpret_cast<const uint32_t*>(p.weight_zero + at) : 0u;
  }
  TORCHWELD_INLINE float value(uint32_t u, int column) const {
    const uint32_t pair = scales[column / 2];
    const float scale = float_of(column % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
    const uint32_t zero = zeros >> (8 * column) & 0xffu;
    return (float_of(kFirstBits | u) - float_of(kFirstBits | zero)) * scale;
  }
  uint32_t scales[2], zeros;
};

template <int kParts>
__global__ void __launch_bounds__(kThreads) gradient(LinearInt4Gradient p) {
  TORCHWELD_DYNAMIC_SHARED(memory);
  const StepLane lane;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int64_t octets = p.groups * p.group_size / kOctet;
  const int64_t across = (octets + kOctets - 1) / kOctets;
  const int64_t first_octet = blockIdx.x % across * kOctets;
  const int64_t first_row = blockIdx.x / across * kTileRows;
  const int64_t panels = (p.columns + kPanelColumns - 1) / kPanelColumns;
  const int steps = static_cast<int>((panels + kPanels - 1) / kPanels);

  const auto copy = [&](int step) {
    unsigned char* stage = memory + step % kStages * kStageBytes<kParts>;
    if (step < steps) {
      static_assert(kThreads == kPanels * kOctets * 4);
      const int64_t panel = int64_t{kPanels} * step + thread / 64;
      const int64_t octet = first_octet + thread % 64 / 4;
      const bool exists = panel < panels && octet < octets;
      const int64_t of = exists ? (panel * octets + octet) * kUnitBytes + thread % 4 * 16 : 0;
      copy_async(stage + thread * 16, p.panels + of, exists);
      stage += kPanels * kPanelBytes;
#pragma unroll
      for (int i = 0; i < kParts * kTileRows * 4 / kThreads; ++i) {
        const int at = i * kThreads + thread, line = at / 4, part = line / kTileRows;
        const int64_t row = first_row + line % kTileRows;
        const int64_t column = int64_t{kPanels} * kPanelColumns * step + at % 4 * 8;
        const bool is_there = row < p.rows && column < p.grad_stride;
        const int64_t from = is_there ? (part * p.rows + row) * p.grad_stride + column : 0;
        copy_async(stage + line * kRowBytes + place(line, at % 4), p.grad + from, is_there);
      }
    }
    commit_copies();
  };
  for (int step = 0; step < kStages - 1; ++step) copy(step);

  const int octet = warp % 2 * 8 + lane.g, row = warp / 2 * kTiles * kTokens;
  const int64_t group = (first_octet + octet) / (p.group_size / kOctet);
  Columns next;
  next.load(p, 0, group, 4 * lane.t);
  // Of tile j and pair i: input features 2 i and 2 i + 1 of the lane's octet, rows 2 t and 2 t + 1.
  float sums[kTiles][4][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    copy(step + kStages - 1);
    const unsigned char* stage = memory + step % kStages * kStageBytes<kParts>;
#pragma unroll 1  // two at once do not fit the registers
    for (int panel = 0; panel < kPanels; ++panel) {
      const Word words = *reinterpret_cast<const Word*>(stage + panel * kPanelBytes +
                                                        octet * kUnitBytes + lane.t * 16);
      const Columns of = next;
      next.load(p, int64_t{kPanels} * step + panel + 1, group, 4 * lane.t);
      uint32_t a[4][2][4];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // Feature 2 pair + i % 2; the first two columns, or the last two.
          const int shift = 8 * (2 * pair % 4 + i % 2) + (pair < 2 ? 0 : 4), column = i / 2 * 2;
          float x = of.value((i < 2 ? words.x : words.z) >> shift & 15u, column);
          float y = of.value((i < 2 ? words.y : words.w) >> shift & 15u, column + 1);
          a[pair][0][i] = take_pair(x, y);
          a[pair][1][i] = take_pair(x, y);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        // Tensor cores cut off what a sum does not hold. So the least parts come first, and the
        // sums over panels are rounded ones.
        float products[4][4] = {};
#pragma unroll
        for (int part = kParts - 1; part >= 0; --part) {
          const int line = part * kTileRows + row + tile * kTokens + lane.g;
          uint32_t b[2];
          load_unit(stage + kPanels * kPanelBytes + line * kRowBytes +
                        place(line, panel * 2 + lane.t / 2) + lane.t % 2 * 8,
                    true, b);
#pragma unroll
          for (int pair = 0; pair < 4; ++pair) mma_bf16(products[pair], a[pair][1], b);
#pragma unroll
          for (int pair = 0; pair < 4; ++pair) mma_bf16(products[pair], a[pair][0], b);
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) sums[tile][i / 4][i % 4] += products[i / 4][i % 4];
      }
    }
  }
  const int64_t feature = (first_octet + octet) * kOctet;
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int64_t to_row = first_row + row + i / 2 * kTokens + 2 * lane.t + i % 2;
    if (to_row >= p.rows) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t first = feature + 4 * half, left = p.in_features - first;
      float four[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) four[j] = sums[i / 2][2 * half + j / 2][j % 2 * 2 + i % 2];
      if (left <= 0) continue;
      store_four(p.output, p.dtype, to_row * p.in_features + first,
                 left < 4 ? static_cast<int>(left) : 4, four);
    }
  }
}

template <int kParts>
cudaError_t launch_for(const LinearInt4Gradient& p, cudaStream_t stream) {
  const int64_t octets = p.groups * p.group_size / kOctet;
  const int64_t blocks = (p.rows + kTileRows - 1) / kTileRows * ((octets + kOctets - 1) / kOctets);
  return launch_with_shared(gradient<kParts>, blocks, kThreads, kStages * kStageBytes<kParts>,
                            stream, p);
}

}  // namespace

cudaError_t launch_linear_int4_backward(const LinearInt4Gradient& p, cudaStream_t stream) {
  if (p.dtype == DType::float32) return launch_for<3>(p, stream);
  if (p.dtype == DType::bfloat16) return launch_for<1>(p, stream);
  if (p.dtype == DType::float16) return launch_for<2>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace torchweld::kernels::cuda
