#include "top_k.h"

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <limits>
#include <numeric>
#include <ostream>
#include <sstream>

namespace weld {
namespace {

constexpr int64_t kShownRows = 20;

bool is_floating(DType dtype) {
  return dtype == DType::float16 || dtype == DType::bfloat16 || dtype == DType::float32 ||
         dtype == DType::float64;
}

// "7 99.81 %   1 0.12 %": classes by falling logit, NaN first so that it is seen, then by number.
std::string top_classes(const Array& logits, int64_t row, int64_t k) {
  const int64_t classes = logits.shape[1];
  std::vector<double> values(static_cast<size_t>(classes));
  for (int64_t c = 0; c < classes; ++c) values[c] = element(logits, row * classes + c);
  std::vector<int64_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  const auto key = [&](int64_t c) {
    return std::isnan(values[c]) ? std::numeric_limits<double>::infinity() : values[c];
  };
  k = std::min(k, classes);
  std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int64_t a, int64_t b) {
    const bool nan_a = std::isnan(values[a]);
    const bool nan_b = std::isnan(values[b]);
    if (nan_a != nan_b) return nan_a;
    return key(a) != key(b) ? key(a) > key(b) : a < b;
  });
  const double largest = k > 0 ? values[order[0]] : 0;
  double sum = 0;
  for (const double value : values) sum += std::exp(value - largest);

  std::ostringstream text;
  text << std::fixed << std::setprecision(2);
  for (int64_t i = 0; i < k; ++i) {
    const double share = std::exp(values[order[i]] - largest) / sum;
    text << (i ? "   " : "") << order[i] << ' ' << 100 * std::abs(share) << " %";  // no "-nan"
  }
  return text.str();
}

}  // namespace

void show_output(std::ostream& out, const std::string& title, const Array& output, int64_t k) {
  if (output.shape.size() == 2 && output.shape[1] > 0 && is_floating(output.dtype)) {
    const int64_t count = output.shape[0];
    for (int64_t row = 0; row < std::min(count, kShownRows); ++row) {
      out << title << " row " << row << ": " << top_classes(output, row, k) << '\n';
    }
    if (count > kShownRows) out << "... and " << count - kShownRows << " more rows\n";
    if (count == 0) out << title << " has no rows\n";
    return;
  }
  out << title << ": " << name(output.dtype) << ' ' << to_string(output.shape);
  if (const int64_t count = output.numel(); count > 0) {
    double low = element(output, 0);
    double high = low;
    bool nan = false;
    for (int64_t i = 0; i < count; ++i) {
      const double value = element(output, i);
      nan |= std::isnan(value);
      low = std::fmin(low, value);
      high = std::fmax(high, value);
    }
    out << " from " << low << " to " << high << (nan ? ", with NaN" : "");
  }
  out << '\n';
}

}  // namespace weld
