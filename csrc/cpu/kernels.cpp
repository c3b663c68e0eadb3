// SPDX-License-Identifier: Apache-2.0
// One portable binary: loops.h is compiled for the baseline and, on x86, for AVX2 and AVX-512; the processor decides at
// run time. All give the same bits.
#include "kernels.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../update_math.h"
#include "storage.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MSAM_X86 1
#include <immintrin.h>
#else
#define MSAM_X86 0
#endif

// In-place updates read and write the same element only, which the compiler cannot see.
#if defined(__clang__)
#define MSAM_VECTOR _Pragma("clang loop vectorize(assume_safety)")
#else
#define MSAM_VECTOR _Pragma("GCC ivdep")
#endif

namespace msam::cpu {
namespace {

constexpr int kBlock = 256;
constexpr int kLanes = 32;
static_assert(kBlock % kLanes == 0, "a full block is whole lanes");
typedef double Doubles8 __attribute__((vector_size(64)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef int64_t Longs8 __attribute__((vector_size(64)));
typedef int32_t Ints8 __attribute__((vector_size(32)));

namespace baseline {
#include "loops.h"
}

#if MSAM_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
namespace avx2 {
#include "loops.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c,prefer-vector-width=512")
#endif
namespace avx512 {
#include "loops.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#define MSAM_BUILD(isa) \
  Kernels { #isa, isa::norm_entry, isa::perturb_entry, isa::gram_entry, isa::descend_entry, isa::update_entry }

Kernels choose() {
  const char* asked = std::getenv("MSAM_KERNELS_ISA");
  const auto wanted = [&](const char* isa) { return !asked || std::strcmp(asked, isa) == 0; };
#if MSAM_X86
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && wanted("avx512")) return MSAM_BUILD(avx512);
  if (has_avx2 && wanted("avx2")) return MSAM_BUILD(avx2);
#endif
  if (wanted("baseline")) return MSAM_BUILD(baseline);
  throw std::runtime_error(std::string("MSAM_KERNELS_ISA=") + asked +
                           " is not there on this processor: unset it, or use baseline, avx2 or avx512");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace msam::cpu
