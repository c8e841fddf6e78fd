// The CUDA kernels of the int8 linear layer, emulated: the bits of the CPU's, integers and outputs.
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "check.h"
#include "kernels/cuda/quantized_linear.h"
#include "quantized_layer.h"

using namespace torchweld::kernels;
using namespace torchweld::kernels::cuda;

namespace {

constexpr int kMultiprocessors = 132;

void ok(cudaError_t error) { CHECK(error == cudaSuccess, "%d", static_cast<int>(error)); }

// Exactly as many bytes as there may be, aligned to 16.
template <class T>
struct Aligned {
  explicit Aligned(int64_t size)
      : data(static_cast<T*>(std::aligned_alloc(16, round_up(size * sizeof(T), 16))), std::free) {
    std::memset(data.get(), 0x55, round_up(size * sizeof(T), 16));
  }
  T* get() const { return data.get(); }
  std::unique_ptr<T, void (*)(void*)> data;
};

enum class How { few, tiles, chosen, on_the_way };

// A layer on the "device": rows at an odd stride, a bias of another dtype.
struct Device {
  Device(const QuantizedLayer& layer, DType dtype, int64_t group_size)
      : layer(layer),
        dtype(dtype),
        group_size(group_size),
        groups(group_size && layer.k ? (layer.k + group_size - 1) / group_size : 1),
        packed(layer.packed_size()),
        quantized(layer.m * quantized_stride(layer.k)),
        scale(layer.m * groups),
        output(layer.m * layer.n, dtype) {
    std::memcpy(packed.get(), layer.packed.get(), layer.packed_size());
  }

  QuantizeRows rows() {
    return {.input = layer.input(dtype),
            .input_stride = layer.input_stride,
            .rows = layer.m,
            .in_features = layer.k,
            .quantized = quantized.get(),
            .quantized_stride = quantized_stride(layer.k),
            .scale = scale.get(),
            .group_size = group_size};
  }

  QuantizedLinearParams params(LinearActivation activation, bool sums, void* to) {
    LinearEnd end{.of = {.input_scale = group_size ? nullptr : scale.get(),
                         .weight_scale = layer.scale.get(),
                         .bias = nullptr,
                         .activation = activation,
                         .residual = layer.residual(dtype),
                         .residual_stride = layer.n,
                         .residual_is_float = false,
                         .output = to,
                         .output_stride = layer.n},
                  .bias = layer.bias.get(),
                  .bias_dtype = DType::float32,
                  .output_dtype = dtype,
                  .stores_sums = sums};
    return {.quantized = quantized.get(),
            .quantized_stride = quantized_stride(layer.k),
            .rows = layer.m,
            .panels = packed.get(),
            .quads = layer.quads,
            .columns = layer.n,
            .group_quads = group_size / kQuad,
            .group_scale = scale.get(),
            .end = end};
  }

  void run(How how, LinearActivation activation, bool sums, void* to) {
    const QuantizedLinearParams given = params(activation, sums, to);
    if (how == How::on_the_way) {
      CHECK(quantizes_on_the_way(layer.m, layer.k, group_size), "%ld rows", (long)layer.m);
      return ok(launch_quantized_linear_of(dtype, rows(), given, nullptr));
    }
    ok(launch_quantize_rows(dtype, rows(), nullptr));
    if (how == How::few) return ok(launch_few_rows(given, nullptr));
    if (how == How::tiles) return ok(launch_tiles(given, kMultiprocessors, nullptr));
    ok(launch_quantized_linear(given, kMultiprocessors, nullptr));
  }

  const QuantizedLayer& layer;
  DType dtype;
  int64_t group_size, groups;
  Aligned<int8_t> packed, quantized;
  Aligned<float> scale;
  Buffer output;
};

// Equal bits, but for those of a NaN, which GPUs have one of.
bool equal(const Buffer& a, const Buffer& b) {
  const size_t size = size_of(a.dtype);
  for (size_t i = 0; i < a.bytes / size; ++i) {
    const auto value = [&](const Buffer& buffer) {
      if (a.dtype == DType::float32) return buffer.as<float>()[i];
      return a.dtype == DType::bfloat16 ? to_vec(buffer.as<BFloat16>()[i])
                                        : to_vec(buffer.as<Float16>()[i]);
    };
    if (std::isnan(value(a)) && std::isnan(value(b))) continue;
    if (std::memcmp(a.data.get() + i * size, b.data.get() + i * size, size) != 0) return false;
  }
  return true;
}

void check(How how, const QuantizedLayer& layer, LinearActivation activation,
           DType dtype = DType::float32, int64_t group_size = 0) {
  const auto same = [&](bool is_same, const char* what) {
    CHECK(is_same, "%s of %ld x %ld x %ld, way %d, dtype %d", what, static_cast<long>(layer.m),
          static_cast<long>(layer.n), static_cast<long>(layer.k), static_cast<int>(how),
          static_cast<int>(dtype));
  };
  Device device(layer, dtype, group_size);
  const QuantizedResult expected = run_on_cpu(layer, activation, dtype, group_size);
  device.run(how, activation, false, device.output.data.get());
  same(equal(device.output, expected.output), "output");
  if (how != How::on_the_way) {
    const size_t bytes = static_cast<size_t>(layer.m * device.groups) * sizeof(float);
    same(std::memcmp(device.scale.get(), expected.scale.get(), bytes) == 0, "scales");
  }
  if (group_size == 0 && layer.k <= kMaxSummed) {
    const auto sums = array<int32_t>(layer.m * layer.n);
    device.run(how, activation, true, sums.get());
    const size_t bytes = static_cast<size_t>(layer.m * layer.n) * sizeof(int32_t);
    same(std::memcmp(sums.get(), expected.sums.get(), bytes) == 0, "sums");
  }
}

LinearActivation any_activation(int64_t i) { return static_cast<LinearActivation>(i % 5); }
DType any_dtype(int64_t i) {
  constexpr DType kTypes[] = {DType::float32, DType::bfloat16, DType::float16};
  return kTypes[i % 3];
}

void check_few_rows() {
  for (int64_t m : {1, 2, 5, 8, 9, 16, 17, 32}) {
    for (int64_t n : {1, 4, 15, 16, 17, 31, 33, 66}) {
      const int64_t k = (m * 37 + n * 53) % 300 + 1;
      check(How::few, QuantizedLayer(m, n, k), any_activation(m + n), any_dtype(m + n / 2));
    }
  }
  for (int64_t k : {0, 1, 3, 4, 63, 64, 65, 1024, 2047, 4100}) {
    check(How::few, QuantizedLayer(3, 19, k), any_activation(k), any_dtype(k));
    check(How::on_the_way, QuantizedLayer(1 + k % 4, 19, k), any_activation(k), any_dtype(k));
  }
}

void check_tiles() {
  for (int64_t m : {1, 33, 64, 65, 130}) {
    for (int64_t n : {1, 18, 64, 67, 130}) {
      const int64_t k = (m * 37 + n * 53) % 300 + 1;
      check(How::tiles, QuantizedLayer(m, n, k), any_activation(m + n), any_dtype(m + n / 2));
    }
  }
  for (int64_t k : {0, 1, 64, 200, 449})
    check(How::tiles, QuantizedLayer(5, 20, k), any_activation(k));
}

// Tiles of the larger size, several to a band.
void check_large_tiles() {
  const QuantizedLayer layer(1100, 140, 70);
  Device device(layer, DType::float32, 0);
  const QuantizedResult expected = run_on_cpu(layer, LinearActivation::silu, DType::float32, 0);
  ok(launch_quantize_rows(DType::float32, device.rows(), nullptr));
  ok(launch_tiles(device.params(LinearActivation::silu, false, device.output.data.get()), 1,
                  nullptr));
  CHECK(equal(device.output, expected.output), "large tiles");
}

void check_groups() {
  for (int64_t group_size : {4, 12, 32, 64, 100, 128}) {
    for (int64_t k : {1, 64, 130, 259}) {
      check(How::chosen, QuantizedLayer(1 + k % 70, 37, k), any_activation(k), any_dtype(k),
            group_size);
    }
  }
}

// More than int32 can sum.
void check_long_sums() {
  check(How::chosen, QuantizedLayer(2, 17, kMaxSummed + 1), LinearActivation::identity);
}

// What is not finite is so in its own row alone.
void check_not_finite() {
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    QuantizedLayer layer(4, 20, 70);
    layer.set_input(1, 69, std::numeric_limits<float>::quiet_NaN());
    layer.set_input(2, 0, -std::numeric_limits<float>::infinity());
    for (int64_t k = 0; k < 70; ++k) layer.set_input(3, k, 0);
    for (How how : {How::few, How::tiles, How::on_the_way}) {
      check(how, layer, LinearActivation::gelu, dtype);
    }
    check(How::chosen, layer, LinearActivation::identity, dtype, 32);
  }
}

}  // namespace

int main() {
  check_few_rows();
  check_tiles();
  check_large_tiles();
  check_groups();
  check_long_sums();
  check_not_finite();
}
