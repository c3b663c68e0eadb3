// SPDX-License-Identifier: Apache-2.0
// What the operators need of torch: its C++ of the version that is compiled against, or, where TORCH_TARGET_VERSION is defined,
// the stable ABI that every torch from that version on has.
#pragma once

#include <cstdint>
#include <optional>
#include <ostream>

#ifdef TORCH_TARGET_VERSION
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <vector>
#else
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>
#endif

namespace msam {

#ifdef TORCH_TARGET_VERSION

using torch::headeronly::CppTypeToScalarType;
using torch::headeronly::Layout;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::get_num_threads;
using torch::stable::parallel_for;
using TorchDevice = torch::stable::Device;
template <class T>
using ArrayRef = torch::headeronly::HeaderOnlyArrayRef<T>;
template <class T, unsigned>
using SmallVector = std::vector<T>;

// In messages they look as torch has them.
inline std::ostream& operator<<(std::ostream& out, ArrayRef<int64_t> numbers) {
  out << "[";
  for (const int64_t& n : numbers) out << (&n == numbers.data() ? "" : ", ") << n;
  return out << "]";
}
inline std::ostream& operator<<(std::ostream& out, Layout layout) {
  return out << (layout == Layout::Strided ? "Strided" : "another layout");
}
inline std::ostream& operator<<(std::ostream& out, const TorchDevice& device) {
  using Type = torch::headeronly::DeviceType;
  const Type type = device.type();
  out << (type == Type::CPU ? "cpu" : type == Type::CUDA ? "cuda" : type == Type::Meta ? "meta" : "another device");
  return device.has_index() ? out << ":" << device.index() : out;
}
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}
// The stable ABI's own puts the place in the source before the message.
#define TORCH_CHECK(condition, ...)                    \
  do {                                                 \
    if (!(condition)) ::msam::refuse(__VA_ARGS__);     \
  } while (false)
#define TORCH_INTERNAL_ASSERT(condition) TORCH_CHECK(condition, #condition)

#define MSAM_LIBRARY_IMPL STABLE_TORCH_LIBRARY_IMPL
#define MSAM_KERNEL(function) ::msam::Kernel<&function>()

// What torch's library takes for a function, and the function's type.
template <auto function>
struct Kernel {
  operator auto() const { return &TORCH_BOX(function); }
};

// Here nothing tells: the operators' kernels for the dispatch keys of such tensors are others, see backends/stable.py.
inline bool is_lazy(const Tensor&) { return false; }

// Whether it is strided: dispatch keeps most others from the CPU's kernels.
inline Layout layout_of(const Tensor& t) {
  int32_t layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  return layout == aoti_torch_layout_strided() ? Layout::Strided : Layout::Sparse;
}

inline int64_t storage_bytes(const Tensor& t) {
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return bytes;
}

inline bool is_non_overlapping_and_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const ArrayRef<int64_t> sizes = t.sizes(), strides = t.strides();
  for (int64_t reached = 1; reached < t.numel();) {
    size_t k = 0;
    while (k < sizes.size() && (sizes[k] == 1 || strides[k] != reached)) ++k;
    if (k == sizes.size()) return false;
    reached *= sizes[k];
  }
  return true;
}

// On the CPU.
inline Tensor empty_doubles(ArrayRef<int64_t> sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t k = sizes.size(); k-- > 1;) strides[k - 1] = strides[k] * sizes[k];
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                  aoti_torch_dtype_float64(), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

#else

using at::ArrayRef;
using at::Layout;
using at::ScalarType;
using at::Tensor;
using at::get_num_threads;
using at::parallel_for;
using c10::CppTypeToScalarType;
using c10::SmallVector;
using TorchDevice = at::Device;

#define MSAM_LIBRARY_IMPL TORCH_LIBRARY_IMPL
#define MSAM_KERNEL(function) &function

// Whether torch is to negate or conjugate what the memory holds, or there is no memory, only zeros: kernels do not know.
inline bool is_lazy(const Tensor& t) {
  using Key = c10::DispatchKey;
  constexpr c10::DispatchKeySet keys{Key::Negative, Key::Conjugate, Key::ZeroTensor};
  return t.key_set().has_any(keys);
}

inline Layout layout_of(const Tensor& t) { return t.layout(); }

inline int64_t storage_bytes(const Tensor& t) { return int64_t(t.storage().nbytes()); }

inline bool is_non_overlapping_and_dense(const Tensor& t) { return t.is_non_overlapping_and_dense(); }

// On the CPU.
inline Tensor empty_doubles(ArrayRef<int64_t> sizes) { return at::detail::empty_cpu(sizes, at::kDouble); }

#endif

using TensorList = ArrayRef<Tensor>;
using MaybeTensor = std::optional<Tensor>;
using MaybeDouble = std::optional<double>;

}  // namespace msam
