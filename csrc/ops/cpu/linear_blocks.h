// How the product of a linear layer is cut into blocks that threads compute.
#pragma once

#include <algorithm>

#include "ops/divide.h"
#include "ops/parallel.h"

namespace torchweld::ops {

struct LinearBlock {
  int64_t row, rows;
  int64_t column, columns;
};

struct LinearProduct {
  int64_t rows, columns;
  int64_t depth;      // products to a sum
  int64_t row_bytes;  // of the rows in memory
};

// What hides the cost of handing it to another thread: products, and bytes of weights if few rows
// leave these the longer part.
inline constexpr int64_t kGrainProducts = 1 << 21;
inline constexpr int64_t kGrainWeights = 1 << 19;

// f(block) for blocks that cover the product, in parallel. Where they begin depends on shapes
// alone, but for few rows their columns do not: then the sums of columns must not depend on the
// block.
template <class F>
void for_each_block(const LinearProduct& product, const F& f) {
  constexpr int64_t kFewRows = 8, kFewColumns = 64;
  // A multiple of most tiles' columns; half of it still is one tile of the widest.
  constexpr int64_t kColumns = 96;
  // Tasks enough for any share of the work to be about as long as another.
  constexpr int64_t kTasks = 16;
  // The rows of a task, half a megabyte of them, stay in the second cache.
  constexpr int64_t kRowBytes = 1 << 19;

  const int64_t rows = product.rows, columns = product.columns, depth = product.depth;
  // The weight is read once, and fastest in few runs as long as they can be.
  if (rows <= kFewRows) {
    parallel_for(divide_up(columns, kFewColumns), kGrainWeights / (kFewColumns * (depth + 1)) + 1,
                 [&](int64_t begin, int64_t end) {
                   const int64_t column = begin * kFewColumns;
                   f(LinearBlock{0, rows, column, std::min(end * kFewColumns, columns) - column});
                 });
    return;
  }
  const int64_t task_columns =
      rows * columns < kTasks * kColumns * kColumns ? kColumns / 2 : kColumns;
  const int64_t column_tasks = divide_up(columns, task_columns);
  int64_t row_tasks = divide_up(rows * product.row_bytes, kRowBytes);
  while (row_tasks * column_tasks < kTasks && rows > 24 * row_tasks) row_tasks *= 2;
  const int64_t task_rows = std::max<int64_t>(round_up(divide_up(rows, row_tasks), 8), 16);
  row_tasks = divide_up(rows, task_rows);
  const int64_t task_products = task_rows * std::min(task_columns, columns) * (depth + 1);
  parallel_for(row_tasks * column_tasks, kGrainProducts / task_products + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t row = task / column_tasks * task_rows;
                   const int64_t column = task % column_tasks * task_columns;
                   f(LinearBlock{row, std::min(task_rows, rows - row), column,
                                 std::min(task_columns, columns - column)});
                 }
               });
}

}  // namespace torchweld::ops
