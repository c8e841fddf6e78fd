// Dense convolution in bfloat16, where two steps of a run are one of the product.
#include <cstring>

#include "ops/cpu/conv_dense.h"
#include "ops/kernels.h"
#include "ops/parallel.h"
#include "ops/torch_compat.h"

namespace torchweld::ops::dense {

using kernels::kPanel;

void forward_block(const Plan& plan, const Windows<BFloat16>& windows, const Block& block,
                   const float* packed, const Target<BFloat16>& target,
                   const kernels::EpilogueOf<BFloat16>& epilogue, int64_t first, int64_t last) {
  const ConvolutionShape& s = plan.shape();
  const auto gemm = cpu_kernels().gemm_bf16->gemm;
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t column = panel * kPanel;
    kernels::GemmBF16Arguments g{};
    g.rows = block.columns;
    g.columns = std::min(kPanel, s.out_channels - column);
    g.runs = plan.runs();
    g.depth = plan.depth();
    g.a_row = s.stride_width * s.channels;
    g.b = reinterpret_cast<const BFloat16*>(packed + column * plan.packed_steps());
    g.width = panel_width(s.out_channels, panel);
    g.c_row = target.pixel;
    for (int64_t row = 0; row < block.rows; ++row) {
      g.a = windows.pointers() + row * plan.runs();
      g.c = target.at(block) + row * target.row + column;
      g.epilogue = epilogue;
      if (epilogue.bias != nullptr) g.epilogue.bias += column;
      if (epilogue.residual != nullptr) g.epilogue.residual += g.c - target.data;
      gemm(g);
    }
  }
}

void pack(const Plan& plan, const BFloat16* weight, float* packed) {
  const int64_t channels = plan.shape().out_channels, depth = plan.depth();
  const int64_t row = plan.steps(), pairs = plan.packed_steps();
  const auto pack_pairs = cpu_kernels().gemm->pack;
  parallel_for(panels_of(channels), 1, [&](int64_t begin, int64_t end) {
    std::vector<BFloat16> padded;  // a panel whose runs are whole pairs
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t column = panel * kPanel, columns = std::min(kPanel, channels - column);
      const BFloat16* from = weight + column * row;
      if (depth % 2 != 0) {
        padded.assign(columns * pairs * 2, {});
        for (int64_t i = 0; i < columns * plan.runs(); ++i) {
          std::memcpy(padded.data() + i * (depth + 1), from + i * depth, depth * sizeof(BFloat16));
        }
        from = padded.data();
      }
      // A pair moves as the float whose bits it has.
      pack_pairs(reinterpret_cast<const float*>(from), pairs, columns, pairs,
                 packed + column * pairs, panel_width(channels, panel));
    }
  });
}

}  // namespace torchweld::ops::dense
