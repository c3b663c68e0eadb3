// SPDX-License-Identifier: Apache-2.0
// One unit of the CPU kernels: loops.h for one instruction set, MSAM_ISA, and one storage type, MSAM_STORAGE. The files of
// units/ name the two, and setup.py has the compiler's flags for each instruction set.
//
// Whatever a unit defines stays its own. An inline function that another file defines too is one function to the linker, which
// would keep AVX-512's copy of it as well as any other: so the loops are in an unnamed namespace, and what they share with
// other files is inlined everywhere. tests/test_cpu_build.py looks at what comes out.
#pragma once

#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "../update_math.h"
#include "kernels.h"
#include "storage.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// In-place updates read and write the same element only, which the compiler cannot see.
#if defined(__clang__)
#define MSAM_VECTOR _Pragma("clang loop vectorize(assume_safety)")
#else
#define MSAM_VECTOR _Pragma("GCC ivdep")
#endif

namespace msam::cpu::MSAM_ISA {
namespace {

constexpr int kBlock = 256;
constexpr int kLanes = 32;
static_assert(kBlock % kLanes == 0, "a full block is whole lanes");

// Doubles of a register: gcc takes wider vectors apart, and compares and selects their elements one by one.
#if defined(__AVX512F__)
constexpr int kWidth = 8;
#elif defined(__AVX__)
constexpr int kWidth = 4;
#else
constexpr int kWidth = 2;
#endif
typedef double Doubles __attribute__((vector_size(8 * kWidth)));
typedef int64_t Longs __attribute__((vector_size(8 * kWidth)));
typedef uint64_t ULongs __attribute__((vector_size(8 * kWidth)));
typedef float Floats __attribute__((vector_size(8 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(8 * kWidth)));

#include "loops.h"

}  // namespace

#define MSAM_TABLE_OF(storage) of_##storage
#define MSAM_TABLE(storage) MSAM_TABLE_OF(storage)
extern const Kernels MSAM_TABLE(MSAM_STORAGE);
const Kernels MSAM_TABLE(MSAM_STORAGE) = {
    norm<MSAM_STORAGE>, perturb<MSAM_STORAGE>, gram<MSAM_STORAGE>, descend<MSAM_STORAGE>, update<MSAM_STORAGE>,
};

}  // namespace msam::cpu::MSAM_ISA
