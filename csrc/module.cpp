// SPDX-License-Identifier: Apache-2.0
// The extension module _C: loading it registers the operators; build_info() says what was built.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "operators.h"
#include "parameters.h"

namespace py = pybind11;

namespace {

using msam::MaybeTensor;
using msam::Tensor;
using msam::TensorList;

// Toolkit and targets of the CUDA kernels, if they were built.
#if defined(MSAM_CUDA)
constexpr const char* kCuda = MSAM_CUDA;
#else
constexpr const char* kCuda = nullptr;
#endif

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["instruction_set"] = msam::cpu::instruction_set();
#if defined(_OPENMP)
  info["threads"] = "openmp";
#else
  info["threads"] = "none";
#endif
  info["built_with_torch"] = MSAM_TORCH_VERSION;
  info["cuda"] = kCuda ? kCuda : "none";
  return info;
}

class Numbers {
 public:
  explicit Numbers(const py::list& list) {
    for (py::handle x : list) numbers_.push_back(x.cast<double>());
  }
  operator at::ArrayRef<double>() const { return numbers_; }

 private:
  c10::SmallVector<double, msam::kTerms * msam::kCoefficientColumns> numbers_;
};

// What an operator's argument is in Python, and what keeps it during the call.
template <class T>
struct Argument {
  using Python = T;
  using Kept = T;
};
template <>
struct Argument<TensorList> {
  using Python = py::handle;
  using Kept = msam::TensorsOf;
};
template <>
struct Argument<at::ArrayRef<double>> {
  using Python = const py::list&;
  using Kept = Numbers;
};

// The first argument that is a tensor by itself.
struct FindTable {
  const Tensor* table = nullptr;

  void operator()(const Tensor& t) { table = table ? table : &t; }
  template <class Other>
  void operator()(const Other&) {}
};

// Refuses what would make the dispatcher take the whole call elsewhere: a meta tensor among others to the operator's fake,
// which does nothing; a sparse one, or one of a class that dispatches in Python, to errors that name no argument.
class LikeTheTable {
 public:
  LikeTheTable(const Tensor& table, const c10::FunctionSchema& schema)
      : table_(table), schema_(schema), device_(table.device()), python_(table.key_set() & kPython) {}

  void operator()(const Tensor& t) { look(t, -1), ++argument_; }
  void operator()(const MaybeTensor& t) {
    if (t) look(*t, -1);
    ++argument_;
  }
  void operator()(const msam::TensorsOf& list) {
    int64_t index = 0;
    for (const Tensor& t : list.list()) look(t, index++);
    ++argument_;
  }
  template <class Other>
  void operator()(const Other&) {
    ++argument_;
  }

 private:
  using Key = c10::DispatchKey;
  static constexpr c10::DispatchKeySet kPython = c10::python_ks;
  static constexpr c10::DispatchKeySet kOther =
      c10::DispatchKeySet({Key::Sparse, Key::SparseCsr, Key::MkldnnCPU, Key::Quantized, Key::NestedTensor});

  static std::string kind(const Tensor& t) {
    if (!t.key_set().has_any(kPython)) return "an ordinary tensor";
    return Py_TYPE(py::reinterpret_steal<py::object>(THPVariable_Wrap(t)).ptr())->tp_name;
  }
  void look(const Tensor& t, int64_t index) const {
    if (t.device() == device_ && (t.key_set() & (kPython | kOther)) == python_) return;
    const msam::Label label{schema_.arguments()[argument_].name().c_str(), index};
    TORCH_CHECK(!t.key_set().has_any(kOther), label, " must be an ordinary dense tensor, got ", t.toString(),
                ": convert it first");
    TORCH_CHECK((t.key_set() & kPython) == python_, label, " must be of one kind with the table, ", kind(table_), ", got ",
                kind(t), ": convert it first");
    msam::check_device(t, label, device_);
  }

  const Tensor& table_;
  const c10::FunctionSchema& schema_;
  at::Device device_;
  c10::DispatchKeySet python_;  // not empty where the table's class dispatches in Python
  size_t argument_ = 0;
};

// An operator of backends/__init__.py as torch.ops would call it under no_grad, but typed, and past autograd's fallback: both
// would box the lists, which takes longer than a kernel on a small model.
template <class Result, class... Args>
class Typed {
 public:
  explicit Typed(const char* name) : name_(name) {}

  Result operator()(typename Argument<Args>::Python... args) {
    if (!found_) found_ = c10::Dispatcher::singleton().findSchemaOrThrow(name_, "").typed<Result(Args...)>();
    return call(typename Argument<Args>::Kept(args)...);
  }

 private:
  Result call(const typename Argument<Args>::Kept&... args) {
    FindTable find;
    (find(args), ...);
    LikeTheTable check(*find.table, found_->schema());
    (check(args), ...);
    py::gil_scoped_release no_gil;
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    return found_->call(args...);
  }

  const char* name_;
  std::optional<c10::TypedOperatorHandle<Result(Args...)>> found_;  // the schemas are defined after this module is loaded
};

template <class Result, class... Args, class... Extra>
void define(py::module_& m, const char* name, Result (*)(Args...), const Extra&... extra) {
  m.def(std::strchr(name, ':') + 2, Typed<Result, Args...>(name), extra...);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of msam_kernels";
  m.attr("CUDA") = kCuda;
  m.def("build_info", &build_info, "Compiler, instruction set chosen at run time, threading and torch of this build.");
  msam::define_parameters(m);
  using py::arg;
  const auto none = [](const char* name) { return arg(name) = py::none(); };
  const py::kw_only kw_only;
  using Types = msam::Operators<msam::Call>;
#define MSAM_DEFINE(name, ...) define(m, "msam_kernels::" #name, static_cast<decltype(&Types::name)>(nullptr), __VA_ARGS__)
  MSAM_DEFINE(norm, arg("weights"), arg("grads"), arg("table"), kw_only, none("ema"), arg("sigma") = 0.0, none("eta"),
            none("stack"));
  MSAM_DEFINE(perturb, arg("weights"), arg("grads"), arg("table"), kw_only, arg("norm_sq"), arg("radii"), arg("saved"),
            arg("achieved_sq"), none("status"), none("ema"), none("mask"), none("noise"), arg("draw") = 0, arg("sigma") = 0.0,
            none("lmbda"), none("eta"), none("stack"));
  MSAM_DEFINE(ascend, arg("weights"), arg("grads"), arg("table"), kw_only, arg("radii"), arg("saved"), arg("achieved_sq"),
            none("status"), none("arrived"), none("ema"), none("mask"), none("noise"), arg("draw") = 0, arg("sigma") = 0.0,
            none("lmbda"), none("eta"), none("stack"));
  MSAM_DEFINE(gram, arg("terms"), arg("table"), kw_only, arg("count"), none("stack"));
  MSAM_DEFINE(weigh, arg("shares"), kw_only, arg("coefs"), arg("sums"), arg("rescale") = -1, none("norm_sq"));
  MSAM_DEFINE(descend, arg("weights"), arg("out"), arg("terms"), arg("table"), kw_only, arg("coefs"), arg("sums"),
            arg("rescale") = -1, none("norm_sq"), none("saved"), none("status"), arg("last") = true, none("out_sq"),
            none("shares"));
  MSAM_DEFINE(update, arg("weights"), arg("states"), arg("terms"), arg("table"), kw_only, arg("rule"), arg("settings"),
            none("step"), arg("coefs"), arg("sums"), arg("rescale") = -1, none("norm_sq"), none("saved"), none("status"),
            none("found_inf"), none("shares"), none("rates"), arg("factor") = 0.0);
#undef MSAM_DEFINE
}
