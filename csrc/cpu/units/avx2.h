// SPDX-License-Identifier: Apache-2.0
// Empty on other architectures.
#if defined(__x86_64__)
#if !(defined(__AVX2__) && defined(__F16C__))
#error "avx2 needs its flags, which are in setup.py"
#endif
#define MSAM_ISA avx2
#include "../unit.h"
#endif
