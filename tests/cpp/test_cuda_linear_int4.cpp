// The CUDA kernels of the int4 linear layer, emulated: the bits of the CPU's kernels.
#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "buffer.h"
#include "check.h"
#include "kernels/cuda/lane.h"
#include "kernels/cuda/linear_int4.h"
#include "kernels/cuda/linear_rows.h"
#include "kernels/cuda/quantized_linear.h"

using namespace torchweld::kernels;
using namespace torchweld::kernels::cuda;

namespace {

constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Exactly `size` elements on the heap, so that AddressSanitizer sees any access beyond them.
template <class T>
class Array {
 public:
  explicit Array(int64_t size) : data_(new(std::align_val_t(16)) T[size]()), size_(size) {}
  ~Array() { operator delete[](data_, std::align_val_t(16)); }
  Array(const Array&) = delete;
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  bool operator==(const Array& other) const {
    return size_ == other.size_ && std::memcmp(data_, other.data_, size_ * sizeof(T)) == 0;
  }

 private:
  T* data_;
  int64_t size_;
};

struct Shape {
  int64_t m, n, k, group_size;
};

struct Layer {
  explicit Layer(const Shape& s)
      : m(s.m),
        n(s.n),
        k(s.k),
        group_size(k > 0 ? s.group_size : 0),  // what the operators make of an empty weight
        groups(k > 0 ? round_up(k, group_size) / group_size : 0),
        x(m * k),
        packed(round_up(n, kPanelColumns) * groups * group_size / 2),
        scale(round_up(n, kPanelColumns) * groups),
        zero(round_up(n, kPanelColumns) * groups),
        bias(n),
        residual(m * n) {
    std::mt19937 random(1);
    std::uniform_real_distribution<float> uniform(-2, 2);
    for (int64_t i = 0; i < m * k; ++i) x[i] = uniform(random);
    for (int64_t i = 0; i < m * n; ++i) residual[i] = uniform(random);
    for (int64_t j = 0; j < n; ++j) bias[j] = uniform(random);
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = (j / 16 * groups + g) * 16 + j % 16;
        scale[at].bits = round_to_bfloat16(std::abs(uniform(random)) * 0.01f);
        zero[at] = static_cast<uint8_t>(random() % 16);
      }
      for (int64_t i = 0; i < k; ++i) {
        const int64_t byte = ((j / 16 * groups * group_size / 8 + i / 8) * 16 + j % 16) * 4 + i % 4;
        packed[byte] |= static_cast<uint8_t>(random() % 16 << (i % 8 >= 4 ? 4 : 0));
      }
    }
  }
  LinearEpilogue epilogue(LinearActivation activation, float* output) const {
    LinearEpilogue e{};
    e.activation = activation;
    e.residual = residual.data();
    e.residual_stride = n;
    e.output = output;
    e.output_stride = n;
    return e;
  }
  int64_t m, n, k, group_size, groups;
  Array<float> x;
  Array<uint8_t> packed;
  Array<BFloat16> scale;
  Array<uint8_t> zero;
  Array<float> bias, residual;
};

struct Result {
  explicit Result(const Layer& l) : sums(l.m * l.groups * l.n), scale(l.m), output(l.m * l.n) {}
  Array<int32_t> sums;
  Array<float> scale, output;
};

void run_on_cpu(const Layer& layer, LinearActivation activation, const Result& result) {
  const KernelTable& kernels = table(detect_capability());
  const int64_t stride = layer.groups * layer.group_size;
  const Array<int8_t> quantized(layer.m * stride);
  const Array<int32_t> group_sum(layer.m * layer.groups);
  kernels.quantized_linear->quantize[0]({.input = layer.x.data(),
                                         .input_stride = layer.k,
                                         .rows = layer.m,
                                         .in_features = layer.k,
                                         .quantized = quantized.data(),
                                         .quantized_stride = stride,
                                         .scale = result.scale.data(),
                                         .group_size = 0});
  kernels.linear_int4->prepare({.quantized = quantized.data(),
                                .quantized_stride = stride,
                                .rows = layer.m,
                                .in_features = layer.k,
                                .groups = layer.groups,
                                .group_size = layer.group_size,
                                .group_sum = group_sum.data()});
  LinearInt4Block block{.quantized = quantized.data(),
                        .quantized_stride = stride,
                        .group_sum = group_sum.data(),
                        .rows = layer.m,
                        .panels = layer.packed.data(),
                        .weight_scale = layer.scale.data(),
                        .weight_zero = layer.zero.data(),
                        .groups = layer.groups,
                        .group_size = layer.group_size,
                        .columns = layer.n,
                        .epilogue = {}};
  kernels.linear_int4->accumulate(block, result.sums.data(), layer.n);
  block.epilogue = layer.epilogue(activation, result.output.data());
  block.epilogue.bias = layer.bias.data();
  block.epilogue.input_scale = result.scale.data();
  kernels.linear_int4->multiply[0](block);
}

enum class Path { few, large_tiles, small_tiles, on_the_way };

bool is_tiles(Path path) { return path == Path::large_tiles || path == Path::small_tiles; }

void run_on_cuda(const Layer& layer, LinearActivation activation, Path path, const Result& result) {
  const int64_t stride = int4_stride(layer.groups * layer.group_size);
  const bool on_the_way = path == Path::on_the_way;
  const Array<int8_t> quantized(on_the_way ? 0 : layer.m * stride);
  LinearInt4Params params{.quantized = quantized.data(),
                          .quantized_stride = stride,
                          .rows = layer.m,
                          .panels = layer.packed.data(),
                          .weight_scale = layer.scale.data(),
                          .weight_zero = layer.zero.data(),
                          .groups = layer.groups,
                          .group_size = layer.group_size,
                          .columns = layer.n,
                          .end = {.of = layer.epilogue(activation, result.output.data()),
                                  .bias = layer.bias.data(),
                                  .bias_dtype = DType::float32,
                                  .output_dtype = DType::float32,
                                  .stores_sums = false},
                          .sums = nullptr};
  const auto run = [&] {
    if (on_the_way) {
      return launch_linear_int4_of({.data = layer.x.data(),
                                    .dtype = DType::float32,
                                    .stride = layer.k,
                                    .in_features = layer.k,
                                    .scale = result.scale.data()},
                                   params, nullptr);
    }
    return path == Path::few ? launch_int4_few_rows(params, nullptr)
                             : launch_int4_tiles(params, path == Path::large_tiles, nullptr);
  };
  if (!on_the_way) {
    CHECK(launch_quantize_rows(DType::float32,
                               {.input = layer.x.data(),
                                .input_stride = layer.k,
                                .rows = layer.m,
                                .in_features = layer.k,
                                .quantized = quantized.data(),
                                .quantized_stride = stride,
                                .scale = result.scale.data(),
                                .group_size = 0},
                               nullptr) == cudaSuccess,
          "quantize");
    params.end.of.input_scale = result.scale.data();
  }
  CHECK(run() == cudaSuccess, "product");
  if (is_tiles(path)) return;
  params.sums = result.sums.data();
  CHECK(run() == cudaSuccess, "sums");
}

void check(const Shape& shape, Path path) {
  const Layer layer(shape);
  const auto activation = static_cast<LinearActivation>((layer.m + layer.n + layer.k) % 5);
  const Result expected(layer), result(layer);
  run_on_cpu(layer, activation, expected);
  run_on_cuda(layer, activation, path, result);
  const auto same = [&](const char* what, const auto& a, const auto& b) {
    CHECK(a == b, "%s of %ld x %ld x %ld by %ld, path %d", what, static_cast<long>(shape.m),
          static_cast<long>(shape.n), static_cast<long>(shape.k),
          static_cast<long>(shape.group_size), static_cast<int>(path));
  };
  same("scales", result.scale, expected.scale);
  if (!is_tiles(path)) same("sums", result.sums, expected.sums);
  same("output", result.output, expected.output);
}

// The gradient against sums in double.
template <class T>
void check_gradient(const Shape& shape, DType dtype) {
  const Layer layer(shape);
  const int64_t m = layer.m, n = layer.n, k = layer.k, stride = round_up(n, 8);
  const int parts = int4_gradient_parts(dtype);
  const Array<T> grad(m * n), output(m * k);
  std::mt19937 random(2);
  std::uniform_real_distribution<float> uniform(-2, 2);
  for (int64_t i = 0; i < m * n; ++i) grad[i] = from_vec<T>(uniform(random));
  const Array<BFloat16> laid_out(parts * m * stride);
  CHECK(launch_lay_out_rows({.input = grad.data(),
                             .dtype = dtype,
                             .stride = n,
                             .rows = m,
                             .columns = n,
                             .output = laid_out.data(),
                             .output_stride = stride,
                             .parts = parts},
                            nullptr) == cudaSuccess,
        "rows");
  CHECK(launch_linear_int4_backward({.grad = laid_out.data(),
                                     .grad_stride = stride,
                                     .rows = m,
                                     .panels = layer.packed.data(),
                                     .weight_scale = layer.scale.data(),
                                     .weight_zero = layer.zero.data(),
                                     .groups = layer.groups,
                                     .group_size = layer.group_size,
                                     .columns = n,
                                     .in_features = k,
                                     .output = output.data(),
                                     .dtype = dtype},
                                    nullptr) == cudaSuccess,
        "gradient");
  const double unit = sizeof(T) == 4 ? 0 : __is_same(T, BFloat16) ? 0x1p-8 : 0x1p-11;
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t i = 0; i < k; ++i) {
      double expected = 0, magnitude = 0;
      for (int64_t j = 0; j < n; ++j) {
        const int64_t byte =
            ((j / 16 * layer.groups * layer.group_size / 8 + i / 8) * 16 + j % 16) * 4 + i % 4;
        const int u = i % 8 < 4 ? layer.packed[byte] & 15 : layer.packed[byte] >> 4;
        const int64_t at = (j / 16 * layer.groups + i / layer.group_size) * 16 + j % 16;
        const double weight = (u - layer.zero[at]) * double{widen(layer.scale[at].bits)};
        const double product = weight * to_vec(grad[row * n + j]);
        expected += product;
        magnitude += std::abs(product);
      }
      const double actual = to_vec(output[row * k + i]);
      CHECK(std::abs(actual - expected) <= 4e-7 * magnitude + unit * std::abs(expected),
            "gradient of %ld x %ld x %ld by %ld, dtype %d at %ld, %ld: %g, not %g",
            static_cast<long>(m), static_cast<long>(n), static_cast<long>(k),
            static_cast<long>(layer.group_size), static_cast<int>(dtype), static_cast<long>(row),
            static_cast<long>(i), actual, expected);
    }
  }
}

void check_gradients(const Shape& shape) {
  check_gradient<float>(shape, DType::float32);
  check_gradient<BFloat16>(shape, DType::bfloat16);
  check_gradient<Float16>(shape, DType::float16);
}

}  // namespace

int main() {
  // Steps of K: parts of one, one, several groups of a span, one that does not divide it, several
  // rounds of all warps.
  for (const auto& [k, group_size] : {std::pair<int64_t, int64_t>{1, 8},
                                      {33, 8},
                                      {130, 24},
                                      {200, 32},
                                      {700, 64},
                                      {500, 96},
                                      {1300, 128},
                                      {2300, 160},
                                      {3000, 1024},
                                      {65, 40}}) {
    check({1, 17, k, group_size}, Path::few);
    check({11, 33, k, group_size}, Path::few);
    check({3, 49, k, group_size}, Path::on_the_way);
  }
  check({0, 5, 40, 8}, Path::few);
  check({3, 0, 40, 8}, Path::few);
  check({3, 5, 0, 8}, Path::few);
  check({3, 5, 0, 8}, Path::on_the_way);
  check({20, 100, 160, 32}, Path::few);
  for (Path path : {Path::large_tiles, Path::small_tiles}) {
    // Stages that a group shares, one, several; one whose last step is behind K.
    check({5, 17, 1, 32}, path);
    check({70, 150, 300, 32}, path);
    check({130, 65, 260, 96}, path);
    check({33, 130, 700, 128}, path);
    check({2, 40, 5000, 4096}, path);
    check({3, 5, 0, 32}, path);
    check({3, 0, 40, 32}, path);
    check({0, 5, 40, 32}, path);
  }
  check_gradients({1, 5, 7, 8});
  check_gradients({3, 0, 40, 8});
  check_gradients({3, 5, 0, 8});
  check_gradients({0, 5, 40, 8});
  check_gradients({70, 49, 130, 24});
  check_gradients({5, 130, 300, 128});
}
