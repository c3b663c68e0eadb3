// SPDX-License-Identifier: Apache-2.0
// What spares the optimizer Python loops over the parameters, and a list of tensors that costs no Python object for each.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

namespace msam {

// A Python object, of a type of its own: tensors that become Python objects only where Python looks at them. Making and freeing
// one for each costs more than a small kernel; so would pybind11's table of instances.
struct Tensors {
  PyObject_HEAD
  std::vector<at::Tensor> all;
};

// What is asked of a list or of Tensors alike: a tensor, or None where `present` has false. Borrows: the sequence must stay.
class TensorsOf {
 public:
  // Raises a TypeError that names what is no tensor.
  explicit TensorsOf(pybind11::handle sequence, bool or_none = false);
  TensorsOf(const TensorsOf&) = delete;
  ~TensorsOf() { release(); }

  operator at::TensorList() const { return list(); }
  at::TensorList list() const { return made_ ? at::TensorList(borrowed_) : own_; }  // undefined where None stands

 private:
  using Traits = c10::MaybeOwnedTraits<at::Tensor>;
  void release();

  bool made_ = false;
  at::TensorList own_;
  std::vector<at::Tensor> borrowed_;
};

void define_parameters(pybind11::module_& m);

}  // namespace msam
