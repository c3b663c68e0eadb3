// SPDX-License-Identifier: Apache-2.0
// Empty on other architectures.
#if defined(__x86_64__)
#if !(defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__F16C__))
#error "avx512 needs its flags, which are in setup.py"
#endif
#define MSAM_ISA avx512
#include "../unit.h"
#endif
