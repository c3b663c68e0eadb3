// SPDX-License-Identifier: Apache-2.0
// 16-bit storage types of the CPU kernels: conversions to and from fp32, round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "../segments.h"
#include "../update_math.h"

namespace msam::cpu {

MSAM_FN float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
MSAM_FN uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}

MSAM_FN uint16_t round_to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);  // rounding must not turn a NaN into infinity
}

MSAM_FN float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals on the way.
  const float f = bits_to_float(magnitude << 13) * bits_to_float(0x77800000);
  return bits_to_float(sign | float_to_bits(f));
}

MSAM_FN uint16_t round_to_half(float f) {
  const uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000)
    h = 0x7e00;
  else if (magnitude >= 0x47800000)  // 65536 and more
    h = 0x7c00;
  else if (magnitude < 0x38800000)  // below 2^-14: adding 1/2 leaves the subnormal's bits, rounded by the processor
    h = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  else
    h = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  return uint16_t(sign | h);
}

}  // namespace msam::cpu
