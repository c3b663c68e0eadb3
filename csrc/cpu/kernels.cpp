// SPDX-License-Identifier: Apache-2.0
// One portable binary: units/ has the loops for the baseline and, on x86, for AVX2 and AVX-512; the processor decides at run
// time. All give the same bits.
#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace msam::cpu {
namespace {

struct Build {
  const char* instruction_set;
  const Kernels* kernels[4];  // by Storage
};

}  // namespace

#define MSAM_BUILD(isa)                                                   \
  namespace isa {                                                         \
  extern const Kernels of_float, of_double, of_bf16, of_half;             \
  const Build build{#isa, {&of_float, &of_double, &of_bf16, &of_half}};   \
  }
MSAM_BUILD(baseline)
#if defined(__x86_64__)
MSAM_BUILD(avx2)
MSAM_BUILD(avx512)
#endif
#undef MSAM_BUILD

namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports of clang 16 does not know it.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

const Build& choose() {
  const char* asked = std::getenv("MSAM_KERNELS_ISA");
  const auto wanted = [&](const char* isa) { return !asked || std::strcmp(asked, isa) == 0; };
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && has_f16c();
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && wanted("avx512")) return avx512::build;
  if (has_avx2 && wanted("avx2")) return avx2::build;
#endif
  if (wanted("baseline")) return baseline::build;
  throw std::runtime_error(std::string("MSAM_KERNELS_ISA=") + asked +
                           " is not there on this processor: unset it, or use baseline, avx2 or avx512");
}

const Build& chosen() {
  static const Build& build = choose();
  return build;
}

}  // namespace

const Kernels& kernels(Storage storage) { return *chosen().kernels[static_cast<int>(storage)]; }

const char* instruction_set() { return chosen().instruction_set; }

}  // namespace msam::cpu
