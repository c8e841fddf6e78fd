// What the forward and the backward pass of dense_convolution() share.
#pragma once

#include <algorithm>
#include <vector>

#include "ops/cpu/convolution.h"

namespace torchweld::ops::dense {

// Consecutive output pixels of one image: some whole rows, or a part of one row.
struct Block {
  int64_t image;
  int64_t row, rows;
  int64_t column, columns;

  int64_t pixels() const { return rows * columns; }
};

// How many pixels a block should have, and whether pixels may be regrouped: a convolution that
// reads each by itself is a matrix product, and all of them one long row.
struct Cut {
  int64_t pixels;
  bool regroup = true;
};

// A convolution cut into blocks.
class Plan {
 public:
  Plan(const ConvolutionShape& shape, const Cut& cut);

  const ConvolutionShape& shape() const { return shape_; }
  // Whether pixels were regrouped.
  bool is_matrix_product() const { return matrix_product_; }
  int64_t blocks() const { return shape_.batch * image_blocks(); }
  int64_t image_blocks() const { return row_blocks_ * column_blocks_; }
  int64_t block_rows() const { return rows_; }
  Block block(int64_t index) const;
  int64_t first_pixel(const Block& block) const {
    return (block.image * shape_.out_height + block.row) * shape_.out_width + block.column;
  }
  // Input rows that `rows` output rows read.
  int64_t input_rows(int64_t rows) const {
    return (rows - 1) * shape_.stride_height + (shape_.kernel_height - 1) * shape_.dilation_height +
           1;
  }

  // A kernel row's pixels and channels are contiguous in the input, unless dilation parts them.
  int64_t runs() const { return shape_.kernel_height * row_runs(); }
  int64_t row_runs() const { return shape_.dilation_width == 1 ? 1 : shape_.kernel_width; }
  int64_t depth() const { return shape_.kernel_width / row_runs() * shape_.channels; }
  int64_t steps() const { return runs() * depth(); }
  // Floats of a packed column: in bfloat16 two steps of a run share one.
  int64_t packed_steps() const {
    return shape_.dtype == kernels::DType::bfloat16 ? runs() * divide_up(depth(), 2) : steps();
  }

 private:
  ConvolutionShape shape_;
  bool matrix_product_;
  int64_t rows_, columns_;  // of a block
  int64_t row_blocks_, column_blocks_;
};

// The input as output rows read it: in place where no padding is read left and right, else through
// zero-padded copies of the rows last used.
template <class T>
class Windows {
 public:
  Windows(const Plan& plan, const T* input);

  // Makes the rows a block reads ready.
  void move_to(const Block& block);
  // A pointer per run for every row of the block last moved to: [row][run].
  const T* const* pointers() const { return pointers_.data(); }

 private:
  const T* input_row(int64_t image, int64_t row) const;

  const Plan& plan_;
  const T* input_;
  int64_t left_;               // pixels of padding before a copied row
  int64_t padded_;             // values of a row with its padding
  int64_t slots_ = 0;          // copies kept, row h in slot h % slots_
  std::vector<T> rows_;        // and a row of zeros
  std::vector<int64_t> kept_;  // which row of the batch a slot holds
  std::vector<const T*> pointers_;
};

// Where an output goes: values from one image, row and pixel to the next.
template <class T>
struct Target {
  T* data;
  int64_t image, row, pixel;

  T* at(const Block& block) const {
    return data + block.image * image + block.row * row + block.column * pixel;
  }
};

// Computes panels [first, last) of the block that `windows` was moved to. Fetches what is ahead,
// else panel by panel the next one, which comes from memory where a batch is small.
void forward_block(const Plan& plan, const Windows<float>& windows, const Block& block,
                   const float* packed, const Target<float>& target,
                   const kernels::Epilogue& epilogue, int64_t first, int64_t last,
                   kernels::Ahead* ahead = nullptr);
void forward_block(const Plan& plan, const Windows<BFloat16>& windows, const Block& block,
                   const float* packed, const Target<BFloat16>& target,
                   const kernels::EpilogueOf<BFloat16>& epilogue, int64_t first, int64_t last);

void pack(const Plan& plan, const BFloat16* weight, float* packed);

void backward(const ConvolutionShape& shape, const ConvolutionBackward& pass);

inline int64_t panels_of(int64_t columns) { return divide_up(columns, kernels::kPanel); }
// Columns of a panel as packed.
inline int64_t panel_width(int64_t columns, int64_t panel) {
  const int64_t left = std::min(kernels::kPanel, columns - panel * kernels::kPanel);
  return divide_up(left, kernels::kPanelGroup) * kernels::kPanelGroup;
}
inline int64_t packed_size(int64_t columns, int64_t steps) {
  const int64_t last = panels_of(columns) - 1;
  return (last * kernels::kPanel + panel_width(columns, last)) * steps;
}

}  // namespace torchweld::ops::dense
