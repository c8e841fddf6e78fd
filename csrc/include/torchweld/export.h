#pragma once

#if defined(TORCHWELD_BUILDING_OPS)
#define TORCHWELD_API __attribute__((visibility("default")))
#else
#define TORCHWELD_API
#endif
