// SPDX-License-Identifier: Apache-2.0
// The extension module _stable, for every Python and torch from those on that setup.py names: loading it registers the
// operators, which torch.ops calls. build_info() says what was built, signatures() for which operators.
#undef Py_LIMITED_API  // torch names a Python of its own choice
#define Py_LIMITED_API MSAM_PYTHON
#include <Python.h>

#include <exception>
#include <string>
#include <utility>

#include "../cpu/kernels.h"

namespace msam {
std::string signatures();
}

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

PyObject* build_info(PyObject*, PyObject*) {
  try {
    return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s}", "compiler", kCompiler, "instruction_set", msam::cpu::instruction_set(),
                         "threads", "torch's", "built_with_torch", MSAM_TORCH_VERSION, "cuda", "none");
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* signatures(PyObject*, PyObject*) { return Py_BuildValue("s", msam::signatures().c_str()); }

PyMethodDef kFunctions[] = {
    {"build_info", build_info, METH_NOARGS, "Compiler, instruction set chosen at run time, threads and torch of this build."},
    {"signatures", signatures, METH_NOARGS, "A line for each operator: its name and types, as they were compiled."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "_stable", "Compiled kernels of msam_kernels", -1, kFunctions, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__stable() { return PyModule_Create(&kModule); }
