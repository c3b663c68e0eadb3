// SPDX-License-Identifier: Apache-2.0
// The launchers of the CUDA kernels, and what a launch has beside the arguments that all devices share. Knows no torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../arguments.h"

namespace msam::cuda {

// A launch carries the pointers of its lists. Where they are too many for one, each of several has those of the segments
// [begin, end).
template <class Args>
struct Window : Args {
  int64_t begin = 0, end = INT64_MAX;
  int64_t segments = 0;  // of all windows
  int sizes = -1;        // the list that holds Lists::sizes, behind the others
};

// Terms of a sum over all rows: a number of its own for every table, whatever the GPU, so that all GPUs add in the same order.
// As many blocks fill any of them, and few enough that every block of the next kernel can add the terms up by itself.
constexpr int64_t kPartials = 1024;
MSAM_FN int64_t partials_of(int64_t rows) { return rows < kPartials ? rows : kPartials; }

// On the current device, in order on `stream`; a table without rows launches nothing.
cudaError_t launch_norm(const Norm&, const Lists&, cudaStream_t stream);
cudaError_t launch_perturb(const Perturb&, const Lists&, cudaStream_t stream);
// The two one after the other, the terms of the norm in args.partials: the same bits in one launch, where args.arrived is there
// and the pointers fit. Of a stack with an EMA that moves on, so for one micro-batch after the other.
cudaError_t launch_ascend(const Perturb&, const Lists&, cudaStream_t stream);
cudaError_t launch_weigh(const Weigh&, cudaStream_t stream);
cudaError_t launch_gram(const Gram&, const Lists&, cudaStream_t stream);
cudaError_t launch_descend(const Descend&, const Lists&, cudaStream_t stream);
cudaError_t launch_update(const Update&, const Lists&, cudaStream_t stream);

}  // namespace msam::cuda
