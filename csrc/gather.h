// SPDX-License-Identifier: Apache-2.0
// What the operators of every device do alike with their arguments, once they are checked.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "checks.h"
#include "update_math.h"

namespace msam {

using at::Tensor;
using at::TensorList;
using MaybeTensor = std::optional<Tensor>;

inline Storage storage_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Storage::kFloat;
    case at::kDouble:
      return Storage::kDouble;
    case at::kBFloat16:
      return Storage::kBFloat16;
    case at::kHalf:
      return Storage::kHalf;
    default:
      TORCH_CHECK(false, "dtype must be float32, float64, bfloat16 or float16, got ", dtype);
  }
}

template <class T = void>
inline T* pointer(const MaybeTensor& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

inline at::ScalarType dtype_of(TensorList first, TensorList second, const char* names) {
  TORCH_CHECK(!first.empty() || !second.empty(), names, " are empty");
  return (first.empty() ? second : first)[0].scalar_type();
}

// What the direction d is made of.
template <class Call, class Arguments>
void gather_direction(Call& call, Arguments& a, TensorList weights, TensorList grads, const MaybeTensor& ema, double sigma,
                      std::optional<double> eta) {
  call.begin(a);
  a.grads = call.list(grads, "grads");
  a.weights = call.list(weights, "weights", weights.size() == 1);
  TORCH_CHECK(!eta || a.weights, "eta needs the weights");
  call.flat(ema, "ema");
  a.ema = pointer(ema);
  a.sigma = sigma;
  a.adaptive = eta.has_value();
  a.eta = eta.value_or(0);
}

// And what w + e is made of: the same for the perturbation alone and together with its norm.
template <class Call, class Arguments>
void gather_perturbation(Call& call, Arguments& a, TensorList weights, TensorList acc, TensorList grads, const Tensor& hyper,
                         const Tensor& achieved_sq, const MaybeTensor& acc_sq, const MaybeTensor& saved,
                         const MaybeTensor& origin, const MaybeTensor& ema, const MaybeTensor& mask, double sigma,
                         std::optional<double> lmbda, std::optional<double> eta) {
  TORCH_CHECK(!weights.empty() && !grads.empty(), "perturb needs weights and grads");
  TORCH_CHECK(acc.empty() == !acc_sq, "acc and acc_sq go together: give both or neither");
  TORCH_CHECK(!saved || !origin, "weights that are perturbed from origin are not saved: give saved or origin");
  gather_direction(call, a, weights, grads, ema, sigma, eta);
  call.hyper(hyper, 1, a);
  call.flat(saved, "saved");
  call.flat(origin, "origin");
  call.mask(mask);
  call.per_chunk(achieved_sq, "achieved_sq");
  a.achieved_sq = achieved_sq.data_ptr<double>();
  a.acc = call.list(acc, "acc");
  if (acc_sq) call.per_chunk(*acc_sq, "acc_sq");
  a.acc_sq = pointer<double>(acc_sq);
  a.saved = pointer(saved);
  a.origin = pointer(origin);
  a.mask = pointer<uint8_t>(mask);
  a.ema_out = lmbda ? pointer(ema) : nullptr;
  a.lmbda = lmbda.value_or(0);
  a.one_minus_lmbda = 1 - lmbda.value_or(0);
}

// saved -> weights, and c_acc acc + c grads -> acc, poisoned where the ascent gradient was not finite. With coefs, grads holds
// a list of tensors for each of them. Returns how many tensors a list has.
template <class Call, class Arguments>
int64_t gather_descent(Call& call, Arguments& a, TensorList weights, TensorList acc, TensorList grads,
                       const MaybeTensor& saved, const MaybeTensor& norm_sq, const MaybeTensor& coefs, double c_acc,
                       double c) {
  call.begin(a);
  a.weights = call.list(weights, "weights", weights.size() == 1);
  a.acc = call.list(acc, "acc");
  const int64_t terms = check_coefs(coefs, grads, 1 + kMore), segments = int64_t(grads.size()) / terms;
  if (coefs) check_device(*coefs, "coefs", call.device());
  a.coefs = pointer<double>(coefs);
  a.grads = call.list(grads.slice(0, segments), "grads");
  for (int64_t k = 1; k < terms; ++k) a.more[k - 1] = call.list(grads.slice(k * segments, segments), "grads");
  call.flat(saved, "saved");
  a.saved = pointer(saved);
  a.c_acc = c_acc;
  a.c = c;
  call.norm_sq(norm_sq, a);  // may replace a.c
  return segments;
}

template <class Call, class Arguments>
void gather_sgd(Call& call, Arguments& a, const Tensor& hyper, const MaybeTensor& momentum_buffer, const MaybeTensor& fresh) {
  call.hyper(hyper, kSgdColumns, a);
  call.flat(momentum_buffer, "momentum_buffer");
  call.per_segment(fresh, "fresh", at::kByte);
  a.momentum_buffer = pointer(momentum_buffer);
  a.fresh = pointer<uint8_t>(fresh);
}

template <class Call, class Arguments>
void gather_adam(Call& call, Arguments& a, const Tensor& hyper, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                 const Tensor& step, const MaybeTensor& max_exp_avg_sq) {
  call.hyper(hyper, kAdamColumns, a);
  call.flat(exp_avg, "exp_avg");
  call.flat(exp_avg_sq, "exp_avg_sq");
  call.flat(max_exp_avg_sq, "max_exp_avg_sq");
  call.per_segment(step, "step", at::kFloat);
  a.exp_avg = exp_avg.data_ptr();
  a.exp_avg_sq = exp_avg_sq.data_ptr();
  a.max_exp_avg_sq = pointer(max_exp_avg_sq);
  a.step = step.data_ptr<float>();
}

}  // namespace msam
