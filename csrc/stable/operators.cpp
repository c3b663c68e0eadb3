// SPDX-License-Identifier: Apache-2.0
// The operators on the CPU, once more: setup.py compiles this file against torch's stable ABI, which knows the names of kernels
// and not their types. signatures() tells those.
#include "../cpu/operators.cpp"

#include <string>
#include <type_traits>

namespace msam {
namespace {

// A type as schemas write it.
std::string written(const bool*) { return "bool"; }
std::string written(const int64_t*) { return "int"; }
std::string written(const double*) { return "float"; }
std::string written(const Tensor*) { return "Tensor"; }
template <class T>
std::string written(const std::optional<T>*) {
  return written(static_cast<const T*>(nullptr)) + "?";
}
template <class T>
std::string written(const ArrayRef<T>*) {
  return written(static_cast<const T*>(nullptr)) + "[]";
}

// Takes kernels as torch's library does, and keeps a line for each.
struct Signatures {
  std::string lines;

  template <auto function>
  void impl(const char* name, Kernel<function>) {
    add(name, function);
  }

 private:
  template <class Result, class... Args>
  void add(const char* name, Result (*)(Args...)) {
    std::string types;
    ((types += (types.empty() ? "" : ", ") + written(static_cast<const std::decay_t<Args>*>(nullptr))), ...);
    lines += std::string(name) + "(" + types + ") -> ";
    if constexpr (std::is_void_v<Result>)
      lines += "()\n";
    else
      lines += written(static_cast<const Result*>(nullptr)) + "\n";
  }
};

}  // namespace

std::string signatures() {
  Signatures found;
  Operators<cpu::Device>::implement(found);
  return found.lines;
}

}  // namespace msam
