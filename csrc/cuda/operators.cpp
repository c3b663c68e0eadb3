// SPDX-License-Identifier: Apache-2.0
// The operators on CUDA: kernels launched on the current stream. Nothing here looks at device memory, and nothing waits for
// the device. A file for the C++ compiler: nvcc never reads torch's headers.
#include "../operators.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdlib>

#include "kernels.h"

namespace msam::cuda {
namespace {

// Gradients of up to so many bytes ascend in one cooperative launch. It saves the gap between two launches, about 2 us or
// 8 MB at the speed of HBM3e; beyond, blocks that the scheduler hands out as others finish do better than fixed shares.
int64_t cooperative_bytes() {
  const char* asked = std::getenv("MSAM_KERNELS_COOPERATIVE_BYTES");
  if (!asked) return int64_t(32) << 20;
  char* end = nullptr;
  const long long bytes = std::strtoll(asked, &end, 10);
  TORCH_CHECK(end != asked && !*end && bytes >= 0, "MSAM_KERNELS_COOPERATIVE_BYTES must be a number of bytes, got ",
              asked);
  return int64_t(bytes);
}

class Device : public Call {
 public:
  Device(const Tensor& table, at::ScalarType dtype)
      : Call(table, dtype, false), guard_(table.device()), itemsize_(int64_t(c10::elementSize(dtype))) {
    TORCH_CHECK(rows() <= INT32_MAX, "table has ", rows(), " rows, more than a launch has blocks");
  }

  Tensor run(Norm& a) const {
    const Tensor norm_sq = sums_of_rows(a.storage);
    a.partials = norm_sq.mutable_data_ptr<double>();
    launch(&launch_norm, a);
    return norm_sq;
  }
  Tensor run(Gram& a) const {
    const Tensor sums = sums_of_rows(a.storage, a.count * (a.count + 1) / 2);
    a.partials = sums.mutable_data_ptr<double>();
    launch(&launch_gram, a);
    return sums;
  }
  void run(Perturb& a) const { launch(&launch_perturb, a); }
  Tensor ascend(Perturb& a) const {
    const Tensor norm_sq = sums_of_rows(a.storage);
    a.partials = norm_sq.mutable_data_ptr<double>();
    a.norm_sq = {a.partials, 1, norm_sq.numel()};
    launch(&launch_ascend, a, lists().elements[a.grads.list] * itemsize_ <= cooperative_bytes());
    return norm_sq;
  }
  void run(Descend& a) const { launch(&launch_descend, a); }
  void run(Update& a) const { launch(&launch_update, a); }

 private:
  // The terms of a sum, or of several, still to be filled; zero for an empty table, which launches nothing.
  Tensor sums_of_rows(Storage storage, std::optional<int64_t> several = {}) const {
    const auto options = at::TensorOptions().dtype(at::kDouble).device(device());
    c10::SmallVector<int64_t, 2> sizes;
    if (several) sizes.push_back(*several);
    sizes.push_back(rows() ? partials_of(rows()) * parts_of(storage) : 1);
    return rows() ? at::empty(sizes, options) : at::zeros(sizes, options);
  }
  template <class Arguments, class... More>
  void launch(cudaError_t (*launcher)(const Arguments&, const Lists&, cudaStream_t, More...), const Arguments& a,
              More... more) const {
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(device().index()).stream();
    C10_CUDA_CHECK(launcher(a, lists(), stream, more...));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  c10::cuda::CUDAGuard guard_;
  int64_t itemsize_;
};

}  // namespace

// The tests run this file on the CPU, with an emulator in place of the GPU.
#ifndef MSAM_DISPATCH_KEY
#define MSAM_DISPATCH_KEY CUDA
#endif
TORCH_LIBRARY_IMPL(msam_kernels, MSAM_DISPATCH_KEY, m) { Operators<Device>::implement(m); }

}  // namespace msam::cuda
