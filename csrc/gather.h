// SPDX-License-Identifier: Apache-2.0
// What the operators of every device do alike with their arguments, once they are checked.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "checks.h"

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

}  // namespace msam
