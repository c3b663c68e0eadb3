// SPDX-License-Identifier: Apache-2.0
// The extension module _C: loading it registers the operators; build_info() says what was built.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
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

// What an operator's argument is in Python, and what keeps it during the call.
template <class T>
struct Argument;

// Of a number that Python was asked for.
template <class T>
T arrived(T x) {
  if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
  return x;
}

template <>
struct Argument<Tensor> {
  static bool is(PyObject* o) { return THPVariable_Check(o); }
  static const Tensor& of(PyObject* o) { return THPVariable_Unpack(o); }
};
template <>
struct Argument<double> {
  static bool is(PyObject* o) { return PyFloat_Check(o) || PyLong_Check(o); }
  static double of(PyObject* o) { return arrived(PyFloat_AsDouble(o)); }
};
template <>
struct Argument<int64_t> {
  static bool is(PyObject* o) { return PyLong_Check(o); }
  static int64_t of(PyObject* o) { return arrived(PyLong_AsLongLong(o)); }
};
template <>
struct Argument<bool> {
  static bool is(PyObject* o) { return PyBool_Check(o); }
  static bool of(PyObject* o) { return o == Py_True; }
};
template <class T>
struct Argument<std::optional<T>> {
  static bool is(PyObject* o) { return o == Py_None || Argument<T>::is(o); }
  static std::optional<T> of(PyObject* o) { return o == Py_None ? std::nullopt : std::optional<T>(Argument<T>::of(o)); }
};
template <>
struct Argument<TensorList> {
  static bool is(PyObject*) { return true; }  // or it says what is wrong
  static msam::TensorsOf of(PyObject* o) { return msam::TensorsOf(o); }
};
template <>
struct Argument<at::ArrayRef<double>> {
  using Numbers = c10::SmallVector<double, msam::kTerms * msam::kCoefficientColumns>;

  static bool is(PyObject* o) {
    if (!PyList_Check(o)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(o); ++i)
      if (!Argument<double>::is(PyList_GET_ITEM(o, i))) return false;
    return true;
  }
  static Numbers of(PyObject* o) {
    Numbers numbers;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(o); ++i) numbers.push_back(Argument<double>::of(PyList_GET_ITEM(o, i)));
    return numbers;
  }
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
// would box the lists, which takes longer than a kernel on a small model. So does pybind11 with a dozen arguments by name.
template <class Result, class... Args>
class Typed {
 public:
  // For good: the module holds it.
  static void define(py::module_& m, const char* name) {
    auto* self = new Typed(name);
    const py::capsule capsule(static_cast<void*>(self));
    const py::str of(m.attr("__name__"));
    PyObject* function = PyCFunction_NewEx(&self->method_, capsule.ptr(), of.ptr());
    if (!function) throw py::error_already_set();
    m.attr(self->method_.ml_name) = py::reinterpret_steal<py::object>(function);
  }

 private:
  static constexpr size_t kArguments = sizeof...(Args);
  using Slots = std::array<PyObject*, kArguments>;  // borrowed

  explicit Typed(const char* name)
      : name_(name),
        method_{std::strchr(name, ':') + 2, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&called)),
                METH_FASTCALL | METH_KEYWORDS, "See backends/__init__.py."} {}

  static PyObject* called(PyObject* capsule, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    try {
      auto* self = static_cast<Typed*>(PyCapsule_GetPointer(capsule, nullptr));
      if (!self->found_) self->find();
      return self->call(self->slots(args, count, names), std::index_sequence_for<Args...>()).release().ptr();
    } catch (...) {
      torch::translate_exception_to_python(std::current_exception());
      return nullptr;
    }
  }

  // The schemas are defined after this module is loaded.
  void find() {
    auto found = c10::Dispatcher::singleton().findSchemaOrThrow(name_, "").typed<Result(Args...)>();
    for (size_t i = 0; i < kArguments; ++i) {
      const c10::Argument& argument = found.schema().arguments()[i];
      const auto& value = argument.default_value();
      names_[i] = PyUnicode_InternFromString(argument.name().c_str());
      if (!argument.kwarg_only()) positional_ = i + 1;
      if (value)
        default_[i] = (value->isNone()   ? py::object(py::none())
                       : value->isBool() ? py::object(py::bool_(value->toBool()))
                       : value->isInt()  ? py::object(py::int_(value->toInt()))
                                         : py::object(py::float_(value->toDouble())))
                          .release()
                          .ptr();
    }
    found_.emplace(std::move(found));
  }

  size_t place_of(PyObject* name, size_t guess) const {
    for (size_t k = 0; k < kArguments; ++k)
      if (const size_t i = (guess + k) % kArguments; names_[i] == name) return i;
    for (size_t i = 0; i < kArguments; ++i)
      if (PyUnicode_Compare(names_[i], name) == 0) return i;
    TORCH_CHECK_TYPE(false, method_.ml_name, "() has no argument ", std::string(py::str(py::handle(name))));
  }
  Slots slots(PyObject* const* args, Py_ssize_t count, PyObject* names) const {
    TORCH_CHECK_TYPE(size_t(count) <= positional_, method_.ml_name, "() takes ", positional_, " arguments without a name, got ",
                     count);
    Slots slots{};
    std::copy(args, args + count, slots.begin());
    size_t i = count;
    for (Py_ssize_t k = 0; names && k < PyTuple_GET_SIZE(names); ++k, ++i) {
      i = place_of(PyTuple_GET_ITEM(names, k), i);
      TORCH_CHECK_TYPE(!slots[i], method_.ml_name, "() got ", argument(i).name(), " twice");
      slots[i] = args[count + k];
    }
    for (i = 0; i < kArguments; ++i) {
      if (!slots[i]) slots[i] = default_[i];
      TORCH_CHECK_TYPE(slots[i], method_.ml_name, "() lacks ", argument(i).name());
    }
    return slots;
  }
  const c10::Argument& argument(size_t i) const { return found_->schema().arguments()[i]; }

  template <class T>
  decltype(auto) from(PyObject* o, size_t i) const {
    using Argument = ::Argument<std::decay_t<T>>;
    TORCH_CHECK_TYPE(Argument::is(o), method_.ml_name, "() takes ", argument(i).type()->str(), " as ", argument(i).name(),
                     ", got ", Py_TYPE(o)->tp_name);
    return Argument::of(o);
  }
  template <size_t... i>
  py::object call(const Slots& slots, std::index_sequence<i...>) const {
    if constexpr (std::is_void_v<Result>)
      return dispatched(from<Args>(slots[i], i)...), py::none();
    else
      return py::reinterpret_steal<py::object>(THPVariable_Wrap(dispatched(from<Args>(slots[i], i)...)));
  }
  template <class... Kept>
  Result dispatched(const Kept&... args) const {
    FindTable find;
    (find(args), ...);
    LikeTheTable check(*find.table, found_->schema());
    (check(args), ...);
    py::gil_scoped_release no_gil;
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    return found_->call(args...);
  }

  const char* name_;
  PyMethodDef method_;
  std::optional<c10::TypedOperatorHandle<Result(Args...)>> found_;
  size_t positional_ = 0;
  std::array<PyObject*, kArguments> names_{}, default_{};  // interned; null where there is none
};

template <class Result, class... Args>
void define(py::module_& m, const char* name, Result (*)(Args...)) {
  Typed<Result, Args...>::define(m, name);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of msam_kernels";
  m.attr("CUDA") = kCuda;
  m.def("build_info", &build_info, "Compiler, instruction set chosen at run time, threading and torch of this build.");
  msam::define_parameters(m);
  using Types = msam::Operators<msam::Call>;
#define MSAM_DEFINE(name) define(m, "msam_kernels::" #name, static_cast<decltype(&Types::name)>(nullptr))
  MSAM_DEFINE(norm);
  MSAM_DEFINE(perturb);
  MSAM_DEFINE(ascend);
  MSAM_DEFINE(gram);
  MSAM_DEFINE(weigh);
  MSAM_DEFINE(descend);
  MSAM_DEFINE(update);
#undef MSAM_DEFINE
}
