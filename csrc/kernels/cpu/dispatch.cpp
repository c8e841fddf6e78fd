// The only file that knows every instruction set.
#include "kernels/cpu/table.h"

// Each kernel source is compiled once per instruction set, in a namespace of that name, and defines
// one of these tables there.
#define TORCHWELD_DECLARE_ISA(isa)                      \
  namespace torchweld::kernels::isa {                   \
  extern const AdamWKernels adamw;                      \
  extern const ConvBNReLUKernels conv_bn_relu;          \
  extern const DepthwiseKernels depthwise;              \
  extern const DequantizeKernels dequantize;            \
  extern const GemmKernels gemm_kernels;                \
  extern const LinearInt4Kernels linear_int4;           \
  extern const WeightOnlyKernels linear_weight_only;    \
  extern const MaxPool2dKernels max_pool2d;             \
  extern const QuantizedLinearKernels quantized_linear; \
  extern const WinogradKernels winograd;                \
  inline constexpr KernelTable table{                   \
      .adamw = &adamw,                                  \
      .conv_bn_relu = &conv_bn_relu,                    \
      .depthwise = &depthwise,                          \
      .dequantize = &dequantize,                        \
      .gemm = &gemm_kernels,                            \
      .linear_int4 = &linear_int4,                      \
      .linear_weight_only = &linear_weight_only,        \
      .max_pool2d = &max_pool2d,                        \
      .quantized_linear = &quantized_linear,            \
      .winograd = &winograd,                            \
  };                                                    \
  }

TORCHWELD_DECLARE_ISA(scalar)
#if defined(__x86_64__)
TORCHWELD_DECLARE_ISA(avx2)
TORCHWELD_DECLARE_ISA(avx512)
TORCHWELD_DECLARE_ISA(avx512_vnni)

namespace torchweld::kernels::avx512_bf16 {
extern const GemmBF16Kernels gemm_bf16;
// No other kernel gains from it.
inline constexpr KernelTable table = [] {
  KernelTable table = avx512_vnni::table;
  table.gemm_bf16 = &gemm_bf16;
  return table;
}();
}  // namespace torchweld::kernels::avx512_bf16
#endif

namespace torchweld::kernels {

const KernelTable& table(Capability capability) {
  switch (capability) {
#if defined(__x86_64__)
    case Capability::avx512_bf16:
      return avx512_bf16::table;
    case Capability::avx512_vnni:
      return avx512_vnni::table;
    case Capability::avx512:
      return avx512::table;
    case Capability::avx2:
      return avx2::table;
#endif
    default:
      return scalar::table;
  }
}

}  // namespace torchweld::kernels
