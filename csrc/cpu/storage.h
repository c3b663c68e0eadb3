// SPDX-License-Identifier: Apache-2.0
// 16-bit storage types of the CPU kernels: conversions to and from fp32, round to nearest even.
#pragma once

#include <cstdint>

#include "../segments.h"
#include "../update_math.h"

namespace msam::cpu {

MSAM_FN uint16_t round_to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);  // rounding must not turn a NaN into infinity
}

// No number on the way is subnormal in fp32: torch.set_flush_denormal would have it taken for zero, where F16C's is not.
MSAM_FN float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  const bool subnormal = magnitude < 0x400;
  // The exponent's bias goes from 15 to 127. A subnormal stands behind the leading one of 2^-14, which then leaves.
  uint32_t u = (magnitude << 13) + 0x38000000 + (subnormal ? 0x800000 : 0);
  u = float_to_bits(bits_to_float(u) - bits_to_float(subnormal ? 0x38800000 : 0));
  u += magnitude >= 0x7c00 ? 0x38000000 : 0;
  return bits_to_float(sign | u);
}

MSAM_FN uint16_t round_to_half(float f) {
  const uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000)
    h = 0x7e00 | (magnitude >> 13 & 0x3ff);  // what F16C keeps of a NaN
  else if (magnitude >= 0x47800000)  // 65536 and more
    h = 0x7c00;
  else if (magnitude < 0x38800000)  // below 2^-14: adding 1/2 leaves the subnormal's bits, rounded by the processor
    h = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  else
    h = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  return uint16_t(sign | h);
}

}  // namespace msam::cpu
