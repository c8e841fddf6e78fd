// Small tensors on CUDA, emulated: all passes of batch norm in one launch, against the launches by
// themselves.
#include "batch_norm_problem.h"

using namespace torchweld::kernels;
using namespace torchweld::kernels::cuda;

namespace {

// What the launches by themselves give, but for other partial sums.
void check_small(const Problem& p, bool frozen) {
  if (!batch_norm_is_small(p.shape)) return;
  const size_t channels = static_cast<size_t>(p.c.channels);
  const DType dtype = p.shape.dtype;
  Results got(p), expected(p);
  std::vector<double> scratch = p.scratch(), mean(channels), var(channels), invstd(channels);
  BatchNormReLUParams params{p.shape, p.bn, p.x.data, p.residual_or_null(), got.y.data};
  params.bn.mean.data = mean.data(), params.bn.invstd.data = invstd.data();
  const auto statistics_into = [&](double* m, double* i) {
    return StatisticsParams{p.shape, p.x.data, scratch.data(), 1e-3, nullptr,
                            m,       nullptr,  var.data(),     i};
  };
  ok(launch_batch_norm_relu_train(statistics_into(mean.data(), invstd.data()), params, nullptr));
  std::vector<double> other_mean(channels), other_invstd(channels);
  ok(launch_batch_norm_statistics(statistics_into(other_mean.data(), other_invstd.data()),
                                  nullptr));
  const double roundoff = dtype == DType::float64 ? 0x1p-50 : 0x1p-21;
  for (int64_t c = 0; c < p.c.channels; ++c) {
    check_near(p, "mean", c, mean[c], other_mean[c], roundoff);
    check_near(p, "invstd", c, invstd[c], other_invstd[c], roundoff * (1 + other_invstd[c]));
  }
  // With the very statistics it found.
  params.y = expected.y.data;
  ok(launch_batch_norm_relu(params, nullptr));
  check_same(p, "y of a small tensor", got.y, expected.y);

  std::vector<double> sum_g(channels), sum_g_xhat(channels);
  std::vector<float> grad_weight(channels);
  ReduceParams sums{.shape = p.shape,
                    .bn = params.bn,
                    .x = p.x.data,
                    .residual = p.residual_or_null(),
                    .grad_y = p.grad_y.data,
                    .scratch = scratch.data(),
                    .sum_g = sum_g.data(),
                    .sum_g_xhat = sum_g_xhat.data(),
                    .grad_weight = {grad_weight.data(), DType::float32},
                    .grad_bias = {nullptr, DType::float32},
                    .grad_shift = {nullptr, DType::float32}};
  ApplyParams apply{.shape = p.shape,
                    .bn = params.bn,
                    .x = p.x.data,
                    .residual = p.residual_or_null(),
                    .grad_y = p.grad_y.data,
                    .sum_g = frozen ? nullptr : sum_g.data(),
                    .sum_g_xhat = frozen ? nullptr : sum_g_xhat.data(),
                    .count = nullptr,
                    .grad_x = got.grad_x.data,
                    .grad_residual = got.grad_residual.data};
  ok(launch_batch_norm_relu_backward(sums, apply, nullptr));
  apply.grad_x = expected.grad_x.data, apply.grad_residual = expected.grad_residual.data;
  ok(launch_batch_norm_relu_apply(apply, nullptr));
  check_same(p, "grad_x of a small tensor", got.grad_x, expected.grad_x);
  check_same(p, "grad_residual of a small tensor", got.grad_residual, expected.grad_residual);
  std::vector<double> other_g(channels), other_g_xhat(channels);
  sums.sum_g = other_g.data(), sums.sum_g_xhat = other_g_xhat.data();
  ok(launch_batch_norm_relu_reduce(sums, nullptr));
  const double bound = roundoff * 16 * (1 + static_cast<double>(p.shape.values()));
  for (int64_t c = 0; c < p.c.channels; ++c) {
    check_near(p, "sum_g", c, sum_g[c], other_g[c], bound);
    check_near(p, "sum_g_xhat", c, sum_g_xhat[c], other_g_xhat[c], bound * (1 + invstd[c]));
    CHECK(grad_weight[c] == static_cast<float>(other_g_xhat[c]) ||
              std::fabs(grad_weight[c] - other_g_xhat[c]) <= bound * (1 + invstd[c]),
          "%s", p.name.c_str());
  }
}

void check_what_is_small() {
  CHECK(batch_norm_is_small({8, 512, 49, Layout::columns, DType::bfloat16}), "8 images of 7 x 7");
  CHECK(!batch_norm_is_small({256, 64, 3136, Layout::columns, DType::bfloat16}), "256 of 56 x 56");
  CHECK(batch_norm_is_small({1, 256, 196, Layout::planes, DType::float32}), "an image of 14 x 14");
  CHECK(!batch_norm_is_small({256, 64, 3136, Layout::planes, DType::float32}), "256 of 56 x 56");
  CHECK(!batch_norm_is_small({0, 8, 49, Layout::columns, DType::float32}), "nothing");
}

}  // namespace

int main() {
  each_problem(check_small);
  check_what_is_small();
}
