// SPDX-License-Identifier: Apache-2.0
// CPU side of the operators declared in ops.py: check, gather pointers, run a kernel over torch's thread pool.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <vector>

#include "../gather.h"
#include "../update_math.h"
#include "kernels.h"

namespace msam::cpu {
namespace {

// Elements of a piece of work: for fewer, waking another thread costs more than it saves, and much more when it is slow to
// come.
constexpr int64_t kGrain = 32768;
// Stores past the cache pay once a buffer no longer fits the one that the cores share.
constexpr int64_t kLargeBytes = int64_t(8) << 20;

// Neumaier's sum, in the order of the chunks.
double total(const Tensor& partials) {
  const double* p = partials.const_data_ptr<double>();
  double sum = 0, lost = 0;
  for (int64_t k = 0; k < partials.numel(); ++k) {
    const double next = sum + p[k];
    lost += std::abs(sum) >= std::abs(p[k]) ? (sum - next) + p[k] : (p[k] - next) + sum;
    sum = next;
  }
  // With an infinite term the correction is NaN; the sum already says what there is to say.
  return is_finite(lost) ? sum + lost : sum;
}

// What every operator shares: the table, its checks, and pointers that live as long as the call.
class Call {
 public:
  Call(const Tensor& chunks, at::ScalarType dtype) : dtype_(dtype) {
    check_table(chunks);
    chunks_ = reinterpret_cast<const Chunk*>(chunks.const_data_ptr<int64_t>());
    size_ = chunks.size(0);
    uint64_t elements = 0;  // rows are checked later: a sum of hostile ones wraps round
    for (int64_t k = 0; k < size_; ++k) elements += uint64_t(chunks_[k].numel);
    elements_ = int64_t(elements);
  }

  Pointers list(TensorList tensors, const char* name, bool flat = false) {
    if (tensors.empty()) return {};
    check_list(tensors, name, chunks_, size_, flat);
    TORCH_INTERNAL_ASSERT(lists_ < kMostLists);
    auto& out = pointers_[lists_++];
    for (const Tensor& t : tensors) {
      // An empty tensor stands for a parameter that the table does not name.
      if (t.numel()) check_dense(t, name, dtype_, device());
      out.push_back(t.data_ptr());
    }
    return {out.data(), flat};
  }
  void flat(const MaybeTensor& t, const char* name) const { check_flat(t, name, chunks_, size_, dtype_, device()); }
  void hyper(const Tensor& t, int64_t columns, Common& args) const {
    check_hyper(t, columns, chunks_, size_);
    args.hyper = t.const_data_ptr<double>();
    args.hyper_stride = t.size(1);
  }
  void per_segment(const MaybeTensor& t, const char* name, at::ScalarType dtype) const {
    check_per_segment(t, name, dtype, chunks_, size_);
  }
  // To be called when args.c is set: an ascent gradient that was not finite makes it NaN.
  void norm_sq(const MaybeTensor& t, Restore& args) const {
    if (!t) return;
    check_sum(*t, "norm_sq");
    args.poison = !is_finite(total(*t));
    if (args.poison) args.c = std::nan("");
  }
  void mask(const MaybeTensor& t) const { check_mask(t, chunks_, size_); }
  void per_chunk(const Tensor& t, const char* name) const { check_per_chunk(t, name, size_); }
  // Dots as well as Common.
  template <class Args>
  void begin(Args& args) const {
    args.storage = storage_of(dtype_);
    args.chunks = chunks_;
    args.large = elements_ * int64_t(c10::elementSize(dtype_)) >= kLargeBytes;
  }

  at::Device device() const { return at::kCPU; }
  const Chunk& chunk(int64_t k) const { return chunks_[k]; }
  int64_t size() const { return size_; }

  // Every thread has an even share of the elements, in pieces of kGrain, and then helps with what others have left: neither
  // memory nor other processes leave the cores equally fast.
  template <class F>
  void run(F&& kernel, bool backwards = false) const {
    if (elements_ <= kGrain) return kernel(0, size_);
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), (elements_ + kGrain - 1) / kGrain);
    const int64_t enough = std::min(kGrain, elements_ / threads);
    std::vector<int64_t> pieces{0};  // where each begins, and the end
    for (int64_t k = 0, elements = 0; k < size_; ++k) {
      elements += chunks_[k].numel;
      if (elements >= enough || k + 1 == size_) pieces.push_back(k + 1), elements = 0;
    }
    const int64_t count = int64_t(pieces.size()) - 1;
    struct alignas(64) Share {
      int64_t begin, end;
      std::atomic<int64_t> taken{0};
    };
    std::vector<Share> shares(threads);
    for (int64_t t = 0; t < threads; ++t) shares[t].begin = count * t / threads, shares[t].end = count * (t + 1) / threads;
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        for (int64_t k = 0; k < threads; ++k) {
          Share& share = shares[(t + k) % threads];
          for (int64_t p; (p = share.taken.fetch_add(1, std::memory_order_relaxed)) < share.end - share.begin;) {
            const int64_t piece = backwards ? share.end - 1 - p : share.begin + p;
            kernel(pieces[piece], pieces[piece + 1]);
          }
        }
    });
  }

 private:
  at::ScalarType dtype_;
  const Chunk* chunks_;
  int64_t size_, elements_;
  c10::SmallVector<void*, 64> pointers_[kMostLists];
  int lists_ = 0;
};

Tensor norm_sq_of(const Call& call, InnerProducts& a) {
  const Tensor partials = at::empty({call.size()}, at::kDouble);
  a.partials = partials.mutable_data_ptr<double>();
  call.run([&](int64_t first, int64_t last) { kernels(a.storage).inner_products(a, first, last); });
  Tensor norm_sq = at::empty({1}, at::kDouble);
  *norm_sq.mutable_data_ptr<double>() = total(partials);
  return norm_sq;
}

void perturb_by(const Call& call, Perturb& a, const Tensor& norm_sq, const Tensor& achieved_sq) {
  a.norm_sq = total(norm_sq);
  // After inner_products backwards: the gradient's end, which it read last, may still be in cache.
  call.run([&](int64_t first, int64_t last) { kernels(a.storage).perturb(a, first, last); }, !a.origin);
  achieved_sq.unsafeGetTensorImpl()->bump_version();  // tells that the weights were saved
}

Tensor inner_products(TensorList weights, TensorList grads, const Tensor& chunks, const MaybeTensor& ema, double sigma,
                      std::optional<double> eta) {
  Call call(chunks, dtype_of(grads, {}, "grads"));
  InnerProducts a;
  gather_direction(call, a, eta ? weights : TensorList(), grads, ema, sigma, eta);
  return norm_sq_of(call, a);
}

void perturb(TensorList weights, TensorList acc, TensorList grads, const Tensor& chunks, const Tensor& norm_sq,
             const Tensor& hyper, const Tensor& achieved_sq, const MaybeTensor& acc_sq, const MaybeTensor& saved,
             const MaybeTensor& origin, const MaybeTensor& ema, const MaybeTensor& mask, double sigma,
             std::optional<double> lmbda, std::optional<double> eta) {
  Call call(chunks, dtype_of(weights, grads, "weights"));
  Perturb a;
  gather_perturbation(call, a, weights, acc, grads, hyper, achieved_sq, acc_sq, saved, origin, ema, mask, sigma, lmbda, eta);
  check_sum(norm_sq, "norm_sq");
  perturb_by(call, a, norm_sq, achieved_sq);
}

Tensor ascend(TensorList weights, TensorList grads, const Tensor& chunks, const Tensor& hyper, const Tensor& achieved_sq,
              const MaybeTensor& saved, const MaybeTensor& ema, const MaybeTensor& mask, double sigma,
              std::optional<double> lmbda, std::optional<double> eta) {
  Call call(chunks, dtype_of(weights, grads, "weights"));
  Perturb a;
  gather_perturbation(call, a, weights, {}, grads, hyper, achieved_sq, {}, saved, {}, ema, mask, sigma, lmbda, eta);
  const Tensor norm_sq = norm_sq_of(call, a);
  perturb_by(call, a, norm_sq, achieved_sq);
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
  const int products = a.z ? 6 : 3;
  const Tensor partials = at::empty({products, call.size()}, at::kDouble);
  for (int r = 0; r < products; ++r) a.partials[r] = partials.mutable_data_ptr<double>() + r * call.size();
  call.run([&](int64_t first, int64_t last) { kernels(a.storage).dots(a, first, last); });
  Tensor sums = at::empty({products, 1}, at::kDouble);
  for (int r = 0; r < products; ++r) sums.mutable_data_ptr<double>()[r] = total(partials[r]);
  return sums;
}

void restore(TensorList weights, TensorList acc, TensorList grads, const Tensor& chunks, const MaybeTensor& saved,
             const MaybeTensor& norm_sq, const MaybeTensor& coefs, double c_acc, double c) {
  Call call(chunks, dtype_of(weights, acc, "weights and acc"));
  TORCH_CHECK(weights.empty() || saved, "weights are restored from saved, which is missing");
  TORCH_CHECK(grads.empty() || !acc.empty(), "grads are added to acc, which is missing");
  Restore a;
  gather_descent(call, a, weights, acc, grads, saved, norm_sq, coefs, c_acc, c);
  call.run([&](int64_t first, int64_t last) { kernels(a.storage).restore(a, first, last); });
}

void sgd(TensorList weights, TensorList acc, TensorList grads, const Tensor& chunks, const Tensor& hyper,
         const MaybeTensor& saved, const MaybeTensor& momentum_buffer, const MaybeTensor& fresh,
         const MaybeTensor& norm_sq, const MaybeTensor& coefs, double c_acc, double c) {
  TORCH_CHECK(!weights.empty() && !grads.empty(), "sgd needs weights and grads");
  Call call(chunks, dtype_of(weights, grads, "weights"));
  Update a;
  gather_descent(call, a, weights, acc, grads, saved, norm_sq, coefs, c_acc, c);
  gather_sgd(call, a, hyper, momentum_buffer, fresh);
  for (int64_t k = 0; k < call.size(); ++k)
    TORCH_CHECK(momentum_buffer || a.hyper[call.chunk(k).group * a.hyper_stride + kSgdMomentum] == 0,
                "momentum needs a momentum_buffer");
  call.run([&](int64_t first, int64_t last) { kernels(a.storage).sgd(a, first, last); });
}

void adam(TensorList weights, TensorList acc, TensorList grads, const Tensor& chunks, const Tensor& hyper,
          const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& step, const MaybeTensor& max_exp_avg_sq,
          const MaybeTensor& saved, const MaybeTensor& norm_sq, const MaybeTensor& coefs, double c_acc, double c) {
  TORCH_CHECK(!weights.empty() && !grads.empty(), "adam needs weights and grads");
  Call call(chunks, dtype_of(weights, grads, "weights"));
  Update a;
  gather_descent(call, a, weights, acc, grads, saved, norm_sq, coefs, c_acc, c);
  gather_adam(call, a, hyper, exp_avg, exp_avg_sq, step, max_exp_avg_sq);
  for (int64_t k = 0; k < call.size(); ++k)
    TORCH_CHECK(max_exp_avg_sq || a.hyper[call.chunk(k).group * a.hyper_stride + kAdamAmsgrad] == 0,
                "amsgrad needs max_exp_avg_sq");
  for (int64_t k = 0; k < call.size(); ++k)
    if (call.chunk(k).begin == 0) a.step[call.chunk(k).segment] += 1;
  call.run([&](int64_t first, int64_t last) { kernels(a.storage).adam(a, first, last); });
}

}  // namespace

TORCH_LIBRARY_IMPL(msam_kernels, CPU, m) {
  m.impl("inner_products", &inner_products);
  m.impl("perturb", &perturb);
  m.impl("ascend", &ascend);
  m.impl("dots", &dots);
  m.impl("restore", &restore);
  m.impl("sgd", &sgd);
  m.impl("adam", &adam);
}

}  // namespace msam::cpu
