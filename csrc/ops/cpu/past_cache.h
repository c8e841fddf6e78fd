// Whether to write a tensor past the caches.
#pragma once

#include <cstdint>

namespace torchweld::ops {

// For a pass that writes so many bytes and reads as many of other tensors, one to three: beyond a
// quarter of a last cache level of 32 MiB, the first of them would have left it before the pass
// ends, and whoever reads them next finds them in memory either way. A constant, since the C
// library has been seen to report a whole machine's cache, twelve times what a core can use. It
// changes no bits.
inline bool leaves_cache(int64_t bytes) { return bytes > int64_t{8} << 20; }

}  // namespace torchweld::ops
