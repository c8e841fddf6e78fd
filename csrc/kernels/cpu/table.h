// One table of kernels per instruction set.
#pragma once

#include "kernels/adamw.h"
#include "kernels/conv_bn_relu.h"
#include "kernels/cpu/capability.h"
#include "kernels/depthwise.h"
#include "kernels/dequantize.h"
#include "kernels/gemm.h"
#include "kernels/gemm_bf16.h"
#include "kernels/linear_int4.h"
#include "kernels/linear_weight_only.h"
#include "kernels/max_pool2d.h"
#include "kernels/quantized_linear.h"
#include "kernels/winograd.h"

namespace torchweld::kernels {

struct KernelTable {
  const AdamWKernels* adamw;
  const ConvBNReLUKernels* conv_bn_relu;
  const DepthwiseKernels* depthwise;
  const DequantizeKernels* dequantize;
  const GemmKernels* gemm;
  const LinearInt4Kernels* linear_int4;
  const WeightOnlyKernels* linear_weight_only;
  const MaxPool2dKernels* max_pool2d;
  const QuantizedLinearKernels* quantized_linear;
  const WinogradKernels* winograd;
  const GemmBF16Kernels* gemm_bf16 = nullptr;  // where there are instructions for it
};

// The kernels compiled for an instruction set. Call only one this machine can run.
const KernelTable& table(Capability capability);

}  // namespace torchweld::kernels
