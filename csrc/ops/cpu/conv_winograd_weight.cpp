#include "ops/cpu/conv_winograd.h"
#include "ops/cpu/scratch.h"
#include "ops/kernels.h"
#include "ops/parallel.h"

namespace torchweld::ops::winograd {
namespace {

constexpr int64_t kTaps = 9;

// The points of a panel's taps, each [rows][width].
void transform_taps(const float* taps, int64_t tap, const Panel& panel, int64_t rows, float* points,
                    int64_t point) {
  cpu_kernels().winograd->weight(taps, {3 * tap, tap, panel.width}, rows, panel.width, points,
                                 point, panel.width);
}

}  // namespace

void Weight::pack(float* packed) const {
  const int64_t chunks = divide_up(rows_, kRows);
  parallel_for(panels() * chunks, 1, [&](int64_t begin, int64_t end) {
    const Scratch workspace(kWorkspace);
    for (int64_t i = begin; i < end; ++i) {
      const Panel here = panel(i / chunks);
      const int64_t row = i % chunks * kRows, rows = std::min(kRows, rows_ - row);
      float* to = packed + offset(here.index) + row * here.width;
      if (large()) {
        transpose(here, row, rows, to, stride(here));
      } else {
        transform(here, row, rows, to, stride(here), workspace.data());
      }
    }
  });
  if (large()) return;
  // What lies between the points is never used, but a saved model holds it.
  for (int64_t i = 0; i < panels() * kWinogradPoints; ++i) {
    const Panel here = panel(i / kWinogradPoints);
    float* point = packed + offset(here.index) + i % kWinogradPoints * stride(here);
    std::fill(point + rows_ * here.width, point + stride(here), 0.0f);
  }
}

void Weight::transform(const Panel& panel, int64_t row, int64_t rows, float* points, int64_t point,
                       float* workspace) const {
  if (turned_) {
    const float* last_tap = weight_ + (kTaps * row + kTaps - 1) * columns_ + panel.first;
    cpu_kernels().winograd->weight(last_tap, {-3 * columns_, -columns_, kTaps * columns_}, rows,
                                   panel.columns, points, point, panel.width);
  } else if (packed()) {
    const float* taps = packed_ + offset(panel.index) + row * panel.width;
    transform_taps(taps, stride(panel), panel, rows, points, point);
  } else {
    transpose(panel, row, rows, workspace, rows * panel.width);
    transform_taps(workspace, rows * panel.width, panel, rows, points, point);
  }
}

kernels::Ahead Weight::ahead(const Panel& panel, int64_t row, int64_t rows) const {
  kernels::Ahead ahead;
  if (!large() || !packed()) return ahead;
  const float* taps = packed_ + offset(panel.index) + row * panel.width;
  for (int64_t i = 0; i < kTaps; ++i) ahead.add(taps + i * stride(panel), rows * panel.width);
  return ahead;
}

void Weight::transpose(const Panel& panel, int64_t row, int64_t rows, float* taps,
                       int64_t tap) const {
  for (int64_t i = 0; i < kTaps; ++i) {
    const float* from = weight_ + (panel.first * kTaps + i) * rows_ + row;
    cpu_kernels().gemm->pack(from, kTaps * rows_, panel.columns, rows, taps + i * tap, panel.width);
  }
}

// Floats before a panel.
int64_t Weight::offset(int64_t index) const {
  const int64_t squares = large() ? kTaps : kWinogradPoints;
  const int64_t whole = std::min(index, columns_ / kernels::kPanel);
  int64_t floats = whole * squares * stride(Panel(0, kernels::kPanel));
  if (index > whole) floats += squares * stride(panel(whole));
  return floats;
}

}  // namespace torchweld::ops::winograd
