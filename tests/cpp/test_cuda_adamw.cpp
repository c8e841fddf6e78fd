// The CUDA kernels of the AdamW step, emulated: the same bits as the CPU's kernels.
#include <string>

#include "adamw_run.h"
#include "kernels/cuda/adamw.h"

using namespace torchweld::kernels;
using namespace torchweld::kernels::cuda;

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
    tensors_.push_back(
        {.span = span, .row = row, .stride = stride, .step_count = nullptr, .group = 0, .id = 7});
    grads.push_back({span.grad, span.size, mode.dtype});
    steps.push_back(2);  // AdamWRun::fill() did two
  }

  void step() {
    for (size_t t = 0; t < tensors_.size(); ++t) tensors_[t].step_count = &steps[t];
    std::vector<AdamWScalars> scalars(tensors_.size());
    std::vector<Chunk> pieces = needs_norm ? chunks_of(kAdamWSumPiece) : std::vector<Chunk>();
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
    prepare.tensors = tensors_.data();
    prepare.grads = grads.data();
    prepare.count = static_cast<int64_t>(tensors_.size());
    prepare.groups = &group;
    prepare.scalars = scalars.data();
    int32_t skipped = -1;
    prepare.skipped = &skipped;
    prepare.report = report;
    ok(launch_adamw_prepare(prepare, nullptr));
    std::vector<char> done(tensors_.size());
    for (size_t t = 0; t < tensors_.size(); ++t) {
      if (done[t]) continue;
      const auto alike = [&](size_t other) { return kinds_[other] == kinds_[t]; };
      for (size_t other = t; other < done.size(); ++other) done[other] |= alike(other);
      const std::vector<Chunk> chunks = chunks_of(chunk_size_, alike);
      ok(launch_adamw_step(kinds_[t],
                           {.tensors = tensors_.data(),
                            .grads = grads.data(),
                            .scalars = scalars.data(),
                            .skipped = &skipped,
                            .chunks = chunks.data(),
                            .count = static_cast<int64_t>(chunks.size()),
                            .chunk_size = chunk_size_},
                           nullptr));
    }
  }

  std::vector<Values> grads;
  std::vector<float> steps;
  AdamWGroup group{kLr, 0.9, 0.999, 1e-8, 0.01, 1, nullptr, DType::float64};
  AdamWPrepareParams prepare{};
  bool needs_norm = false;
  double report[5];

 private:
  static void ok(cudaError_t error) { CHECK(error == cudaSuccess, "error %d", error); }

  template <class Wanted = bool (*)(size_t)>
  std::vector<Chunk> chunks_of(
      int64_t size, const Wanted& wanted = [](size_t) { return true; }) const {
    std::vector<ChunkRun> runs;
    int64_t total = 0;
    for (size_t t = 0; t < tensors_.size(); ++t) {
      if (!wanted(t)) continue;
      const int64_t count = (tensors_[t].span.size + size - 1) / size;
      runs.push_back({total, static_cast<int32_t>(t), static_cast<int32_t>(count)});
      total += count;
    }
    std::vector<Chunk> chunks(static_cast<size_t>(total));
    ok(launch_chunks(runs.data(), static_cast<int64_t>(runs.size()), chunks.data(), nullptr));
    return chunks;
  }

  int64_t chunk_size_;
  std::vector<AdamWKind> kinds_;
  std::vector<AdamWTensor> tensors_;
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

// A list of all kinds at once, one of them without a gradient.
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
  device.grads[5].size = -1;
  device.grads.back().data = nullptr;  // as torch has it; the steps count all the same
  device.step();
  for (size_t t = 0; t < runs.size(); ++t) {
    if (t != 5) expected[t].step(AdamWRun::scalars_of(3, kLr));
    CHECK(runs[t] == expected[t], "tensor %zu: %s", t,
          describe(runs[t].mode, runs[t].size).c_str());
    CHECK(device.steps[t] == (t == 5 ? 2 : 3), "steps of tensor %zu", t);
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
  double total = 0;
  for (int64_t i = 0; i < tensor.size; i += kAdamWSumPiece) {
    total += sum(static_cast<const char*>(tensor.data) + i * size_of(tensor.dtype),
                 std::min(kAdamWSumPiece, tensor.size - i));
  }
  return total;
}

void check_norm() {
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    for (int64_t size : {0, 1, 31, 257, 16384, 40000}) {
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

void check_tables() {
  Array<uint64_t> from(1000), to(1000);
  for (int64_t i = 0; i < 1000; ++i) from[i] = static_cast<uint64_t>(i * i);
  CHECK(launch_write(&to[0], &from[0], 8000, nullptr) == cudaSuccess, "write");
  CHECK(to == from, "write");
  constexpr int kMultiprocessors = 132;
  for (int64_t elements : {int64_t{1}, int64_t{1} << 20, int64_t{25'000'000}, int64_t{1} << 33}) {
    const int64_t size = adamw_chunk_size(elements, kMultiprocessors);
    CHECK(size % kAdamWBlock == 0 && size >= 1 << 11 && size <= 1 << 15, "%ld",
          static_cast<long>(size));
    const bool fills = (elements + size - 1) / size >= 8 * kMultiprocessors;
    CHECK(fills || size == 1 << 11, "%ld elements", static_cast<long>(elements));
  }
  CHECK(adamw_chunk_size(int64_t{1} << 33, kMultiprocessors) == 1 << 15, "large chunks");
  int64_t none = 0;
  CHECK(launch_chunks(nullptr, none, nullptr, nullptr) == cudaSuccess, "nothing to do");
}

}  // namespace

int main() {
  for (const AdamWMode& mode : adamw_modes()) {
    for (int64_t size : {1, 15, 256, 300, 5003}) check_as_on_cpu(mode, size, 0, 1 << 11);
    check_as_on_cpu(mode, 5003, 0, 1 << 12);
    check_as_on_cpu(mode, 1000, 1, 1 << 11);
  }
  check_mixed_list();
  check_shards();
  check_norm();
  check_clipping_and_scaling();
  check_skipping();
  check_codes();
  check_tables();
}
