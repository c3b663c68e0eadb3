// SPDX-License-Identifier: Apache-2.0
// The operators on CUDA: kernels launched on the current stream. Nothing here looks at device memory, and nothing waits for
// the device. A file for the C++ compiler: nvcc never reads torch's headers.
#include "../operators.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels.h"

namespace msam::cuda {
namespace {

class Device : public Call {
 public:
  Device(const Tensor& table, ScalarType dtype) : Call(table, dtype, false), guard_(table.device()) {
    TORCH_CHECK(rows() <= INT32_MAX - kPartials, "table has ", rows(), " rows, more than a launch has blocks");
  }

  explicit Device(const Tensor& shares) : Call(shares), guard_(shares.device()) {}

  Tensor run(Norm& a, bool stacked) const {
    const Tensor norm_sq = sums_of_rows(a.storage, stacked ? std::optional(a.last) : std::nullopt);
    a.partials = norm_sq.mutable_data_ptr<double>();
    launch(&launch_norm, a);
    return norm_sq;
  }
  Tensor run(Gram& a, bool stacked) const {
    const int64_t count = a.count * (a.count + 1) / 2;
    const Tensor sums = sums_of_rows(a.storage, stacked ? std::optional(a.last) : std::nullopt, count);
    a.partials = sums.mutable_data_ptr<double>();
    launch(&launch_gram, a);
    return sums;
  }
  void run(Perturb& a) const { launch(&launch_perturb, a); }
  Tensor ascend(Perturb& a, bool stacked) const {
    const Tensor norm_sq = sums_of_rows(a.storage, stacked ? std::optional(a.last) : std::nullopt);
    a.partials = norm_sq.mutable_data_ptr<double>();
    a.norm_sq = {a.partials, 1, norm_sq.size(-1)};
    launch(&launch_ascend, a);
    return norm_sq;
  }
  Tensor run(Weigh& a) const {
    const auto options = at::TensorOptions().dtype(at::kDouble).device(device());
    const Tensor out = at::empty({a.combination.count, a.count}, options);
    a.out = out.mutable_data_ptr<double>();
    C10_CUDA_CHECK(launch_weigh(a, stream()));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return out;
  }
  void run(Descend& a) const { launch(&launch_descend, a); }
  void run(Update& a) const { launch(&launch_update, a); }

 private:
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(device().index()).stream(); }
  // The terms of a sum, or of several, of each of a stack, still to be filled; zero for an empty table, which launches nothing.
  Tensor sums_of_rows(Storage storage, std::optional<int64_t> stack, std::optional<int64_t> several = {}) const {
    const auto options = at::TensorOptions().dtype(at::kDouble).device(device());
    c10::SmallVector<int64_t, 3> sizes;
    if (stack) sizes.push_back(*stack);
    if (several) sizes.push_back(*several);
    sizes.push_back(rows() ? partials_of(rows()) * parts_of(storage) : 1);
    return rows() ? at::empty(sizes, options) : at::zeros(sizes, options);
  }
  template <class Arguments>
  void launch(cudaError_t (*launcher)(const Arguments&, const Lists&, cudaStream_t), const Arguments& a) const {
    C10_CUDA_CHECK(launcher(a, lists(), stream()));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  c10::cuda::CUDAGuard guard_;
};

}  // namespace

// The tests run this file on the CPU, with an emulator in place of the GPU.
#ifndef MSAM_DISPATCH_KEY
#define MSAM_DISPATCH_KEY CUDA
#endif
MSAM_LIBRARY_IMPL(msam_kernels, MSAM_DISPATCH_KEY, m) { Operators<Device>::implement(m); }

}  // namespace msam::cuda
