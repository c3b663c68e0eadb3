// SPDX-License-Identifier: Apache-2.0
// The extension module _C: loading it registers the operators; build_info() says what was built; the rest spares the
// optimizer Python loops over the parameters.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/kernels.h"
#include "operators.h"

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

// Same device, dtype and memory order as the parameter, so that both can be walked as one run of memory.
bool is_regular(const at::Tensor& grad, const at::Tensor& param) {
  if (grad.layout() != at::kStrided || grad.scalar_type() != param.scalar_type() || grad.device() != param.device() ||
      grad.requires_grad() || !grad.sizes().equals(param.sizes()))
    return false;
  for (int64_t d = 0; d < grad.dim(); ++d)
    if (grad.size(d) != 1 && grad.stride(d) != param.stride(d)) return false;
  return true;
}

// Every p.grad or None; an empty list where all are None.
py::list current_grads(const py::list& params) {
  py::list grads;
  for (py::handle p : params) {
    TORCH_CHECK(THPVariable_Check(p.ptr()), "current_grads takes tensors");
    if (THPVariable_Unpack(p.ptr()).grad().defined()) {
      for (py::handle q : params) grads.append(q.attr("grad"));
      break;
    }
  }
  return grads;
}

// Whether another tensor holds a gradient's memory. What autograd.grad returns may be a view whose base it alone holds.
bool is_shared(const at::Tensor& grad) {
  const bool lone = grad.is_view() && grad._base().use_count() == 1;
  return grad.storage().use_count() > (lone ? 2 : 1);
}

// Whether no two gradients are the same memory, and with `whole` no other tensor holds that of any; Nones are ignored.
bool owns_memory(const py::list& grads, bool whole) {
  c10::SmallVector<const void*, 64> places;
  for (py::handle g : grads) {
    if (g.is_none()) continue;
    TORCH_CHECK(THPVariable_Check(g.ptr()), "owns_memory takes tensors");
    const at::Tensor& grad = THPVariable_Unpack(g.ptr());
    if (!grad.has_storage() || grad.numel() == 0) continue;
    if (whole && is_shared(grad)) return false;
    places.push_back(grad.const_data_ptr());
  }
  std::sort(places.begin(), places.end());
  return std::adjacent_find(places.begin(), places.end()) == places.end();
}

// p.grad by parameter, None for all where grads is empty. The gradients were some p.grad before: nothing is checked.
void set_grads(const py::list& params, const py::list& grads) {
  TORCH_CHECK(grads.empty() || grads.size() == params.size(), "set_grads takes a gradient or None per parameter");
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK(THPVariable_Check(params[i].ptr()), "set_grads takes tensors");
    const py::handle grad = grads.empty() ? py::handle(Py_None) : py::handle(grads[i]);
    at::Tensor& place = THPVariable_Unpack(params[i].ptr()).mutable_grad();
    if (grad.is_none())
      place.reset();
    else
      place = THPVariable_Unpack(grad.ptr());
  }
}

// Every p.grad, with a placeholder for None; whether all are regular; how many are None. Where all are regular, counts the
// parameters that have one as modified in place and, with `clear`, makes every p.grad None.
py::tuple collect_grads(const py::list& params, py::handle placeholder, bool clear) {
  const size_t n = params.size();
  py::list grads(n);
  size_t absent = 0;
  bool regular = true;
  for (size_t i = 0; i < n; ++i) {
    TORCH_CHECK(THPVariable_Check(params[i].ptr()), "collect_grads takes tensors");
    const at::Tensor& param = THPVariable_Unpack(params[i].ptr());
    const at::Tensor& grad = param.grad();
    if (!grad.defined()) {
      ++absent;
      grads[i] = placeholder;
      continue;
    }
    regular = regular && is_regular(grad, param);
    grads[i] = py::reinterpret_steal<py::object>(THPVariable_Wrap(grad));
  }
  for (size_t i = 0; regular && i < n; ++i) {
    const at::Tensor& param = THPVariable_Unpack(params[i].ptr());
    if (grads[i].ptr() == placeholder.ptr()) continue;
    param.unsafeGetTensorImpl()->bump_version();
    if (clear) param.mutable_grad().reset();
  }
  return py::make_tuple(std::move(grads), regular, absent);
}

// What a step relies on, for comparing: which tensors the groups hold, where their memory is, and how it is laid out.
using Layout = c10::SmallVector<int64_t, 512>;
Layout layout_of(const py::list& groups) {
  Layout layout;
  for (py::handle group : groups) {
    const py::object params = py::reinterpret_borrow<py::dict>(group)["params"];
    const auto sequence = py::reinterpret_steal<py::object>(PySequence_Fast(params.ptr(), "params must be a list"));
    if (!sequence) throw py::error_already_set();
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence.ptr());
    layout.push_back(count);
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* p = PySequence_Fast_GET_ITEM(sequence.ptr(), i);
      TORCH_CHECK(THPVariable_Check(p), "the groups hold tensors");
      const at::Tensor& param = THPVariable_Unpack(p);
      layout.push_back(reinterpret_cast<int64_t>(param.unsafeGetTensorImpl()));
      layout.push_back(reinterpret_cast<int64_t>(param.const_data_ptr()));
      layout.append(param.sizes().begin(), param.sizes().end());
      layout.append(param.strides().begin(), param.strides().end());
    }
  }
  return layout;
}

py::bytes memory_layout(const py::list& groups) {
  const Layout layout = layout_of(groups);
  return {reinterpret_cast<const char*>(layout.data()), layout.size() * sizeof(int64_t)};
}

bool has_layout(const py::list& groups, const py::bytes& known) {
  const Layout layout = layout_of(groups);
  const auto bytes = std::string_view(known);
  return bytes == std::string_view(reinterpret_cast<const char*>(layout.data()), layout.size() * sizeof(int64_t));
}

// ---- the operators as functions of Python ------------------------------------------------------------------------------

// An operator's parameter. Its name and default are those of the schema in backends/__init__.py.
struct Parameter {
  PyObject* name;
  PyObject* otherwise;  // null where it must be given
  bool keyword_only;
};

// What an argument is during the call. Python's own objects outlive it.
template <class T>
struct Argument;

template <>
struct Argument<const Tensor&> {
  const Tensor& value;
  Argument(PyObject* given, const Parameter& p) : value(of(given, p)) {}
  static const Tensor& of(PyObject* given, const Parameter& p) {
    TORCH_CHECK_TYPE(THPVariable_Check(given), PyUnicode_AsUTF8(p.name), " must be a tensor, got ", Py_TYPE(given)->tp_name);
    return THPVariable_Unpack(given);
  }
};

template <>
struct Argument<const MaybeTensor&> {
  MaybeTensor value;
  Argument(PyObject* given, const Parameter& p) {
    if (given != Py_None) value = Argument<const Tensor&>::of(given, p);
  }
};

// Tensors that nobody changes during the call: owning each would cost more than a small kernel.
template <>
struct Argument<TensorList> {
  using Traits = c10::MaybeOwnedTraits<Tensor>;
  c10::SmallVector<Tensor, 64> value;
  Argument(PyObject* given, const Parameter& p) : Argument() {  // made already, so what throws here ends in the destructor
    TORCH_CHECK_TYPE(PyList_Check(given), PyUnicode_AsUTF8(p.name), " must be a list of tensors, got ", Py_TYPE(given)->tp_name);
    value.reserve(PyList_GET_SIZE(given));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(given); ++i)
      value.push_back(Traits::createBorrow(Argument<const Tensor&>::of(PyList_GET_ITEM(given, i), p)));
  }
  Argument(const Argument&) = delete;
  ~Argument() {
    for (Tensor& t : value) Traits::destroyBorrow(t);
  }

 private:
  Argument() = default;
};

double number(PyObject* given) {
  const double value = PyFloat_AsDouble(given);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}
template <>
struct Argument<at::ArrayRef<double>> {
  c10::SmallVector<double, msam::kTerms * msam::kCoefficientColumns> value;
  Argument(PyObject* given, const Parameter& p) {
    TORCH_CHECK_TYPE(PyList_Check(given), PyUnicode_AsUTF8(p.name), " must be a list of numbers, got ", Py_TYPE(given)->tp_name);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(given); ++i) value.push_back(number(PyList_GET_ITEM(given, i)));
  }
};
template <>
struct Argument<double> {
  double value;
  Argument(PyObject* given, const Parameter&) : value(number(given)) {}
};
template <>
struct Argument<msam::MaybeDouble> {
  msam::MaybeDouble value;
  Argument(PyObject* given, const Parameter&) {
    if (given != Py_None) value = number(given);
  }
};
template <>
struct Argument<int64_t> {
  int64_t value;
  Argument(PyObject* given, const Parameter&) : value(PyLong_AsLongLong(given)) {
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
};
template <>
struct Argument<bool> {
  bool value;
  Argument(PyObject* given, const Parameter&) : value(PyObject_IsTrue(given) == 1) {}
};

// Refuses what the dispatcher would take to another device: with a meta tensor among others to the operator's fake, which
// does nothing.
struct OneDevice {
  std::optional<at::Device> device;

  void operator()(const Tensor& t) {
    TORCH_CHECK(!device || t.device() == *device, "the tensors of a call must be on one device, got ", *device, " and ",
                t.device());
    device = t.device();
  }
  void operator()(const MaybeTensor& t) {
    if (t) (*this)(*t);
  }
  void operator()(TensorList list) {
    for (const Tensor& t : list) (*this)(t);
  }
  template <class Other>
  void operator()(const Other&) {}
};

// An operator as torch.ops would call it under no_grad, but typed, and past autograd's fallback: both would box the lists,
// which takes longer than a kernel on a small model, as does pybind11's way of sorting arguments by name.
template <class Result, class... Args>
class Function {
 public:
  Function(PyObject* module, const char* name) : full_name_(std::string("msam_kernels::") + name) {
    method_ = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)), METH_FASTCALL | METH_KEYWORDS,
               "An operator; see msam_kernels.backends."};
    const py::capsule self(this);
    const auto function = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method_, self.ptr(), nullptr));
    py::setattr(module, name, function);
  }

 private:
  static constexpr size_t kCount = sizeof...(Args);

  // The schemas are defined after this module is loaded.
  void find() {
    const auto found = c10::Dispatcher::singleton().findSchemaOrThrow(full_name_.c_str(), "");
    size_t k = 0;
    for (const c10::Argument& a : found.schema().arguments()) {
      const auto& value = a.default_value();
      py::object otherwise = py::none();
      if (value && value->isDouble()) otherwise = py::float_(value->toDouble());
      if (value && value->isInt()) otherwise = py::int_(value->toInt());
      if (value && value->isBool()) otherwise = py::bool_(value->toBool());
      parameters_[k++] = {PyUnicode_InternFromString(a.name().c_str()), value ? otherwise.release().ptr() : nullptr,
                          a.kwarg_only()};
    }
    operator_ = found.typed<Result(Args...)>();
  }

  size_t position(PyObject* name) const {
    for (size_t k = 0; k < kCount; ++k)  // nearly always the very same object
      if (parameters_[k].name == name) return k;
    for (size_t k = 0; k < kCount; ++k)
      if (PyUnicode_Compare(parameters_[k].name, name) == 0) return k;
    TORCH_CHECK_TYPE(false, method_.ml_name, "() has no argument '", PyUnicode_AsUTF8(name), "'");
  }
  // Every argument in the order of the parameters.
  void sort(PyObject* const* given, size_t positional, PyObject* names, PyObject** sorted) const {
    for (size_t k = 0; k < positional; ++k) {
      TORCH_CHECK_TYPE(k < kCount && !parameters_[k].keyword_only, method_.ml_name, "() takes ", k, " positional arguments, got ",
                       positional);
      sorted[k] = given[k];
    }
    const Py_ssize_t count = names ? PyTuple_GET_SIZE(names) : 0;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject*& place = sorted[position(PyTuple_GET_ITEM(names, i))];
      TORCH_CHECK_TYPE(!place, method_.ml_name, "() got '", PyUnicode_AsUTF8(PyTuple_GET_ITEM(names, i)), "' twice");
      place = given[positional + i];
    }
    for (size_t k = 0; k < kCount; ++k) {
      if (!sorted[k]) sorted[k] = parameters_[k].otherwise;
      TORCH_CHECK_TYPE(sorted[k], method_.ml_name, "() needs '", PyUnicode_AsUTF8(parameters_[k].name), "'");
    }
  }

  PyObject* run(const Argument<Args>&... arguments) const {
    OneDevice check;
    (check(arguments.value), ...);
    const auto dispatch = [&] {
      py::gil_scoped_release no_gil;
      at::AutoDispatchBelowADInplaceOrView no_autograd;
      return operator_->call(arguments.value...);
    };
    if constexpr (std::is_void_v<Result>) {
      dispatch();
      Py_RETURN_NONE;
    } else {
      return THPVariable_Wrap(dispatch());
    }
  }
  template <size_t... k>
  PyObject* convert(PyObject* const* sorted, std::index_sequence<k...>) const {
    return run(Argument<Args>(sorted[k], parameters_[k])...);
  }

  static PyObject* call(PyObject* self, PyObject* const* given, Py_ssize_t positional, PyObject* names) {
    try {
      auto& f = *static_cast<Function*>(PyCapsule_GetPointer(self, nullptr));
      if (!f.operator_) f.find();
      PyObject* sorted[kCount] = {};
      f.sort(given, positional, names, sorted);
      return f.convert(sorted, std::index_sequence_for<Args...>());
    } catch (...) {
      torch::translate_exception_to_python(std::current_exception());
      return nullptr;
    }
  }

  const std::string full_name_;
  PyMethodDef method_;
  Parameter parameters_[kCount];
  std::optional<c10::TypedOperatorHandle<Result(Args...)>> operator_;
};

// Lives as long as the process.
template <class Result, class... Args>
void define(const py::module_& m, const char* name, Result (*)(Args...)) {
  new Function<Result, Args...>(m.ptr(), name);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of msam_kernels";
  m.attr("CUDA") = kCuda;
  m.def("build_info", &build_info, "Compiler, instruction set chosen at run time, threading and torch of this build.");
  m.def("collect_grads", &collect_grads, "(params, placeholder, clear) -> (grads, regular, absent)");
  m.def("current_grads", &current_grads, "(params) -> every p.grad, or an empty list where all are None");
  m.def("owns_memory", &owns_memory, "(grads, whole) -> whether none is the memory of another or, with whole, of any other tensor");
  m.def("set_grads", &set_grads, "(params, grads): p.grad by parameter, None for all where grads is empty");
  m.def("memory_layout", &memory_layout, "(parameter groups) -> bytes that change when their parameters or these' memory does");
  m.def("has_layout", &has_layout, "(parameter groups, bytes) -> whether memory_layout would return these bytes");
  using Types = msam::Operators<msam::Call>;
#define MSAM_DEFINE(name) define(m, #name, static_cast<decltype(&Types::name)>(nullptr))
  MSAM_DEFINE(norm);
  MSAM_DEFINE(perturb);
  MSAM_DEFINE(ascend);
  MSAM_DEFINE(gram);
  MSAM_DEFINE(descend);
  MSAM_DEFINE(update);
#undef MSAM_DEFINE
}
