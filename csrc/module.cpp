// SPDX-License-Identifier: Apache-2.0
// The extension module _C: loading it registers the operators; build_info() says what was built; the rest spares the
// optimizer Python loops over the parameters.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
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

// Same device, dtype and memory order as the parameter, so that both can be walked as one run of memory, which holds the
// values and may be written to.
bool is_regular(const at::Tensor& grad, const at::Tensor& param) {
  if (grad.layout() != at::kStrided || grad.scalar_type() != param.scalar_type() || grad.device() != param.device() ||
      grad.requires_grad() || msam::is_lazy(grad) || (grad.is_inference() && !c10::InferenceMode::is_enabled()) ||
      !grad.sizes().equals(param.sizes()))
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

// From the first byte of a tensor that has elements to the end of its last one; and its place in a list.
struct Span {
  Span(const at::Tensor& t, size_t index) : first(static_cast<const char*>(t.const_data_ptr())), index(index) {
    const at::IntArrayRef sizes = t.sizes(), strides = t.strides();
    int64_t last = 0;
    for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
    end = first + (last + 1) * int64_t(t.itemsize());
  }
  bool operator<(const Span& other) const { return first != other.first ? first < other.first : index < other.index; }

  const char *first, *end;
  size_t index;
};

// The indices of all but one of those gradients that have memory in common, and with `whole` of those whose memory another
// tensor holds; Nones are ignored.
py::list without_own_memory(const py::list& grads, bool whole) {
  py::list found;
  c10::SmallVector<Span, 64> spans;
  size_t index = 0;
  for (py::handle g : grads) {
    const size_t i = index++;
    if (g.is_none()) continue;
    TORCH_CHECK(THPVariable_Check(g.ptr()), "without_own_memory takes tensors");
    const at::Tensor& grad = THPVariable_Unpack(g.ptr());
    if (!grad.has_storage() || grad.numel() == 0) continue;
    if (whole && is_shared(grad))
      found.append(i);
    else
      spans.emplace_back(grad, i);
  }
  std::sort(spans.begin(), spans.end());
  const char* end = nullptr;  // of the last one with memory of its own
  for (const Span& span : spans)
    if (span.first < end)
      found.append(span.index);
    else
      end = span.end;
  return found;
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

// What a step relies on, as words for comparing: of every group how many tensors it holds, and of each of those which it is,
// whether it is served, and if so where its memory is and how it is laid out. Of others nothing is asked: they may be of any
// kind. `count` sees the groups, `parameter` the tensors, until one returns false. Groups that hold something else end it too:
// they are refused, by name, when they are looked at.
template <class Count, class Parameter>
bool all_parameters(const py::list& groups, const Count& count, const Parameter& parameter) {
  for (py::handle group : groups) {
    const py::object params = py::reinterpret_borrow<py::dict>(group)["params"];
    if (!PyList_Check(params.ptr()) && !PyTuple_Check(params.ptr())) return false;
    const auto sequence = py::reinterpret_steal<py::object>(PySequence_Fast(params.ptr(), ""));
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(sequence.ptr());
    if (!count(static_cast<int64_t>(size))) return false;
    for (Py_ssize_t i = 0; i < size; ++i) {
      PyObject* p = PySequence_Fast_GET_ITEM(sequence.ptr(), i);
      if (!THPVariable_Check(p) || !parameter(p, THPVariable_Unpack(p))) return false;
    }
  }
  return true;
}

py::bytes memory_layout(const py::list& groups, const py::set& served) {
  std::vector<int64_t> words;
  const auto count = [&](int64_t size) {
    words.push_back(size);
    return true;
  };
  all_parameters(groups, count, [&](PyObject* p, const at::Tensor& param) {
    const bool is_served = served.contains(py::handle(p));
    words.push_back(reinterpret_cast<int64_t>(param.unsafeGetTensorImpl()));
    words.push_back(is_served);
    if (is_served) {
      words.push_back(reinterpret_cast<int64_t>(param.const_data_ptr()));
      words.insert(words.end(), param.sizes().begin(), param.sizes().end());
      words.insert(words.end(), param.strides().begin(), param.strides().end());
    }
    return true;
  });
  return {reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t)};
}

bool has_layout(const py::list& groups, const py::bytes& known) {
  const auto bytes = std::string_view(known);
  const auto* word = reinterpret_cast<const int64_t*>(bytes.data());  // aligned: what memory_layout returned
  const int64_t* const end = word + bytes.size() / sizeof(int64_t);
  const auto count = [&](int64_t size) { return word != end && *word++ == size; };
  const bool all = all_parameters(groups, count, [&](PyObject*, const at::Tensor& param) {
    if (end - word < 2 || word[0] != reinterpret_cast<int64_t>(param.unsafeGetTensorImpl())) return false;
    const bool is_served = word[1];
    word += 2;
    if (!is_served) return !param.requires_grad() && !param.grad().defined();
    const at::IntArrayRef sizes = param.sizes(), strides = param.strides();
    const int64_t dim = sizes.size();
    if (end - word < 1 + 2 * dim || word[0] != reinterpret_cast<int64_t>(param.const_data_ptr())) return false;
    bool same = true;
    for (int64_t d = 0; d < dim; ++d) same = same && word[1 + d] == sizes[d] && word[1 + dim + d] == strides[d];
    word += 1 + 2 * dim;
    return same;
  });
  return all && word == end;
}

// Whether the state's values are these very entries, and each dict has the very value under its key.
bool holds(
    const py::dict& state, const py::list& entries, const py::list& dicts, const py::list& keys, const py::list& values) {
  TORCH_CHECK(dicts.size() == values.size() && keys.size() == values.size(), "holds takes a dict and a key per value");
  if (state.size() != entries.size()) return false;
  Py_ssize_t place = 0;
  PyObject* entry;
  for (size_t i = 0; PyDict_Next(state.ptr(), &place, nullptr, &entry); ++i)
    if (entry != PyList_GET_ITEM(entries.ptr(), i)) return false;
  for (size_t i = 0; i < values.size(); ++i) {
    PyObject* dict = PyList_GET_ITEM(dicts.ptr(), i);
    TORCH_CHECK_TYPE(PyDict_Check(dict), "holds takes dicts");
    PyObject* value = PyDict_GetItemWithError(dict, PyList_GET_ITEM(keys.ptr(), i));
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    if (value != PyList_GET_ITEM(values.ptr(), i)) return false;
  }
  return true;
}

// The tensors of a list that nobody changes during the call: owning each costs more than a small kernel.
class Borrowed {
 public:
  explicit Borrowed(const py::list& list) : Borrowed() {  // made already, so what throws here ends in the destructor
    tensors_.reserve(list.size());
    for (py::handle t : list) {
      TORCH_CHECK_TYPE(THPVariable_Check(t.ptr()), "expected a list of tensors, got ", Py_TYPE(t.ptr())->tp_name, " in it");
      tensors_.push_back(Traits::createBorrow(THPVariable_Unpack(t.ptr())));
    }
  }
  Borrowed(const Borrowed&) = delete;
  ~Borrowed() {
    for (Tensor& t : tensors_) Traits::destroyBorrow(t);
  }
  operator TensorList() const { return tensors_; }

 private:
  using Traits = c10::MaybeOwnedTraits<Tensor>;
  Borrowed() = default;
  std::vector<Tensor> tensors_;
};

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
  using Python = const py::list&;
  using Kept = Borrowed;
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
  void operator()(const Borrowed& list) {
    int64_t index = 0;
    for (const Tensor& t : TensorList(list)) look(t, index++);
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
  m.def("collect_grads", &collect_grads, "(params, placeholder, clear) -> (grads, regular, absent)");
  m.def("current_grads", &current_grads, "(params) -> every p.grad, or an empty list where all are None");
  m.def("without_own_memory", &without_own_memory, "(grads, whole) -> the indices of those to copy before they are written to");
  m.def("set_grads", &set_grads, "(params, grads): p.grad by parameter, None for all where grads is empty");
  m.def("memory_layout", &memory_layout, "(parameter groups, the served) -> bytes that say which they are and where these lie");
  m.def("has_layout", &has_layout, "(parameter groups, bytes) -> whether they say so still, and no others are trained");
  m.def("holds", &holds, "(state, entries, dicts, keys, values) -> whether these are its values, and each dict's");
  using py::arg;
  const auto none = [](const char* name) { return arg(name) = py::none(); };
  const py::kw_only kw_only;
  using Types = msam::Operators<msam::Call>;
#define MSAM_DEFINE(name, ...) define(m, "msam_kernels::" #name, static_cast<decltype(&Types::name)>(nullptr), __VA_ARGS__)
  MSAM_DEFINE(norm, arg("weights"), arg("grads"), arg("table"), kw_only, none("ema"), arg("sigma") = 0.0, none("eta"));
  MSAM_DEFINE(perturb, arg("weights"), arg("grads"), arg("table"), kw_only, arg("norm_sq"), arg("radii"), arg("saved"),
            arg("status"), arg("achieved_sq"), none("ema"), none("mask"), arg("sigma") = 0.0, none("lmbda"), none("eta"));
  MSAM_DEFINE(ascend, arg("weights"), arg("grads"), arg("table"), kw_only, arg("radii"), arg("saved"), arg("status"),
            arg("achieved_sq"), none("ema"), none("mask"), arg("sigma") = 0.0, none("lmbda"), none("eta"));
  MSAM_DEFINE(gram, arg("terms"), arg("table"), kw_only, arg("count"));
  MSAM_DEFINE(descend, arg("weights"), arg("out"), arg("terms"), arg("table"), kw_only, arg("coefs"), arg("sums"),
            arg("rescale") = -1, none("norm_sq"), none("saved"), none("status"), arg("last") = true, none("out_sq"));
  MSAM_DEFINE(update, arg("weights"), arg("states"), arg("terms"), arg("table"), kw_only, arg("rule"), arg("settings"),
            none("step"), arg("coefs"), arg("sums"), arg("rescale") = -1, none("norm_sq"), none("saved"), none("status"),
            none("found_inf"));
#undef MSAM_DEFINE
}
