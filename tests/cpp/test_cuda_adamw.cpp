// The CUDA kernels of the AdamW step, emulated: the same bits as the CPU's kernels.
#include <string>

#include "adamw_run.h"
#include "ops/cuda/adamw_batches.h"

using namespace torchweld::kernels;
using namespace torchweld::kernels::cuda;
using namespace torchweld::ops;

namespace {

constexpr double kLr = 1e-3;

// Pointers `elements` further on, as those of a view; scales stay.
AdamWSpan shifted(AdamWSpan s, const AdamWMode& mode, int64_t elements) {
  const auto on = [&](void* data, size_t size) -> void* {
    return data == nullptr ? nullptr : static_cast<char*>(data) + elements * size;
  };
  const size_t p = size_of(mode.dtype), m = state_size(mode.dtype, mode.state, mode.rounding);
  s.param = on(s.param, p);
  s.grad = on(const_cast<void*>(s.grad), p);
  s.exp_avg = on(s.exp_avg, m);
  s.exp_avg_sq = on(s.exp_avg_sq, m);
  s.max_exp_avg_sq = on(s.max_exp_avg_sq, m);
  s.compensation = on(s.compensation, 2);
  s.size -= elements;
  return s;
}

// Tensors and their tables, in what stands for device memory.
class Device {
 public:
  explicit Device(int64_t chunk_size) : chunk_size_(chunk_size) {}

  void add(const AdamWMode& mode, const AdamWSpan& span, int64_t row = 0, int64_t stride = 0) {
    kinds_.push_back({mode.dtype, mode.state, mode.rounding, mode.amsgrad});
    tensors.push_back({.span = span,
                       .row = row,
                       .stride = stride,
                       .step_count = nullptr,
                       .group = 0,
                       .id = 7,
                       .average = nullptr,
                       .bfloat16_weight = nullptr});
    grads.push_back({span.grad, span.size, mode.dtype});
    steps.push_back(2);  // AdamWRun::fill() did two
  }

  void step() {
    for (size_t t = 0; t < tensors.size(); ++t) {
      tensors[t].step_count = &steps[share_a_count ? 0 : t];
    }
    std::vector<AdamWScalars> scalars(tensors.size());
    ChunkRuns cut(kAdamWSumPiece);
    for (size_t t = 0; needs_norm && t < tensors.size(); ++t) cut.add(t, tensors[t].span.size);
    const std::vector<Chunk> pieces = chunks_of(cut);
    std::vector<double> squares(pieces.size() + 1);  // so that it is somewhere
    std::vector<int64_t> nonfinite(pieces.size() + 1);
    ok(launch_sum_of_squares({.tensors = grads.data(),
                              .pieces = pieces.data(),
                              .count = static_cast<int64_t>(pieces.size()),
                              .squares = squares.data(),
                              .nonfinite = nonfinite.data()},
                             nullptr));
    prepare.squares = needs_norm ? squares.data() : nullptr;
    prepare.nonfinite = nonfinite.data();
    prepare.pieces = static_cast<int64_t>(pieces.size());
    prepare.tensors = tensors.data();
    prepare.count = static_cast<int64_t>(tensors.size());
    prepare.groups = &group;
    prepare.scalars = scalars.data();
    int32_t skipped = -1;
    prepare.skipped = &skipped;
    prepare.report = report;
    ok(launch_adamw_prepare(prepare, nullptr));
    std::vector<MemoryRange> params;
    std::vector<int64_t> sizes;
    int64_t elements = 0;
    for (size_t t = 0; t < tensors.size(); ++t) {
      const auto* begin = static_cast<const char*>(tensors[t].span.param);
      elements += tensors[t].span.size;
      sizes.push_back(tensors[t].span.size);
      params.emplace_back(begin, begin + tensors[t].span.size * size_of(kinds_[t].param));
    }
    ChunkRuns runs(chunk_size_);
    const std::vector<AdamWBatch> batches = batches_of(params, sizes, kinds_, runs);
    const std::vector<Chunk> chunks = chunks_of(runs);
    std::vector<AdamWStatistics> statistics(observes ? chunks.size() : 0);
    for (const AdamWBatch& batch : batches) {
      ok(launch_adamw_step(batch.kind,
                           {.tensors = tensors.data(),
                            .grads = grads.data(),
                            .scalars = scalars.data(),
                            .skipped = &skipped,
                            .chunks = chunks.data() + batch.first,
                            .count = batch.count,
                            .chunk_size = chunk_size_,
                            .statistics = observes ? statistics.data() + batch.first : nullptr,
                            .average_weight = 0.25},
                           nullptr));
    }
    if (!observes) return;
    ok(launch_adamw_report({.statistics = statistics.data(),
                            .count = static_cast<int64_t>(chunks.size()),
                            .elements = elements,
                            .skipped = &skipped,
                            .report = report},
                           nullptr));
  }

  std::vector<Values> grads;
  std::vector<AdamWTensor> tensors;
  std::vector<float> steps;
  AdamWGroup group{kLr, 0.9, 0.999, 1e-8, 0.01, 1, nullptr, DType::float64};
  AdamWPrepareParams prepare{};
  bool needs_norm = false, observes = false, share_a_count = false;
  double report[5];

 private:
  static void ok(cudaError_t error) { CHECK(error == cudaSuccess, "error %d", error); }

  static std::vector<Chunk> chunks_of(const ChunkRuns& runs) {
    std::vector<Chunk> chunks(static_cast<size_t>(runs.end()));
    ok(launch_chunks(runs.runs().data(), static_cast<int64_t>(runs.runs().size()), chunks.data(),
                     nullptr));
    return chunks;
  }

  int64_t chunk_size_;
  std::vector<AdamWKind> kinds_;
};

std::string describe(const AdamWMode& mode, int64_t size) {
  return "dtype " + std::to_string(static_cast<int>(mode.dtype)) + " state " +
         std::to_string(static_cast<int>(mode.state)) + " rounding " +
         std::to_string(static_cast<int>(mode.rounding)) + " amsgrad " +
         std::to_string(mode.amsgrad) + " size " + std::to_string(size);
}

// One tensor, two steps, as the CPU; `shift`: a view that begins so many elements into the memory.
void check_as_on_cpu(const AdamWMode& mode, int64_t size, int64_t shift, int64_t chunk_size) {
  AdamWRun run(size + shift, mode);
  run.fill(3);
  const AdamWRun expected(run);
  Device device(chunk_size);
  device.add(mode, shifted(run.span(5), mode, shift));
  for (int step = 3; step <= 4; ++step) {
    device.step();
    table(detect_capability())
        .adamw->step(mode.dtype, mode.state, mode.rounding)(shifted(expected.span(5), mode, shift),
                                                            AdamWRun::scalars_of(step, kLr));
    CHECK(run == expected, "step %d: %s", step, describe(mode, size).c_str());
    CHECK(device.steps[0] == step, "the step is counted");
  }
}

// A list of all kinds at once, with an empty tensor.
void check_mixed_list() {
  std::vector<AdamWRun> runs, expected;
  int64_t size = 1;
  for (const AdamWMode& mode : adamw_modes()) {
    runs.emplace_back(size, mode).fill(static_cast<unsigned>(size));
    runs.emplace_back(size + 300, mode).fill(static_cast<unsigned>(size));
    size += 97;
  }
  runs.emplace_back(0, AdamWMode{DType::float32});
  Device device(1 << 11);
  for (const AdamWRun& run : runs) {
    expected.emplace_back(run);
    device.add(run.mode, run.span());
  }
  device.grads.back().data = nullptr;  // as torch has it; the steps count all the same
  device.step();
  for (size_t t = 0; t < runs.size(); ++t) {
    expected[t].step(AdamWRun::scalars_of(3, kLr));
    CHECK(runs[t] == expected[t], "tensor %zu: %s", t,
          describe(runs[t].mode, runs[t].size).c_str());
    CHECK(device.steps[t] == 3, "steps of tensor %zu", t);
  }
}

// Two columns of four of a matrix of 6 rows: the random bits are those of the whole.
void check_shards() {
  for (AdamWRounding rounding : {AdamWRounding::stochastic, AdamWRounding::split}) {
    const AdamWMode mode{DType::bfloat16, AdamWState::bfloat16, rounding};
    AdamWRun run(12, mode);
    run.fill(1);
    const AdamWRun expected(run);
    Device device(1 << 11);
    device.add(mode, run.span(2), 2, 4);
    device.step();
    for (int64_t row = 0; row < 6; ++row) {
      AdamWSpan span = shifted(expected.span(2 + 4 * row), mode, 2 * row);
      span.size = 2;
      table(detect_capability())
          .adamw->step(mode.dtype, mode.state, mode.rounding)(span, AdamWRun::scalars_of(3, kLr));
    }
    CHECK(run == expected, "%s", describe(mode, 12).c_str());
  }
}

double sum_on_cpu(const Values& tensor) {
  const auto sum = table(detect_capability()).adamw->sum_of_squares[static_cast<int>(tensor.dtype)];
  std::vector<double> pieces;
  for (int64_t i = 0; i < tensor.size; i += kAdamWSumPart) {
    if (i % kAdamWSumPiece == 0) pieces.push_back(0);
    pieces.back() += sum(static_cast<const char*>(tensor.data) + i * size_of(tensor.dtype),
                         std::min(kAdamWSumPart, tensor.size - i));
  }
  return adamw_total(pieces.data(), static_cast<int64_t>(pieces.size()));
}

void check_norm() {
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    for (int64_t size : {0, 1, 31, 257, 2049, 16384, 40000}) {
      AdamWRun run(size, {dtype});
      run.fill(2);
      Device device(1 << 11);
      device.add(run.mode, run.span());
      device.needs_norm = true;
      device.step();
      const double expected = std::sqrt(sum_on_cpu(device.grads[0]));
      CHECK(device.report[0] == expected, "%.17g, %.17g", device.report[0], expected);
      CHECK(device.report[1] == 0, "not skipped");
    }
  }
}

void check_clipping_and_scaling() {
  AdamWRun run(5000, {DType::float32});
  run.fill(2);
  const AdamWRun expected(run);
  Device device(1 << 11);
  device.add(run.mode, run.span());
  device.needs_norm = true;
  const float loss_scale = 8;
  const double max_grad_norm = 0.01;
  device.prepare.loss_scale = &loss_scale;
  device.prepare.loss_scale_dtype = DType::float32;
  device.prepare.max_grad_norm = max_grad_norm;
  const double lr = 5e-4;  // in place of the group's
  device.group.lr_data = &lr;
  device.group.sign = -1;
  device.step();
  const double norm = std::sqrt(sum_on_cpu(device.grads[0])) / 8;
  AdamWScalars scalars = AdamWRun::scalars_of(3, lr);
  scalars.grad_scale = -(1.0 / 8 * (max_grad_norm / (norm + 1e-6)));
  expected.step(scalars);
  CHECK(device.report[0] == norm && norm > max_grad_norm, "%g", norm);
  CHECK(run == expected, "clipped");
}

void check_skipping() {
  for (bool by_scale : {false, true}) {
    AdamWRun run(3000, {DType::float32, AdamWState::int8});
    run.fill(2);
    run.set_grad(10, INFINITY);
    run.set_grad(2999, NAN);
    const AdamWRun before(run);
    Device device(1 << 11);
    device.add(run.mode, run.span());
    device.needs_norm = true;
    const double loss_scale = 2;
    device.prepare.loss_scale = by_scale ? &loss_scale : nullptr;
    device.prepare.loss_scale_dtype = DType::float64;
    device.prepare.skip_nonfinite = !by_scale;
    device.step();
    CHECK(run == before && device.steps[0] == 2, "nothing is written");
    CHECK(device.report[1] == 1 && device.report[4] == 2, "%g", device.report[4]);
    CHECK(!std::isfinite(device.report[0]) && std::isnan(device.report[2]), "norms");
    device.prepare.loss_scale = nullptr;
    device.prepare.skip_nonfinite = false;
    device.step();
    before.step(AdamWRun::scalars_of(3, kLr));
    CHECK(std::isnan(run.weight(2999)) && run.weight(5) == before.weight(5), "else it goes on");
  }
  // A norm that overflows without an infinity is no reason; the sum of others is.
  AdamWRun run(20, {DType::float64});
  run.fill(2);
  run.set_grad(3, 1e200);
  Device device(1 << 11);
  device.add(run.mode, run.span());
  device.needs_norm = true;
  device.prepare.skip_nonfinite = true;
  device.step();
  CHECK(device.report[1] == 0 && std::isinf(device.report[0]) && device.steps[0] == 3, "overflow");
  const double elsewhere = NAN;
  device.prepare.sum_of_squares = &elsewhere;
  device.step();
  CHECK(device.report[1] == 1 && device.report[4] == 0 && device.steps[0] == 3, "elsewhere");
}

void check_codes() {
  for (int64_t size : {1, 256, 1000}) {
    for (bool is_signed : {true, false}) {
      Array<float> values(size), decoded(size), expected_values(size);
      std::mt19937 random(1);
      std::normal_distribution<float> normal;
      for (int64_t i = 0; i < size; ++i) {
        values[i] = i % 7 == 0 ? 0 : is_signed ? normal(random) : std::pow(normal(random), 2.0f);
      }
      const int64_t blocks = (size + kAdamWBlock - 1) / kAdamWBlock;
      Array<uint8_t> codes(size), expected_codes(size);
      Array<float> scales(blocks), expected_scales(blocks);
      const AdamWKernels& cpu = *table(detect_capability()).adamw;
      launch_adamw_encode({&values[0], &codes[0], &scales[0], size, is_signed}, nullptr);
      (is_signed ? cpu.encode_exp_avg : cpu.encode_exp_avg_sq)(&values[0], size, &expected_codes[0],
                                                               &expected_scales[0]);
      CHECK(codes == expected_codes && scales == expected_scales, "%ld", static_cast<long>(size));
      launch_adamw_decode({&decoded[0], &codes[0], &scales[0], size, is_signed}, nullptr);
      (is_signed ? cpu.decode_exp_avg : cpu.decode_exp_avg_sq)(&codes[0], &scales[0], size,
                                                               &expected_values[0]);
      CHECK(decoded == expected_values, "%ld", static_cast<long>(size));
    }
  }
}

// More sums than one for each thread that adds them up.
void check_totals() {
  for (int64_t count : {0, 1, 511, 512, 1300}) {
    std::vector<double> sums;
    std::mt19937 random(3);
    std::normal_distribution<double> normal;
    double exact = 0;
    for (int64_t i = 0; i < count; ++i) exact += sums.emplace_back(std::abs(normal(random)));
    double total = -1;
    CHECK(launch_total({sums.data(), count, false, &total}, nullptr) == cudaSuccess, "total");
    CHECK(total == adamw_total(sums.data(), count), "%.17g", total);
    CHECK(std::abs(total - exact) <= 1e-12 * exact, "%.17g, %.17g", total, exact);
  }
}

// What an observed step sees and keeps is what the CPU sees and keeps; its results are the same.
void check_observed(const AdamWMode& mode, int64_t size) {
  AdamWRun run(size, mode);
  run.fill(4);
  const bool finite = mode.dtype == DType::float16;  // set_grad() knows of no infinity there
  if (!finite) run.set_grad(size / 2, INFINITY);
  const AdamWRun expected(run), before(run);
  const bool is_double = mode.dtype == DType::float64;
  Array<double> average(size, 0.5), expected_average(size, 0.5);
  Array<float> single(size, 0.5f), expected_single(size, 0.5f);
  Array<uint16_t> copy(size), expected_copy(size);
  Device device(1 << 11);
  device.add(mode, run.span());
  device.observes = true;
  device.tensors[0].average = is_double ? static_cast<void*>(&average[0]) : &single[0];
  device.tensors[0].bfloat16_weight = reinterpret_cast<BFloat16*>(&copy[0]);
  device.step();
  const AdamWScalars scalars = AdamWRun::scalars_of(3, kLr);
  expected.step(scalars);
  CHECK(run == expected, "%s", describe(mode, size).c_str());
  AdamWStatistics seen{};
  table(detect_capability())
      .adamw->observe(mode.dtype, mode.state, mode.rounding)(
          expected.span(), scalars,
          {.param_before = &before.p[0],
           .compensation_before = before.c.size > 0 ? &before.c[0] : nullptr,
           .ema = is_double ? static_cast<void*>(&expected_average[0]) : &expected_single[0],
           .ema_weight = 0.25,
           .bfloat16 = reinterpret_cast<BFloat16*>(&expected_copy[0])},
          &seen);
  CHECK(average == expected_average && single == expected_single, "average");
  CHECK(copy == expected_copy, "copy");
  CHECK(device.report[3] == static_cast<double>(seen.lost) / static_cast<double>(size), "lost");
  CHECK(device.report[4] == !finite && seen.nonfinite == !finite, "%g", device.report[4]);
  CHECK(std::isfinite(device.report[2]) == std::isfinite(seen.update_squares), "infinite");

  // Where all is finite, the norm of the update up to the order of additions.
  AdamWRun other(size, mode);
  other.fill(5);
  const AdamWRun start(other);
  Device again(1 << 11);
  again.add(mode, other.span());
  again.observes = true;
  again.step();
  double squares = 0;
  for (int64_t i = 0; i < size; ++i) squares += std::pow(other.weight(i) - start.weight(i), 2);
  CHECK(std::abs(again.report[2] - std::sqrt(squares)) <= 1e-6 * std::sqrt(squares), "%g, %g",
        again.report[2], std::sqrt(squares));
}

void check_a_shared_count() {
  AdamWRun first(300, {DType::float32}), second(700, {DType::float32});
  first.fill(1);
  second.fill(2);
  const AdamWRun expected(second);
  Device device(1 << 11);
  device.add(first.mode, first.span());
  device.add(second.mode, second.span());
  device.share_a_count = true;
  device.step();
  expected.step(AdamWRun::scalars_of(3, kLr));
  CHECK(second == expected && device.steps[0] == 4, "%g steps", device.steps[0]);
}

// Bias corrections have the bits of the host's, far past a count for each thread.
void check_bias_corrections() {
  constexpr int kSteps = 1200;
  std::vector<AdamWTensor> tensors(kSteps);
  std::vector<float> counts(kSteps);
  std::vector<AdamWScalars> scalars(kSteps);
  for (int t = 0; t < kSteps; ++t) {
    counts[t] = static_cast<float>(t);
    tensors[t].step_count = &counts[t];
  }
  counts.back() = 0x1p24f;  // the most that is counted
  const AdamWGroup group{kLr, 0.9, 0.999, 1e-8, 0.01, 1, nullptr, DType::float64};
  AdamWPrepareParams prepare{};
  int32_t skipped = -1;
  double report[5];
  prepare.tensors = tensors.data();
  prepare.count = kSteps;
  prepare.groups = &group;
  prepare.scalars = scalars.data();
  prepare.skipped = &skipped;
  prepare.report = report;
  CHECK(launch_adamw_prepare(prepare, nullptr) == cudaSuccess, "prepare");
  for (int t = 0; t + 1 < kSteps; ++t) {
    const AdamWScalars expected = AdamWRun::scalars_of(t + 1, kLr);
    CHECK(scalars[t].step_size == expected.step_size && scalars[t].bias_root == expected.bias_root,
          "step %d: %.17g, %.17g", t + 1, scalars[t].step_size, scalars[t].bias_root);
  }
  CHECK(scalars.back().step_size == kLr && scalars.back().bias_root == 1, "after all steps");
}

}  // namespace

int main() {
  for (const AdamWMode& mode : adamw_modes()) {
    for (int64_t size : {1, 15, 256, 300, 5003}) check_as_on_cpu(mode, size, 0, 1 << 11);
    check_as_on_cpu(mode, 5003, 0, 1 << 12);
    check_as_on_cpu(mode, 1000, 1, 1 << 11);
    check_observed(mode, 2301);
  }
  check_mixed_list();
  check_shards();
  check_norm();
  check_bias_corrections();
  check_clipping_and_scaling();
  check_skipping();
  check_codes();
  check_totals();
  check_a_shared_count();
}
