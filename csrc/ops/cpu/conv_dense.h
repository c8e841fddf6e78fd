// What the forward and the backward pass of dense_convolution() share.
#pragma once

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

// A convolution cut into blocks. One that reads every pixel by itself is a matrix product, and all
// its pixels one long row.
class Plan {
 public:
  explicit Plan(const ConvolutionShape& shape);

  const ConvolutionShape& shape() const { return shape_; }
  int64_t blocks() const { return shape_.batch * image_blocks(); }
  int64_t image_blocks() const { return row_blocks_ * column_blocks_; }
  Block block(int64_t index) const;
  int64_t first_pixel(const Block& block) const {
    return (block.image * shape_.out_height + block.row) * shape_.out_width + block.column;
  }
  // Input rows that `rows` output rows read.
  int64_t input_rows(int64_t rows) const {
    return (rows - 1) * shape_.stride_height + (shape_.kernel_height - 1) * shape_.dilation_height +
           1;
  }
  int64_t block_rows() const { return rows_; }

  // A kernel row's pixels and channels are contiguous in the input, unless dilation parts them.
  int64_t runs() const { return shape_.kernel_height * row_runs(); }
  int64_t depth() const { return shape_.kernel_width / row_runs() * shape_.channels; }
  int64_t steps() const { return runs() * depth(); }
  int64_t row_runs() const { return shape_.dilation_width == 1 ? 1 : shape_.kernel_width; }

 private:
  ConvolutionShape shape_;
  int64_t rows_, columns_;  // of a block
  int64_t row_blocks_, column_blocks_;
};

// The input as output rows read it: without padding in place, else through zero-padded copies of
// the rows last used.
class Windows {
 public:
  Windows(const Plan& plan, const float* input);

  // Makes the rows a block reads ready.
  void move_to(const Block& block);
  // One pointer per run for the pixel (row, column) of the output.
  void pointers(int64_t row, int64_t column, const float** runs) const;

 private:
  const float* input_row(int64_t row) const;

  const Plan& plan_;
  const float* input_;
  int64_t image_ = 0;
  int64_t padded_;             // floats of a padded row
  int64_t slots_;              // rows kept, row h in slot h % slots_; none without padding in width
  std::vector<float> rows_;    // and a row of zeros
  std::vector<int64_t> kept_;  // which row of the batch a slot holds
};

// Computes the output of one block, panels [first_panel, last_panel).
void forward_block(const Plan& plan, const Windows& windows, const Block& block,
                   const ConvolutionForward& pass, int64_t first_panel, int64_t last_panel);

// Columns of a panel as packed.
int64_t panel_width(int64_t columns, int64_t panel);

}  // namespace torchweld::ops::dense
