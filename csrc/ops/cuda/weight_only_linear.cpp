#include "kernels/cuda/linear_weight_only.h"
#include "ops/cuda/context.h"
#include "ops/cuda/linear.h"
#include "ops/cuda/linear_path.h"
#include "ops/quantized_linear.h"

namespace torchweld::ops {
namespace {

using namespace kernels::cuda;

Tensor weight_only_linear(Tensor input, Tensor packed_weight, Tensor weight_scale,
                          std::optional<Tensor> bias, std::optional<Tensor> residual,
                          int64_t in_features, String activation) {
  const char* op = "weight_only_linear";
  const LinearShape shape =
      check_weight_only_linear(op, input, packed_weight, weight_scale, in_features);
  check_devices(
      op, packed_weight,
      {{"input", input}, {"weight_scale", weight_scale}, {"bias", bias}, {"residual", residual}});

  const NoGradGuard no_grad;
  const CudaContext context(op, input);
  Tensor output = torch::stable::new_empty(input, with_last_size(input, shape.out_features));
  const CudaLinearTail tail(op, output, bias, residual, activation);
  if (output.numel() == 0) return output;
  const Input rows(input);
  const Tensor weight = aligned(packed_weight);
  const LinearDevice device{.multiprocessors = context.multiprocessors(), .has_wgmma = false};
  // float32 rows may take six bytes an element. A last chunk of few rows is multiplied as a call of
  // few rows is.
  const int64_t chunk = rows_at_a_time(shape.rows, 6 * in_features);
  std::optional<CudaScratch> scratch;
  for (int64_t row = 0; row < shape.rows; row += chunk) {
    WeightOnlyParams params{.input = rows.at(row),
                            .dtype = rows.dtype,
                            .input_stride = rows.rows.stride,
                            .rows = std::min(chunk, shape.rows - row),
                            .in_features = in_features,
                            .panels = weight.const_data_ptr<int8_t>(),
                            .columns = shape.out_features,
                            .end = tail.at(row),
                            .path = {},
                            .scratch = nullptr};
    params.path = linear_path(params.rows, shape.out_features, device);
    params.end.of.weight_scale = weight_scale.const_data_ptr<float>();
    if (const int64_t bytes = weight_only_scratch(params)) {
      const auto place = scratch.emplace().reserve<char>(bytes);
      scratch->allocate(input);
      params.scratch = scratch->at<char>(place);
    }
    context.check(launch_linear_weight_only(params, context.stream()));
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchweld, CUDA, m) {
  m.impl("weight_only_linear", TORCH_BOX(&weight_only_linear));
}

}  // namespace torchweld::ops
