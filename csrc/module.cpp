// SPDX-License-Identifier: Apache-2.0
// The extension module _C: loading it registers the operators; build_info() says what was built; the rest spares the
// optimizer Python loops over the parameters.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

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

// Whether no two gradients are the same memory, and with `whole` no other tensor holds that of any; None is none.
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

// Every p.grad, with a placeholder for None; whether all are regular; the indices of those that are None. Where all are
// regular, counts the parameters as modified in place and, with `clear`, makes every p.grad None.
py::tuple collect_grads(const py::list& params, py::handle placeholder, bool clear) {
  const size_t n = params.size();
  py::list grads(n), absent;
  bool regular = true;
  for (size_t i = 0; i < n; ++i) {
    TORCH_CHECK(THPVariable_Check(params[i].ptr()), "collect_grads takes tensors");
    const at::Tensor& param = THPVariable_Unpack(params[i].ptr());
    const at::Tensor& grad = param.grad();
    if (!grad.defined()) {
      absent.append(i);
      grads[i] = placeholder;
      continue;
    }
    regular = regular && is_regular(grad, param);
    grads[i] = py::reinterpret_steal<py::object>(THPVariable_Wrap(grad));
  }
  for (size_t i = 0; regular && i < n; ++i) {
    const at::Tensor& param = THPVariable_Unpack(params[i].ptr());
    param.unsafeGetTensorImpl()->bump_version();
    if (clear) param.mutable_grad().reset();
  }
  return py::make_tuple(std::move(grads), regular, py::tuple(absent));
}

// What a step relies on, for comparing: which tensors the groups hold, where their memory is, and how it is laid out.
py::bytes memory_layout(const py::list& groups) {
  std::vector<int64_t> layout;
  for (py::handle group : groups) {
    const auto params = py::reinterpret_borrow<py::list>(group);
    layout.push_back(int64_t(params.size()));
    for (py::handle p : params) {
      TORCH_CHECK(THPVariable_Check(p.ptr()), "memory_layout takes tensors");
      const at::Tensor& param = THPVariable_Unpack(p.ptr());
      layout.push_back(reinterpret_cast<int64_t>(param.unsafeGetTensorImpl()));
      layout.push_back(reinterpret_cast<int64_t>(param.const_data_ptr()));
      layout.insert(layout.end(), param.sizes().begin(), param.sizes().end());
      layout.insert(layout.end(), param.strides().begin(), param.strides().end());
    }
  }
  return {reinterpret_cast<const char*>(layout.data()), layout.size() * sizeof(int64_t)};
}

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using MaybeDouble = std::optional<double>;

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
  operator at::TensorList() const { return tensors_; }

 private:
  using Traits = c10::MaybeOwnedTraits<Tensor>;
  Borrowed() = default;
  std::vector<Tensor> tensors_;
};

// An operator of ops.py as torch.ops would call it under no_grad, but typed, and past autograd's fallback: both would box
// the lists, which takes longer than a kernel on a small model.
template <class Signature, class... Args>
auto dispatch(const c10::TypedOperatorHandle<Signature>& op, Args&&... args) {
  py::gil_scoped_release no_gil;
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  return op.call(std::forward<Args>(args)...);
}

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor inner_products(const py::list& weights, const py::list& grads, const Tensor& chunks, const MaybeTensor& ema,
                      double sigma, const MaybeDouble& eta) {
  static const auto op = find<Tensor(at::TensorList, at::TensorList, const Tensor&, const MaybeTensor&, double,
                                     MaybeDouble)>("msam_kernels::inner_products");
  return dispatch(op, Borrowed(weights), Borrowed(grads), chunks, ema, sigma, eta);
}

void perturb(const py::list& weights, const py::list& acc, const py::list& grads, const Tensor& chunks,
             const Tensor& norm_sq, const Tensor& hyper, const Tensor& achieved_sq, const MaybeTensor& acc_sq,
             const MaybeTensor& saved, const MaybeTensor& origin, const MaybeTensor& ema, const MaybeTensor& mask,
             double sigma, const MaybeDouble& lmbda, const MaybeDouble& eta) {
  static const auto op =
      find<void(at::TensorList, at::TensorList, at::TensorList, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, double,
                MaybeDouble, MaybeDouble)>("msam_kernels::perturb");
  dispatch(op, Borrowed(weights), Borrowed(acc), Borrowed(grads), chunks, norm_sq, hyper, achieved_sq, acc_sq, saved, origin,
           ema, mask, sigma, lmbda, eta);
}

Tensor ascend(const py::list& weights, const py::list& grads, const Tensor& chunks, const Tensor& hyper,
              const Tensor& achieved_sq, const MaybeTensor& saved, const MaybeTensor& ema, const MaybeTensor& mask,
              double sigma, const MaybeDouble& lmbda, const MaybeDouble& eta) {
  static const auto op =
      find<Tensor(at::TensorList, at::TensorList, const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                  const MaybeTensor&, const MaybeTensor&, double, MaybeDouble, MaybeDouble)>("msam_kernels::ascend");
  return dispatch(op, Borrowed(weights), Borrowed(grads), chunks, hyper, achieved_sq, saved, ema, mask, sigma, lmbda, eta);
}

Tensor dots(const py::list& x, const py::list& y, const py::list& z, const Tensor& chunks) {
  static const auto op =
      find<Tensor(at::TensorList, at::TensorList, at::TensorList, const Tensor&)>("msam_kernels::dots");
  return dispatch(op, Borrowed(x), Borrowed(y), Borrowed(z), chunks);
}

void restore(const py::list& weights, const py::list& acc, const py::list& grads, const Tensor& chunks,
             const MaybeTensor& saved, const MaybeTensor& norm_sq, const MaybeTensor& coefs,
             double c_acc, double c) {
  static const auto op =
      find<void(at::TensorList, at::TensorList, at::TensorList, const Tensor&, const MaybeTensor&, const MaybeTensor&,
                const MaybeTensor&, double, double)>("msam_kernels::restore");
  dispatch(op, Borrowed(weights), Borrowed(acc), Borrowed(grads), chunks, saved, norm_sq, coefs, c_acc, c);
}

void sgd(const py::list& weights, const py::list& acc, const py::list& grads, const Tensor& chunks, const Tensor& hyper,
         const MaybeTensor& saved, const MaybeTensor& momentum_buffer, const MaybeTensor& fresh,
         const MaybeTensor& norm_sq, const MaybeTensor& coefs, double c_acc, double c) {
  static const auto op =
      find<void(at::TensorList, at::TensorList, at::TensorList, const Tensor&, const Tensor&, const MaybeTensor&,
                const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, double, double)>("msam_kernels::sgd");
  dispatch(op, Borrowed(weights), Borrowed(acc), Borrowed(grads), chunks, hyper, saved, momentum_buffer, fresh, norm_sq,
           coefs, c_acc, c);
}

void adam(const py::list& weights, const py::list& acc, const py::list& grads, const Tensor& chunks, const Tensor& hyper,
          const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& step, const MaybeTensor& max_exp_avg_sq,
          const MaybeTensor& saved, const MaybeTensor& norm_sq, const MaybeTensor& coefs,
          double c_acc, double c) {
  static const auto op =
      find<void(at::TensorList, at::TensorList, at::TensorList, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, double, double)>("msam_kernels::adam");
  dispatch(op, Borrowed(weights), Borrowed(acc), Borrowed(grads), chunks, hyper, exp_avg, exp_avg_sq, step, max_exp_avg_sq, saved,
           norm_sq, coefs, c_acc, c);
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
  m.def("memory_layout", &memory_layout, "(list of lists of parameters) -> bytes that change when any of them does");
  using py::arg;
  const py::object none = py::none();
  m.def("inner_products", &inner_products, arg("weights"), arg("grads"), arg("chunks"), py::kw_only(), arg("ema") = none,
        arg("sigma") = 0.0, arg("eta") = none);
  m.def("perturb", &perturb, arg("weights"), arg("acc"), arg("grads"), arg("chunks"), py::kw_only(), arg("norm_sq"),
        arg("hyper"), arg("achieved_sq"), arg("acc_sq") = none, arg("saved") = none, arg("origin") = none, arg("ema") = none,
        arg("mask") = none, arg("sigma") = 0.0, arg("lmbda") = none, arg("eta") = none);
  m.def("ascend", &ascend, arg("weights"), arg("grads"), arg("chunks"), py::kw_only(), arg("hyper"), arg("achieved_sq"),
        arg("saved") = none, arg("ema") = none, arg("mask") = none, arg("sigma") = 0.0, arg("lmbda") = none,
        arg("eta") = none);
  m.def("dots", &dots, arg("x"), arg("y"), arg("z"), arg("chunks"));
  m.def("restore", &restore, arg("weights"), arg("acc"), arg("grads"), arg("chunks"), py::kw_only(), arg("saved") = none,
        arg("norm_sq") = none, arg("coefs") = none, arg("c_acc") = 1.0, arg("c") = 1.0);
  m.def("sgd", &sgd, arg("weights"), arg("acc"), arg("grads"), arg("chunks"), py::kw_only(), arg("hyper"),
        arg("saved") = none, arg("momentum_buffer") = none, arg("fresh") = none, arg("norm_sq") = none,
        arg("coefs") = none, arg("c_acc") = 1.0, arg("c") = 1.0);
  m.def("adam", &adam, arg("weights"), arg("acc"), arg("grads"), arg("chunks"), py::kw_only(), arg("hyper"),
        arg("exp_avg"), arg("exp_avg_sq"), arg("step"), arg("max_exp_avg_sq") = none, arg("saved") = none,
        arg("norm_sq") = none, arg("coefs") = none, arg("c_acc") = 1.0, arg("c") = 1.0);
}
