// SPDX-License-Identifier: Apache-2.0
// Tables of the CPU kernels by instruction set and storage type. Knows no torch.
#pragma once

#include "../arguments.h"

namespace msam::cpu {

// What a call's kernels know beside their arguments.
struct Context {
  const Lists* lists;
  bool large = false;  // does not fit the cache: prefetch, and store past it what is not read again soon
  const double* norm_sq = nullptr;  // of the ascent, of each micro-batch
  double coefficients[kTerms] = {};
};

// Each works on rows [first, last) of the table.
template <class Arguments>
using Kernel = void (*)(const Arguments&, const Context&, int64_t first, int64_t last);
struct Kernels {  // of one instruction set and one storage type
  Kernel<Norm> norm;
  Kernel<Perturb> perturb;
  Kernel<Gram> gram;
  Kernel<Descend> descend;
  Kernel<Update> update;
};

// Those for the widest instruction set that this processor has, or for the one that MSAM_KERNELS_ISA (baseline, avx2, avx512)
// names; throws where that is not there.
const Kernels& kernels(Storage storage);
const char* instruction_set();

}  // namespace msam::cpu
