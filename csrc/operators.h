// SPDX-License-Identifier: Apache-2.0
// The operators that backends/__init__.py declares, once for every device: their C++ signatures, and their arguments' way to
// the kernels. Device is a Call that runs them:
//
//   Device(table, dtype), Device(shares);
//   Tensor run(Norm&), ascend(Perturb&), run(Gram&);      // the terms of the sums, which they allocate
//   Tensor run(Weigh&);                                   // the coefficients, which it allocates
//   void run(Perturb&), run(Descend&), run(Update&);
#pragma once

#include "gather.h"

namespace msam {

template <class Device>
struct Operators {
  using Stack = std::optional<int64_t>;

  static Tensor norm(TensorList weights, TensorList grads, const Tensor& table, const MaybeTensor& ema, double sigma,
                     MaybeDouble eta, Stack stack) {
    Device call(table, dtype_of(grads, {}, "grads"));
    Norm a;
    for (size_t k = 0; k < weights.size(); ++k) check_memory(weights[k], {"weights", int64_t(k)});  // also those not read
    call.direction(a, eta ? weights : TensorList(), grads, ema, sigma, eta, stack);
    return call.run(a, stack.has_value());
  }

  static void perturb(TensorList weights, TensorList grads, const Tensor& table, const Tensor& norm_sq, const Tensor& radii,
                      const Tensor& saved, const Tensor& achieved_sq, const MaybeTensor& status, const MaybeTensor& ema,
                      const MaybeTensor& mask, const MaybeTensor& noise, int64_t draw, double sigma, MaybeDouble lmbda,
                      MaybeDouble eta, Stack stack) {
    Device call(table, dtype_of(weights, {}, "weights"));
    Perturb a;
    call.perturbation(a, weights, grads, radii, saved, achieved_sq, status, ema, mask, noise, draw,
                      sigma, lmbda, eta, stack);
    a.norm_sq = call.sums(norm_sq, {"norm_sq"}, stack);
    TORCH_CHECK(a.norm_sq.rows == 1, "norm_sq must be one row, got ", a.norm_sq.rows);
    call.run(a);
  }

  static Tensor ascend(TensorList weights, TensorList grads, const Tensor& table, const Tensor& radii, const Tensor& saved,
                       const Tensor& achieved_sq, const MaybeTensor& status, const MaybeTensor& arrived,
                       const MaybeTensor& ema, const MaybeTensor& mask, const MaybeTensor& noise, int64_t draw,
                       double sigma, MaybeDouble lmbda, MaybeDouble eta, Stack stack) {
    Device call(table, dtype_of(weights, {}, "weights"));
    Perturb a;
    call.perturbation(a, weights, grads, radii, saved, achieved_sq, status, ema, mask, noise, draw,
                      sigma, lmbda, eta, stack);
    a.arrived = call.counter(arrived, "arrived");
    return call.ascend(a, stack.has_value());
  }

  static Tensor gram(TensorList terms, const Tensor& table, int64_t count, Stack stack) {
    TORCH_CHECK(count >= 1 && count <= kVectors, "count must be 1 to ", kVectors, ", got ", count);
    Device call(table, dtype_of(terms, {}, "terms"));
    Gram a;
    call.begin(a);
    call.each(a, stack);
    if (stack)
      call.terms(terms, count, *stack, a.terms, 0, nullptr);
    else
      call.terms(terms, 0, 0, nullptr, count, a.terms);
    a.count = int(count);
    return call.run(a, stack.has_value());
  }

  static Tensor weigh(const Tensor& shares, ArrayRef<double> coefs, TensorList sums, int64_t rescale,
                      const MaybeTensor& norm_sq) {
    Device call(shares);
    Weigh a;
    call.weighing(a, coefs, sums, rescale, norm_sq);
    return call.run(a);
  }

  static void descend(TensorList weights, TensorList out, TensorList terms, const Tensor& table, ArrayRef<double> coefs,
                      TensorList sums, int64_t rescale, const MaybeTensor& norm_sq, const MaybeTensor& saved,
                      const MaybeTensor& status, bool last, const MaybeTensor& out_sq, const MaybeTensor& shares) {
    Device call(table, dtype_of(weights, out, "weights and out"));
    Descend a;
    call.descent(a, weights, terms, coefs, sums, rescale, norm_sq, saved, status, shares);
    TORCH_CHECK(weights.empty() || saved, "weights are brought back from saved, which is missing");
    a.out = call.list(out, "out");
    a.last = last;
    a.out_sq = call.template per_row<double>(out_sq, "out_sq");
    call.run(a);
  }

  static void update(TensorList weights, TensorList states, TensorList terms, const Tensor& table, int64_t rule,
                     const Tensor& settings, const MaybeTensor& step, ArrayRef<double> coefs, TensorList sums,
                     int64_t rescale, const MaybeTensor& norm_sq, const MaybeTensor& saved, const MaybeTensor& status,
                     const MaybeTensor& found_inf, const MaybeTensor& shares, const MaybeTensor& rates, double factor) {
    Device call(table, dtype_of(weights, {}, "weights"));
    Update a;
    const TensorList ahead = call.split_ahead(terms, rates, coefs, shares);
    call.descent(a, weights, terms, coefs, sums, rescale, norm_sq, saved, status, shares);
    call.rule(a, states, rule, settings, step);
    a.found_inf = call.flag(found_inf, "found_inf");
    call.shift(a, ahead, rates, factor, settings);
    call.run(a);
  }

  template <class Library>
  static void implement(Library& library) {
    library.impl("norm", MSAM_KERNEL(norm));
    library.impl("perturb", MSAM_KERNEL(perturb));
    library.impl("ascend", MSAM_KERNEL(ascend));
    library.impl("gram", MSAM_KERNEL(gram));
    library.impl("weigh", MSAM_KERNEL(weigh));
    library.impl("descend", MSAM_KERNEL(descend));
    library.impl("update", MSAM_KERNEL(update));
  }
};

}  // namespace msam
