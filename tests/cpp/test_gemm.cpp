#include <algorithm>
#include <cmath>

#include "buffer.h"
#include "check.h"

using namespace torchweld::kernels;

namespace {

struct Case {
  int64_t rows, columns, runs, depth;
  int64_t a_row, a_step;
  bool accumulate, bias, residual, clamp;
};

// The last float an operand is read at, and one.
int64_t a_size(const Case& c) {
  return (c.rows - 1) * c.a_row + std::max<int64_t>(0, c.depth - 1) * c.a_step + 1;
}

// Rows of b and c are wider than what is used of them, except the last.
constexpr int64_t kBeyond = 3;
int64_t rows_size(int64_t rows, int64_t columns) {
  return std::max<int64_t>(0, (rows - 1) * (columns + kBeyond) + columns);
}

// Small integers, so that every sum is exact.
void make_integers(const Buffer& buffer) {
  float* data = buffer.as<float>();
  for (size_t i = 0; i < buffer.bytes / 4; ++i) data[i] = std::round(data[i] * 8);
}

struct Operands {
  Operands(const Case& c, bool integers)
      : b(rows_size(c.runs * c.depth, c.columns), DType::float32, 2, true),
        bias(c.columns, DType::float32, 3, true),
        residual(rows_size(c.rows, c.columns), DType::float32, 4, true) {
    for (int64_t r = 0; r < c.runs; ++r) {
      a.emplace_back(a_size(c), DType::float32, 10 + static_cast<unsigned>(r), true);
      pointers.push_back(a.back().as<float>());
      if (integers) make_integers(a.back());
    }
    if (integers) {
      for (const Buffer* buffer : {&b, &bias, &residual}) make_integers(*buffer);
    }
  }

  std::vector<Buffer> a;
  std::vector<const float*> pointers;
  Buffer b, bias, residual;
};

Buffer initial(const Case& c, bool integers) {
  Buffer buffer(rows_size(c.rows, c.columns), DType::float32, 5, true);
  if (integers) make_integers(buffer);
  return buffer;
}

Buffer product(Capability capability, const Case& c, const Operands& operands, bool integers) {
  Buffer result = initial(c, integers);
  GemmArguments g{};
  g.rows = c.rows;
  g.columns = c.columns;
  g.a = operands.pointers.data();
  g.runs = c.runs;
  g.depth = c.depth;
  g.a_row = c.a_row;
  g.a_step = c.a_step;
  g.b = operands.b.as<float>();
  g.b_row = g.c_row = c.columns + kBeyond;
  g.c = result.as<float>();
  g.accumulate = c.accumulate;
  if (c.bias) g.epilogue.bias = operands.bias.as<float>();
  if (c.residual) g.epilogue.residual = operands.residual.as<float>();
  if (c.clamp) g.epilogue.low = -20, g.epilogue.high = 30;
  table(capability).gemm->gemm(g);
  return result;
}

// One element at a time; what lies between the rows of c stays as it was.
Buffer expected_integers(const Case& c, const Operands& operands) {
  Buffer result = initial(c, true);
  const int64_t row = c.columns + kBeyond;
  for (int64_t i = 0; i < c.rows; ++i) {
    for (int64_t j = 0; j < c.columns; ++j) {
      float& value = result.as<float>()[i * row + j];
      double sum = c.accumulate ? value : 0;
      for (int64_t r = 0; r < c.runs; ++r) {
        for (int64_t k = 0; k < c.depth; ++k) {
          sum += static_cast<double>(operands.pointers[r][i * c.a_row + k * c.a_step]) *
                 operands.b.as<float>()[(r * c.depth + k) * row + j];
        }
      }
      if (c.bias) sum += operands.bias.as<float>()[j];
      if (c.residual) sum += operands.residual.as<float>()[i * row + j];
      if (c.clamp) sum = std::clamp(sum, -20.0, 30.0);
      value = static_cast<float>(sum);
    }
  }
  return result;
}

void check_product(const Case& c) {
  const Operands integers(c, true), floats(c, false);
  const Buffer exact = expected_integers(c, integers);
  const Buffer bits = product(Capability::scalar, c, floats, false);
  for (Capability capability : available_capabilities()) {
    CHECK(product(capability, c, integers, true) == exact, "%s: %ld x %ld x %ld x %ld",
          name(capability), static_cast<long>(c.rows), static_cast<long>(c.columns),
          static_cast<long>(c.runs), static_cast<long>(c.depth));
    CHECK(product(capability, c, floats, false) == bits, "%s: same bits, %ld x %ld x %ld x %ld",
          name(capability), static_cast<long>(c.rows), static_cast<long>(c.columns),
          static_cast<long>(c.runs), static_cast<long>(c.depth));
  }
}

// Rows in threes have pointers of their own: as if each three were a product by itself.
void check_by_threes(int64_t threes, int64_t columns, int64_t runs, bool accumulate) {
  const int64_t depth = 6, step = 4;
  const Case c{3, columns, threes * runs, depth, 1, step, accumulate, true, false, false};
  const Operands operands(c, false);
  for (Capability capability : available_capabilities()) {
    const Buffer expected(3 * threes * columns, DType::float32, 5, true);
    const Buffer result(3 * threes * columns, DType::float32, 5, true);
    GemmArguments g{};
    g.columns = columns;
    g.runs = runs;
    g.depth = depth;
    g.a_row = 1;
    g.a_step = step;
    g.b = operands.b.as<float>();
    g.b_row = columns + kBeyond;
    g.c_row = columns;
    g.accumulate = accumulate;
    g.epilogue.bias = operands.bias.as<float>();
    g.rows = 3;
    for (int64_t i = 0; i < threes; ++i) {
      g.a = operands.pointers.data() + i * runs;
      g.c = expected.as<float>() + 3 * i * columns;
      table(capability).gemm->gemm(g);
    }
    g.rows = 3 * threes;
    g.by_threes = true;
    g.a = operands.pointers.data();
    g.c = result.as<float>();
    table(capability).gemm->gemm(g);
    CHECK(result == expected, "%s: %ld threes of %ld columns", name(capability),
          static_cast<long>(threes), static_cast<long>(columns));
  }
}

// The sum of a product's pieces is a sum of sums: c joins a chain at its end.
void check_accumulate() {
  const float a[] = {1, 1}, b[] = {1, -1 + 0x1p-24f};
  const float* pointer = a;
  for (Capability capability : available_capabilities()) {
    float c = 0x1p24f;
    GemmArguments g{};
    g.rows = g.columns = g.runs = g.a_row = g.a_step = g.b_row = g.c_row = 1;
    g.depth = 2;
    g.a = &pointer;
    g.b = b;
    g.c = &c;
    g.accumulate = true;
    table(capability).gemm->gemm(g);
    // From c on, its first product would be lost to rounding, and the second take 1 away.
    CHECK(c == 0x1p24f, "%s: %a", name(capability), c);
  }
}

// A NaN passes the clamp, and so does nothing beyond it.
void check_clamp() {
  const float a[] = {1, NAN, -9, 9};
  const float* pointer = a;
  const float b = 1;
  for (Capability capability : available_capabilities()) {
    float c[4];
    GemmArguments g{};
    g.rows = 4;
    g.columns = g.runs = g.depth = g.a_row = g.b_row = g.c_row = 1;
    g.a = &pointer;
    g.b = &b;
    g.c = c;
    g.epilogue.low = 0;
    g.epilogue.high = 6;
    table(capability).gemm->gemm(g);
    CHECK(c[0] == 1 && std::isnan(c[1]) && c[2] == 0 && c[3] == 6, "%s", name(capability));
  }
}

void check_pack(int64_t columns, int64_t depth) {
  const int64_t row = depth + 2, width = (columns + kPanelGroup - 1) / kPanelGroup * kPanelGroup;
  const Buffer weight((columns - 1) * row + depth, DType::float32, 6, true);
  Buffer expected(depth * width, DType::float32);
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t j = 0; j < width; ++j) {
      expected.as<float>()[k * width + j] = j < columns ? weight.as<float>()[j * row + k] : 0;
    }
  }
  for (Capability capability : available_capabilities()) {
    const Buffer packed(depth * width, DType::float32);
    table(capability)
        .gemm->pack(weight.as<float>(), row, columns, depth, packed.as<float>(), width);
    CHECK(packed == expected, "%s: %ld columns, depth %ld", name(capability),
          static_cast<long>(columns), static_cast<long>(depth));
  }
}

// Sums in double, which integers this large need.
void check_add_up(int64_t count, int64_t size) {
  const int64_t stride = size + 3;
  const Buffer parts(count * stride, DType::float32);
  Buffer expected(size, DType::float32);
  for (int64_t i = 0; i < count * stride; ++i) {
    parts.as<float>()[i] = static_cast<float>((i * 7919 % 1001 - 500) * 40000 + 1);
  }
  for (int64_t i = 0; i < size; ++i) {
    double sum = 0;
    for (int64_t p = 0; p < count; ++p) sum += parts.as<float>()[p * stride + i];
    expected.as<float>()[i] = static_cast<float>(sum);
  }
  for (Capability capability : available_capabilities()) {
    const Buffer sums(size, DType::float32);
    table(capability).gemm->add_up(parts.as<float>(), count, stride, size, sums.as<float>());
    CHECK(sums == expected, "%s: %ld parts of %ld", name(capability), static_cast<long>(count),
          static_cast<long>(size));
  }
}

// Rows of whole groups, and nothing behind them.
void check_add_rows(int64_t count, int64_t size) {
  const int64_t groups = (size + kPanelGroup - 1) / kPanelGroup * kPanelGroup;
  const Buffer rows(count * groups, DType::float32, 7, true);
  std::vector<const float*> from;
  for (int64_t r = 0; r < count; ++r) from.push_back(rows.as<float>() + r * groups);
  const Buffer expected(groups + 1, DType::float32, 8, true);
  for (int64_t i = 0; i < groups; ++i) {
    float sum = from[0][i];
    for (int64_t r = 1; r < count; ++r) sum += from[r][i];
    expected.as<float>()[i] += sum;
  }
  for (Capability capability : available_capabilities()) {
    const Buffer to(groups + 1, DType::float32, 8, true);
    table(capability).gemm->add_rows(from.data(), count, size, to.as<float>());
    CHECK(to == expected, "%s: %ld rows of %ld", name(capability), static_cast<long>(count),
          static_cast<long>(size));
  }
}

// What a product fetches ahead is taken off, the last stretch first, and no more than there is.
void check_ahead() {
  const Buffer a(64, DType::float32), b(64, DType::float32), c(64, DType::float32);
  const float* pointer = a.as<float>();
  for (Capability capability : available_capabilities()) {
    Ahead ahead;
    ahead.add(a.as<float>(), 17);
    ahead.add(b.as<float>(), 8 * 16 + 1);
    GemmArguments g{};
    g.rows = g.columns = g.runs = 1;
    g.a = &pointer;
    g.b = b.as<float>();
    g.c = c.as<float>();
    g.depth = g.a_row = 8;
    g.a_step = g.b_row = g.c_row = 1;
    g.ahead = &ahead;
    for (int64_t left : {2, 1, 0, 0}) {
      table(capability).gemm->gemm(g);
      CHECK(ahead.count == left, "%s: %ld stretches left", name(capability),
            static_cast<long>(ahead.count));
      if (left == 2) {
        CHECK(ahead.stretches[1].size == 1 && ahead.stretches[1].data == b.as<float>() + 8 * 16,
              "%s: a line a step", name(capability));
      }
    }
  }
}

}  // namespace

int main() {
  for (int64_t rows : {1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 21, 30}) {
    for (int64_t columns : {1, 7, 8, 15, 16, 17, 24, 31, 32, 33, 48, 49, 60, 63, 64}) {
      check_product({rows, columns, 1, 5, 6, 1, false, false, false, false});
      check_product({rows, columns, 3, 4, 2, 1, false, true, true, true});
      check_product({rows, columns, 2, 9, 1, 40, true, false, true, false});  // a across
    }
  }
  check_product({7, 64, 2, 300, 300, 1, true, true, false, true});
  check_product({4, 20, 2, 0, 1, 1, true, true, false, false});  // nothing to add
  for (int64_t threes : {1, 2, 3, 4, 7}) {
    for (int64_t columns : {5, 16, 20, 32, 40, 64}) {
      check_by_threes(threes, columns, 1, false);
      check_by_threes(threes, columns, 3, true);
    }
  }
  check_accumulate();
  check_clamp();
  check_ahead();
  for (int64_t count : {1, 2, 7, 32}) {
    for (int64_t size : {1, 4, 15, 16, 17, 31, 33, 47, 63, 64, 65, 100, 127, 144, 200}) {
      check_add_up(count, size);
    }
  }
  for (int64_t count : {1, 2, 7}) {
    for (int64_t size : {1, 16, 17, 48, 64}) check_add_rows(count, size);
  }
  for (int64_t columns : {1, 3, 15, 16, 17, 33, 48, 63, 64}) {
    for (int64_t depth : {1, 2, 7, 9, 16, 17, 40, 147}) check_pack(columns, depth);
  }
}
