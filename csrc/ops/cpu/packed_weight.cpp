// Where packed weights lie.
#include "ops/check.h"
#include "ops/memory.h"

namespace torchweld::ops {
namespace {

// A layer of few rows reads its weight as fast as memory is, and a page table entry for every 4 KB
// of it costs a fifth of that.
Tensor in_huge_pages(Tensor packed_weight) {
  const ScalarType type = packed_weight.scalar_type();
  TORCHWELD_CHECK(type == ScalarType::Char || type == ScalarType::Byte, "_in_huge_pages",
                  "packed_weight", "int8 or uint8", dtype_name(type));
  IntList sizes;
  for (int64_t i = 0; i < packed_weight.dim(); ++i) sizes.push_back(packed_weight.size(i));
  Tensor result = empty(sizes, type, torch::headeronly::MemoryFormat::Contiguous);
  return torch::stable::copy_(result, packed_weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchweld, CPU, m) {
  m.impl("_in_huge_pages", TORCH_BOX(&in_huge_pages));
}

}  // namespace torchweld::ops
