// The CUDA kernels of the int8 linear layer, emulated: the bits of the CPU's, integers and outputs.
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "check.h"
#include "kernels/cuda/lane.h"
#include "kernels/cuda/quantized_linear.h"
#include "quantized_layer.h"

using namespace torchweld::kernels;
using namespace torchweld::kernels::cuda;

namespace {

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

enum class How { few, tiles, large_tiles, warpgroups, wide_warpgroups, blocks, on_the_way };

// A layer on the "device": rows at an odd stride, a bias of another dtype.
struct Device {
  Device(const QuantizedLayer& layer, DType dtype, int64_t group_size, int64_t splits = 1)
      : layer(layer),
        dtype(dtype),
        group_size(group_size),
        splits(splits),
        groups(group_size && layer.k ? (layer.k + group_size - 1) / group_size : 1),
        packed(layer.packed_size()),
        quantized(layer.m * quantized_stride(layer.k)),
        scale(layer.m * groups),
        parts(splits * layer.m * layer.n),
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
            .end = end,
            .splits = splits,
            .parts = parts.get()};
  }

  void run(How how, LinearActivation activation, bool sums, void* to) {
    const QuantizedLinearParams given = params(activation, sums, to);
    if (how == How::on_the_way) {
      CHECK(quantizes_on_the_way(layer.m, layer.k, group_size), "%ld rows", (long)layer.m);
      return ok(launch_quantized_linear_of(dtype, rows(), given, multiprocessors, nullptr));
    }
    ok(launch_quantize_rows(dtype, rows(), nullptr));
    if (how == How::blocks && !sums) return ok(launch_long_sums(given, 8, nullptr));
    ok(launch_quantized_linear(given, path(how), multiprocessors, nullptr));
  }

  static LinearPath path(How how) {
    switch (how) {
      case How::few:
        return LinearPath::few_rows;
      case How::large_tiles:
        return LinearPath::large_tiles;
      case How::warpgroups:
        return LinearPath::warpgroups;
      case How::wide_warpgroups:
        return LinearPath::wide_warpgroups;
      default:
        return LinearPath::small_tiles;
    }
  }

  const QuantizedLayer& layer;
  int multiprocessors = 132;
  DType dtype;
  int64_t group_size, splits, groups;
  Aligned<int8_t> packed, quantized;
  Aligned<float> scale;
  Aligned<int32_t> parts;
  Buffer output;
};

double value_at(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::float32) return static_cast<const float*>(data)[i];
  return dtype == DType::bfloat16 ? to_vec(static_cast<const BFloat16*>(data)[i])
                                  : to_vec(static_cast<const Float16*>(data)[i]);
}

// Equal bits, but for those of a NaN, which GPUs have one of.
bool equal(const Buffer& a, const Buffer& b) {
  const size_t size = size_of(a.dtype);
  for (size_t i = 0; i < a.bytes / size; ++i) {
    const auto value = [&](const Buffer& of) { return value_at(of.data.get(), a.dtype, i); };
    if (std::isnan(value(a)) && std::isnan(value(b))) continue;
    if (std::memcmp(a.data.get() + i * size, b.data.get() + i * size, size) != 0) return false;
  }
  return true;
}

void check(How how, const QuantizedLayer& layer, LinearActivation activation,
           DType dtype = DType::float32, int64_t group_size = 0, int multiprocessors = 132,
           int64_t splits = 1) {
  const auto same = [&](bool is_same, const char* what) {
    CHECK(is_same, "%s of %ld x %ld x %ld, way %d, dtype %d", what, static_cast<long>(layer.m),
          static_cast<long>(layer.n), static_cast<long>(layer.k), static_cast<int>(how),
          static_cast<int>(dtype));
  };
  Device device(layer, dtype, group_size, splits);
  device.multiprocessors = multiprocessors;
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
  for (int64_t m : {1, 8, 13, 32}) {
    for (int64_t n : {1, 15, 16, 34}) {
      const int64_t k = (m * 37 + n * 53) % 300 + 1;
      check(How::few, QuantizedLayer(m, n, k), any_activation(m + n), any_dtype(m + n / 2));
    }
  }
  for (int64_t k : {0, 1, 3, 4, 64, 65, 2047, 4100}) {
    check(How::few, QuantizedLayer(3, 19, k), any_activation(k), any_dtype(k));
    // With one multiprocessor, two blocks are many, and small.
    for (int multiprocessors : {1, 132}) {
      check(How::on_the_way, QuantizedLayer(1 + k % 4, 34, k), any_activation(k), any_dtype(k), 0,
            multiprocessors);
    }
  }
}

void check_tiles() {
  for (int64_t m : {1, 64, 130}) {
    for (int64_t n : {18, 64, 67}) {
      const int64_t k = (m * 37 + n * 53) % 300 + 1;
      check(How::tiles, QuantizedLayer(m, n, k), any_activation(m + n), any_dtype(m + n / 2));
    }
  }
  for (int64_t k : {0, 1, 64, 200, 449})
    check(How::tiles, QuantizedLayer(5, 20, k), any_activation(k));
}

// Tiles of the larger size, several to a band.
void check_large_tiles() {
  check(How::large_tiles, QuantizedLayer(1100, 140, 20), LinearActivation::silu);
}

void check_warpgroups() {
  for (How how : {How::warpgroups, How::wide_warpgroups}) {
    for (int64_t k : {0, 100, 1100}) {
      check(how, QuantizedLayer(1 + k % 131, 35 + k % 33, k), any_activation(k), any_dtype(k));
    }
    // Several blocks, in each dimension one that is not full.
    check(how, QuantizedLayer(257, 145, 20), LinearActivation::silu, DType::bfloat16);
  }
}

// K in parts, of which some are empty.
void check_parts() {
  for (How how : {How::few, How::tiles, How::large_tiles, How::warpgroups, How::wide_warpgroups}) {
    for (int64_t k : {1, 530}) {
      check(how, QuantizedLayer(23, 150, k), any_activation(k), any_dtype(k), 0, 132, 3);
    }
  }
}

void check_path(int64_t rows, int64_t columns, int64_t k, LinearPath path, int64_t splits,
                bool has_wgmma = true) {
  const LinearDevice device{.multiprocessors = 132, .has_wgmma = has_wgmma};
  const LinearPath chosen = choose_path(rows, columns, device);
  const int64_t parts = choose_splits(chosen, rows, columns, k, device);
  CHECK(chosen == path && parts == splits, "%ld x %ld x %ld: path %d in %ld parts",
        static_cast<long>(rows), static_cast<long>(columns), static_cast<long>(k),
        static_cast<int>(chosen), static_cast<long>(parts));
}

void check_paths() {
  check_path(1, 4096, 4096, LinearPath::few_rows, 1);
  check_path(32, 1024, 16384, LinearPath::few_rows, 4);
  check_path(64, 768, 3072, LinearPath::small_tiles, 6);
  check_path(512, 4096, 4096, LinearPath::warpgroups, 1);
  check_path(4096, 4096, 4096, LinearPath::wide_warpgroups, 1);
  check_path(4096, 4096, 4096, LinearPath::large_tiles, 1, false);
  check_path(512, 0, 4096, LinearPath::small_tiles, 1);
}

// What is chosen takes the product, and what K is cut into fits the device and fills a step each.
void check_choices() {
  for (const LinearDevice& device : {LinearDevice{108, false}, LinearDevice{132, true}}) {
    for (int64_t rows : {0, 1, 32, 33, 127, 129, 300, 5000}) {
      for (int64_t columns : {0, 1, 15, 130, 768, 11008}) {
        for (int64_t k : {0, 64, 1000, 4096, 70000}) {
          const LinearPath path = choose_path(rows, columns, device);
          const int64_t splits = choose_splits(path, rows, columns, k, device);
          CHECK(takes(path, rows, device), "%ld rows, path %d", (long)rows, (int)path);
          CHECK(splits == 1 || (splits <= device.multiprocessors && k / splits >= kLeastTileK),
                "%ld x %ld x %ld in %ld parts", (long)rows, (long)columns, (long)k, (long)splits);
        }
      }
    }
  }
  CHECK(!takes(LinearPath::few_rows, 33, {132, true}), "33 rows are few");
  CHECK(!takes(LinearPath::wide_warpgroups, 33, {132, false}), "wgmma without it");
}

void check_groups() {
  for (int64_t group_size : {4, 32, 100}) {
    for (int64_t k : {1, 64, 130}) {
      check(How::tiles, QuantizedLayer(1 + k % 70, 37, k), any_activation(k), any_dtype(k),
            group_size);
    }
  }
  // Of few rows: groups of one step and of several, the last one not whole, and rounds of them.
  for (int64_t group_size : {64, 192}) {
    for (int64_t m : {3, 16, 25}) {
      for (int64_t k : {1, 700, 1000}) {
        check(How::few, QuantizedLayer(m, 35, k), any_activation(m + k), any_dtype(m), group_size);
      }
    }
  }
}

// Blocks of K that are joined in int64, here of 32 k.
void check_long_sums() { check(How::blocks, QuantizedLayer(3, 17, 200), LinearActivation::gelu); }

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
    check(How::tiles, layer, LinearActivation::identity, dtype, 32);
  }
}

// --- the gradient --------------------------------------------------------------------------------

// Against a product in double: parts of 8 bits lose 2^-24 of a float32 gradient, 2^-16 of others.
void check_backward(int64_t m, int64_t n, int64_t k, DType dtype) {
  // The layer's input stands for a gradient of as many columns.
  const QuantizedLayer layer(m, n, k), of_grad(m, 1, n);
  Aligned<int8_t> packed(layer.packed_size());
  std::memcpy(packed.get(), layer.packed.get(), layer.packed_size());
  Aligned<BFloat16> parts(m * split_parts(dtype) * split_stride(n));
  Buffer output(m * k, dtype);
  ok(launch_split_grad(dtype,
                       {.grad = of_grad.input(dtype),
                        .grad_stride = of_grad.input_stride,
                        .rows = m,
                        .columns = n,
                        .weight_scale = layer.scale.get(),
                        .parts = parts.get()},
                       nullptr));
  ok(launch_quantized_linear_backward({.parts = parts.get(),
                                       .rows = m,
                                       .panels = packed.get(),
                                       .quads = layer.quads,
                                       .columns = n,
                                       .in_features = k,
                                       .output = output.data.get(),
                                       .dtype = dtype},
                                      nullptr));
  const double relative = dtype == DType::float32    ? 0x1p-22
                          : dtype == DType::bfloat16 ? 0x1p-8
                                                     : 0x1p-11;
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t i = 0; i < k; ++i) {
      double sum = 0, magnitude = 0;
      for (int64_t j = 0; j < n; ++j) {
        const double term =
            value_at(of_grad.input(dtype), dtype, row * of_grad.input_stride + j) * layer.scale[j] *
            layer.packed[((j / 16 * layer.quads + i / 4) * 16 + j % 16) * 4 + i % 4];
        sum += term;
        magnitude += std::abs(term);
      }
      const double got = value_at(output.data.get(), dtype, row * k + i);
      const double bound = std::abs(sum) * relative +
                           magnitude * 0x1p-17 * (dtype == DType::float32 ? 0x1p-5 : 1) + 1e-30;
      CHECK(std::abs(got - sum) <= bound, "%ld x %ld x %ld, dtype %d, at %ld, %ld: %g, %g",
            static_cast<long>(m), static_cast<long>(n), static_cast<long>(k),
            static_cast<int>(dtype), static_cast<long>(row), static_cast<long>(i), got, sum);
    }
  }
}

void check_gradients() {
  for (int64_t m : {1, 7, 65}) {
    for (int64_t n : {1, 16, 57}) {
      for (int64_t k : {6, 64, 77}) check_backward(m, n, k, any_dtype(m + n + k));
    }
  }
}

}  // namespace

int main() {
  check_gradients();
  check_few_rows();
  check_tiles();
  check_large_tiles();
  check_warpgroups();
  check_parts();
  check_paths();
  check_choices();
  check_groups();
  check_long_sums();
  check_not_finite();
}
