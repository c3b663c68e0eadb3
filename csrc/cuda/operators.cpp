// SPDX-License-Identifier: Apache-2.0
// CUDA side of the operators declared in ops.py: check, gather pointers, launch on the current stream. Nothing here looks at
// device memory, and nothing waits for the device. A file for the C++ compiler: nvcc never reads torch's headers.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <cstdlib>
#include <optional>

#include "../gather.h"
#include "../update_math.h"
#include "kernels.h"

namespace msam::cuda {
namespace {

// Gradients of up to so many bytes ascend in one cooperative launch. It saves the gap between two launches, about 2 us or
// 8 MB at the speed of HBM3e; beyond, blocks that the scheduler hands out as others finish do better than fixed shares.
int64_t cooperative_bytes() {
  static const int64_t bytes = [] {
    const char* asked = std::getenv("MSAM_KERNELS_COOPERATIVE_BYTES");
    if (!asked) return int64_t(32) << 20;
    char* end = nullptr;
    const long long given = std::strtoll(asked, &end, 10);
    TORCH_CHECK(end != asked && !*end && given >= 0, "MSAM_KERNELS_COOPERATIVE_BYTES must be a number of bytes, got ", asked);
    return int64_t(given);
  }();
  return bytes;
}

// What every operator shares: the device, the table, checks, and pointers that live as long as the call. The table's rows
// are on the device, so the checks get none to look at.
class Call {
 public:
  Call(const Tensor& chunks, at::ScalarType dtype) : guard_(chunks.device()), chunks_(chunks), dtype_(dtype) {
    check_table(chunks);
    TORCH_CHECK(chunks.size(0) <= INT32_MAX, "chunks has ", chunks.size(0), " rows, more than a launch has blocks");
  }

  Place list(TensorList tensors, const char* name, bool flat = false) {
    if (tensors.empty()) return {};
    if (flat) {
      check_dense(tensors[0], name, dtype_, device());
      return {tensors[0].data_ptr(), -1};
    }
    TORCH_CHECK(lists_.count == 0 || lists_.segments == int64_t(tensors.size()), name, " has ", tensors.size(),
                " tensors, another list ", lists_.segments, ": every list has one per parameter");
    auto& out = pointers_[lists_.count];
    for (const Tensor& t : tensors) {
      // An empty tensor stands for a parameter that the table does not name.
      if (t.numel()) check_dense(t, name, dtype_, device());
      out.push_back(t.data_ptr());
    }
    lists_.segments = int64_t(tensors.size());
    lists_.data[lists_.count] = out.data();
    return {nullptr, lists_.count++};
  }
  void flat(const MaybeTensor& t, const char* name) const { check_flat(t, name, nullptr, 0, dtype_, device()); }
  void hyper(const Tensor& t, int64_t columns, Common& args) const {
    check_hyper(t, columns, nullptr, 0);
    check_device(t, "hyper", device());
    args.hyper = t.const_data_ptr<double>();
    args.hyper_stride = t.size(1);
  }
  void per_segment(const MaybeTensor& t, const char* name, at::ScalarType dtype) const {
    check_per_segment(t, name, dtype, nullptr, 0);
    if (t) check_device(*t, name, device());
  }
  void norm_sq(const MaybeTensor& t, Common& args) const {
    if (!t) return;
    check_sum(*t, "norm_sq");
    check_device(*t, "norm_sq", device());
    args.norm_sq = t->const_data_ptr<double>();
    args.terms = t->numel();
  }
  void mask(const MaybeTensor& t) const {
    check_mask(t, nullptr, 0);
    if (t) check_device(*t, "mask", device());
  }
  void per_chunk(const Tensor& t, const char* name) const {
    check_per_chunk(t, name, rows());
    check_device(t, name, device());
  }
  // Dots as well as Common.
  template <class Args>
  void begin(Args& args) const {
    args.storage = storage_of(dtype_);
    args.chunks = reinterpret_cast<const Chunk*>(chunks_.const_data_ptr<int64_t>());
    args.rows = rows();
  }

  // The terms of a squared norm, still to be filled.
  Tensor new_norm_sq(InnerProducts& args) const {
    const Tensor norm_sq = rows() ? at::empty({partials_of(rows())}, doubles()) : at::zeros({1}, doubles());
    args.partials = norm_sq.mutable_data_ptr<double>();
    return norm_sq;
  }
  Tensor new_dots(Dots& args) const {
    const int64_t products = args.z ? 6 : 3;
    const Tensor dots =
        rows() ? at::empty({products, partials_of(rows())}, doubles()) : at::zeros({products, 1}, doubles());
    args.partials = dots.mutable_data_ptr<double>();
    return dots;
  }

  template <class Args, class... More>
  void run(cudaError_t (*launcher)(const Args&, const Lists&, More...), const Args& args, More... more) const {
    C10_CUDA_CHECK(launcher(args, lists_, more...));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(device().index()).stream(); }
  at::Device device() const { return chunks_.device(); }
  int64_t rows() const { return chunks_.size(0); }

 private:
  at::TensorOptions doubles() const { return at::TensorOptions().dtype(at::kDouble).device(device()); }

  c10::cuda::CUDAGuard guard_;
  const Tensor& chunks_;
  at::ScalarType dtype_;
  Lists lists_;
  c10::SmallVector<void*, 64> pointers_[kMostLists];
};

Tensor inner_products(TensorList weights, TensorList grads, const Tensor& chunks, const MaybeTensor& ema, double sigma,
                      std::optional<double> eta) {
  Call call(chunks, dtype_of(grads, {}, "grads"));
  InnerProducts a;
  gather_direction(call, a, eta ? weights : TensorList(), grads, ema, sigma, eta);
  const Tensor norm_sq = call.new_norm_sq(a);
  call.run(&launch_inner_products, a, call.stream());
  return norm_sq;
}

void perturb(TensorList weights, TensorList acc, TensorList grads, const Tensor& chunks, const Tensor& norm_sq,
             const Tensor& hyper, const Tensor& achieved_sq, const MaybeTensor& acc_sq, const MaybeTensor& saved,
             const MaybeTensor& origin, const MaybeTensor& ema, const MaybeTensor& mask, double sigma,
             std::optional<double> lmbda, std::optional<double> eta) {
  Call call(chunks, dtype_of(weights, grads, "weights"));
  Perturb a;
  gather_perturbation(call, a, weights, acc, grads, hyper, achieved_sq, acc_sq, saved, origin, ema, mask, sigma, lmbda, eta);
  call.norm_sq(norm_sq, a);
  call.run(&launch_perturb, a, call.stream());
  achieved_sq.unsafeGetTensorImpl()->bump_version();  // tells that the weights were saved
}

Tensor ascend(TensorList weights, TensorList grads, const Tensor& chunks, const Tensor& hyper, const Tensor& achieved_sq,
              const MaybeTensor& saved, const MaybeTensor& ema, const MaybeTensor& mask, double sigma,
              std::optional<double> lmbda, std::optional<double> eta) {
  Call call(chunks, dtype_of(weights, grads, "weights"));
  Perturb a;
  gather_perturbation(call, a, weights, {}, grads, hyper, achieved_sq, {}, saved, {}, ema, mask, sigma, lmbda, eta);
  const Tensor norm_sq = call.new_norm_sq(a);
  call.norm_sq(norm_sq, a);
  int64_t bytes = 0;
  for (const Tensor& g : grads) bytes += int64_t(g.nbytes());
  call.run(&launch_ascend, a, bytes <= cooperative_bytes(), call.stream());
  achieved_sq.unsafeGetTensorImpl()->bump_version();
  return norm_sq;
}

Tensor dots(TensorList x, TensorList y, TensorList z, const Tensor& chunks) {
  Call call(chunks, dtype_of(x, {}, "x"));
  Dots a;
  call.begin(a);
  a.x = call.list(x, "x");
  a.y = call.list(y, "y");
  a.z = call.list(z, "z");
  TORCH_CHECK(a.y, "y is empty");
  const Tensor terms = call.new_dots(a);
  call.run(&launch_dots, a, call.stream());
  return terms;
}

void restore(TensorList weights, TensorList acc, TensorList grads, const Tensor& chunks, const MaybeTensor& saved,
             const MaybeTensor& norm_sq, const MaybeTensor& coefs, double c_acc, double c) {
  Call call(chunks, dtype_of(weights, acc, "weights and acc"));
  TORCH_CHECK(weights.empty() || saved, "weights are restored from saved, which is missing");
  TORCH_CHECK(grads.empty() || !acc.empty(), "grads are added to acc, which is missing");
  Restore a;
  gather_descent(call, a, weights, acc, grads, saved, norm_sq, coefs, c_acc, c);
  call.run(&launch_restore, a, call.stream());
}

void sgd(TensorList weights, TensorList acc, TensorList grads, const Tensor& chunks, const Tensor& hyper,
         const MaybeTensor& saved, const MaybeTensor& momentum_buffer, const MaybeTensor& fresh,
         const MaybeTensor& norm_sq, const MaybeTensor& coefs, double c_acc, double c) {
  TORCH_CHECK(!weights.empty() && !grads.empty(), "sgd needs weights and grads");
  Call call(chunks, dtype_of(weights, grads, "weights"));
  Update a;
  gather_descent(call, a, weights, acc, grads, saved, norm_sq, coefs, c_acc, c);
  gather_sgd(call, a, hyper, momentum_buffer, fresh);
  call.run(&launch_sgd, a, call.stream());
}

void adam(TensorList weights, TensorList acc, TensorList grads, const Tensor& chunks, const Tensor& hyper,
          const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& step, const MaybeTensor& max_exp_avg_sq,
          const MaybeTensor& saved, const MaybeTensor& norm_sq, const MaybeTensor& coefs, double c_acc, double c) {
  TORCH_CHECK(!weights.empty() && !grads.empty(), "adam needs weights and grads");
  Call call(chunks, dtype_of(weights, grads, "weights"));
  Update a;
  const int64_t segments = gather_descent(call, a, weights, acc, grads, saved, norm_sq, coefs, c_acc, c);
  gather_adam(call, a, hyper, exp_avg, exp_avg_sq, step, max_exp_avg_sq);
  TORCH_CHECK(step.numel() == segments + 1, "step must have ", segments + 1,
              " elements, one per parameter and the kernels' ticket, got ", step.numel());
  a.ticket = reinterpret_cast<unsigned*>(a.step + segments);
  call.run(&launch_adam, a, call.stream());
}

}  // namespace

// The tests run this file on the CPU, with an emulator in place of the GPU.
#ifndef MSAM_DISPATCH_KEY
#define MSAM_DISPATCH_KEY CUDA
#endif
TORCH_LIBRARY_IMPL(msam_kernels, MSAM_DISPATCH_KEY, m) {
  m.impl("inner_products", &inner_products);
  m.impl("perturb", &perturb);
  m.impl("ascend", &ascend);
  m.impl("dots", &dots);
  m.impl("restore", &restore);
  m.impl("sgd", &sgd);
  m.impl("adam", &adam);
}

}  // namespace msam::cuda
