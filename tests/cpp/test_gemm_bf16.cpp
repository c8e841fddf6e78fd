// The product in bfloat16 against plain loops, on integers whose sums are exact: each result is the
// exact value rounded once. What lies between the rows of a is NaN.
#include <algorithm>
#include <cmath>

#include "buffer.h"
#include "check.h"

using namespace torchweld::kernels;

namespace {

constexpr DType kBFloat16 = DType::bfloat16;
constexpr uint16_t kNaN = 0x7fc0;
constexpr int64_t kBeyond = 3;  // values between the rows of c

struct Case {
  int64_t rows, columns, runs, depth;
  int64_t gap;  // values between the rows of a; negative where rows overlap
  bool epilogue;

  int64_t a_row() const { return depth + gap; }
  int64_t a_size() const { return (rows - 1) * a_row() + depth; }
  int64_t c_row() const { return columns + kBeyond; }
  int64_t c_size() const { return (rows - 1) * c_row() + columns; }
  int64_t width() const { return (columns + kPanelGroup - 1) / kPanelGroup * kPanelGroup; }
  int64_t pairs() const { return (depth + 1) / 2; }
};

struct Operands {
  Operands(const Case& c, bool integers)
      : weight(c.runs * c.depth * c.columns, kBFloat16, 2, true),
        packed(c.runs * c.pairs() * c.width() * 2, kBFloat16),
        bias(c.columns, DType::float32, 3, true),
        residual(c.c_size(), kBFloat16, 4, true) {
    if (integers) {
      make_integers(weight);
      make_integers(residual);
      for (int64_t j = 0; j < c.columns; ++j) {
        bias.as<float>()[j] = std::round(8 * bias.as<float>()[j]);
      }
    }
    for (int64_t run = 0; run < c.runs; ++run) {
      a.emplace_back(c.a_size(), kBFloat16, 10 + static_cast<unsigned>(run), true);
      if (integers) make_integers(a.back());
      for (int64_t i = 0; i < c.a_size() && c.gap > 0; ++i) {
        if (i % c.a_row() >= c.depth) a.back().as<uint16_t>()[i] = kNaN;
      }
      pointers.push_back(a.back().as<BFloat16>());
    }
    std::memset(packed.data.get(), 0, packed.bytes);
    for (int64_t run = 0; run < c.runs; ++run) {
      for (int64_t k = 0; k < c.depth; ++k) {
        for (int64_t j = 0; j < c.columns; ++j) {
          const int64_t pair = run * c.pairs() + k / 2;
          packed.as<uint16_t>()[(pair * c.width() + j) * 2 + k % 2] =
              weight.as<uint16_t>()[(run * c.depth + k) * c.columns + j];
        }
      }
    }
  }

  static void make_integers(const Buffer& buffer) {
    for (size_t i = 0; i < buffer.bytes / 2; ++i) {
      uint16_t& value = buffer.as<uint16_t>()[i];
      value = round_to_bfloat16(std::round(8 * widen(value)));
    }
  }

  std::vector<Buffer> a;
  std::vector<const BFloat16*> pointers;
  Buffer weight, packed, bias, residual;
};

GemmBF16Arguments arguments(const Case& c, const Operands& o, const Buffer& result) {
  GemmBF16Arguments g{};
  g.rows = c.rows;
  g.columns = c.columns;
  g.a = o.pointers.data();
  g.runs = c.runs;
  g.depth = c.depth;
  g.a_row = c.a_row();
  g.b = o.packed.as<BFloat16>();
  g.width = c.width();
  g.c = result.as<BFloat16>();
  g.c_row = c.c_row();
  if (c.epilogue) g.epilogue = {o.bias.as<float>(), o.residual.as<BFloat16>(), -20, 30};
  return g;
}

void check_values(const GemmBF16Kernels& kernels, const Case& c) {
  const Operands o(c, true);
  const Buffer result(c.c_size(), kBFloat16), expected(c.c_size(), kBFloat16);
  kernels.gemm(arguments(c, o, result));
  for (int64_t i = 0; i < c.rows; ++i) {
    for (int64_t j = 0; j < c.columns; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < c.runs; ++r) {
        for (int64_t k = 0; k < c.depth; ++k) {
          sum += static_cast<double>(widen(o.pointers[r][i * c.a_row() + k].bits)) *
                 widen(o.weight.as<uint16_t>()[(r * c.depth + k) * c.columns + j]);
        }
      }
      if (c.epilogue) {
        sum += o.bias.as<float>()[j] + widen(o.residual.as<uint16_t>()[i * c.c_row() + j]);
        sum = std::clamp(sum, -20.0, 30.0);
      }
      expected.as<uint16_t>()[i * c.c_row() + j] = round_to_bfloat16(static_cast<float>(sum));
    }
  }
  for (int64_t i = 0; i < c.c_size(); ++i) {
    // Compared as values: a sum of nothing may be either zero.
    CHECK(widen(result.as<uint16_t>()[i]) == widen(expected.as<uint16_t>()[i]),
          "%ld x %ld x %ld x %ld at %ld", static_cast<long>(c.rows), static_cast<long>(c.columns),
          static_cast<long>(c.runs), static_cast<long>(c.depth), static_cast<long>(i));
  }
}

// A row has the same bits whichever rows are computed with it.
void check_rows(const GemmBF16Kernels& kernels, const Case& c) {
  const Operands o(c, false);
  const Buffer together(c.c_size(), kBFloat16), alone(c.c_size(), kBFloat16);
  kernels.gemm(arguments(c, o, together));
  for (int64_t i = 0; i < c.rows; ++i) {
    GemmBF16Arguments g = arguments(c, o, alone);
    std::vector<const BFloat16*> pointers;
    for (const BFloat16* p : o.pointers) pointers.push_back(p + i * c.a_row());
    g.a = pointers.data();
    g.rows = 1;
    g.c += i * c.c_row();
    if (c.epilogue) g.epilogue.residual += i * c.c_row();
    kernels.gemm(g);
  }
  CHECK(together == alone, "%ld rows of %ld columns", static_cast<long>(c.rows),
        static_cast<long>(c.columns));
}

// A NaN passes the clamp, and so does nothing beyond it.
void check_clamp(const GemmBF16Kernels& kernels) {
  const uint16_t a[] = {0x3f80, kNaN, 0xc110, 0x4110, 0x7f80};  // 1, NaN, -9, 9, infinity
  const auto* pointer = reinterpret_cast<const BFloat16*>(a);
  uint16_t b[2 * kPanelGroup] = {0x3f80}, c[5];
  GemmBF16Arguments g{};
  g.rows = 5;
  g.columns = g.runs = g.depth = g.a_row = g.c_row = 1;
  g.a = &pointer;
  g.b = reinterpret_cast<const BFloat16*>(b);
  g.width = kPanelGroup;
  g.c = reinterpret_cast<BFloat16*>(c);
  g.epilogue.low = 0;
  g.epilogue.high = 6;
  kernels.gemm(g);
  CHECK(widen(c[0]) == 1 && std::isnan(widen(c[1])) && widen(c[2]) == 0 && widen(c[3]) == 6 &&
            widen(c[4]) == 6,
        "%g %g %g %g %g", widen(c[0]), widen(c[1]), widen(c[2]), widen(c[3]), widen(c[4]));
}

}  // namespace

int main() {
  for (Capability capability : available_capabilities()) {
    const GemmBF16Kernels* kernels = table(capability).gemm_bf16;
    if (kernels == nullptr) continue;
    for (int64_t rows : {1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 21, 30}) {
      for (int64_t columns : {1, 7, 15, 16, 17, 31, 32, 33, 48, 49, 63, 64}) {
        check_values(*kernels, {rows, columns, 1, 5, 1, false});
        check_values(*kernels, {rows, columns, 3, 4, 2, true});
        check_rows(*kernels, {rows, columns, 2, 21, -15, true});
      }
    }
    check_values(*kernels, {7, 64, 2, 300, 0, true});
    check_values(*kernels, {4, 20, 2, 1, 0, true});
    check_values(*kernels, {4, 20, 2, 0, 1, true});  // nothing to add
    check_clamp(*kernels);
  }
}
