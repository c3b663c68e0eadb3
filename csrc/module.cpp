// SPDX-License-Identifier: Apache-2.0
// The extension module _C: loading it registers the operators; build_info() says what was built; collect_grads() spares
// the optimizer a Python loop over the parameters, and so does memory_layout().
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["instruction_set"] = msam::cpu::kernels().instruction_set;
#if defined(_OPENMP)
  info["threads"] = "openmp";
#else
  info["threads"] = "none";
#endif
  info["built_with_torch"] = MSAM_TORCH_VERSION;
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

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of msam_kernels";
  m.def("build_info", &build_info, "Compiler, instruction set chosen at run time, threading and torch of this build.");
  m.def("collect_grads", &collect_grads, "(params, placeholder, clear) -> (grads, regular, absent)");
  m.def("memory_layout", &memory_layout, "(list of lists of parameters) -> bytes that change when any of them does");
}
