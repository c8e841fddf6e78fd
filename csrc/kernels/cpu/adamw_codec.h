// The codecs of int8 AdamW states, a register of bytes at a time.
#pragma once

#include "kernels/adamw_math.h"

namespace torchweld::kernels::TORCHWELD_ISA {

inline void store_codes(uint8_t* codes, VecU32 code) {
  const VecI8 bytes = low_bytes((VecI32)code);
  memcpy(codes, &bytes, sizeof bytes);
}

inline VecF decode_codes(ExpAvgCodec, const uint8_t* codes, VecF unit) {
  VecI8 bytes;
  memcpy(&bytes, codes, sizeof bytes);
  return ExpAvgCodec::decode((VecU32)widen(bytes), unit);
}

inline VecF decode_codes(ExpAvgSqCodec, const uint8_t* codes, VecF unit) {
  VecU8 bytes;
  memcpy(&bytes, codes, sizeof bytes);
  return ExpAvgSqCodec::decode(widen(bytes), unit);
}

}  // namespace torchweld::kernels::TORCHWELD_ISA
