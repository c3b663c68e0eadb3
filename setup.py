# SPDX-License-Identifier: Apache-2.0
"""Builds ``msam_kernels._C`` against the torch that is installed. Without a compiler the package is pure Python.

MSAM_KERNELS_CPP=0 leaves the C++ kernels out; MSAM_KERNELS_CPP=1 makes it an error if they cannot be built.
"""

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
TORCH_AT_LEAST = (2, 6)
COMPILER_REMEDY = (
    "install a C++17 compiler (Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select "
    "--install) and build again with `pip install --no-build-isolation -e .`"
)

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise SystemExit(
        "msam_kernels: torch is missing, and the extension is built against the torch that is there: run `pip install "
        "torch==2.13.0` (or the build of torch that your machine needs), then `pip install --no-build-isolation .`"
    ) from None
if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < TORCH_AT_LEAST:
    raise SystemExit(f"msam_kernels: torch is {torch.__version__}, and 2.6 or later is needed: `pip install -U torch`")

from torch.utils.cpp_extension import BuildExtension, CppExtension  # noqa: E402


class Build(BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        # Ninja sees headers and flags change; setuptools would only look at its own list of files.
        self.force = True


def put_ninja_on_path():
    """An environment that is not activated has its ninja where torch does not look."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        return
    os.environ["PATH"] = os.pathsep.join([BIN_DIR, os.environ.get("PATH", os.defpath)])


def find_compiler():
    """The C++ compiler as a list of words and None, or None and what is missing."""
    asked = os.environ.get("CXX")
    names = [asked] if asked else ["cl"] if os.name == "nt" else ["c++", "g++", "clang++"]
    name = next((n for n in names if shutil.which(shlex.split(n)[0])), None)
    if name is None:
        return None, f"the compiler CXX={asked} is not there" if asked else "no C++ compiler was found"
    if os.name == "nt":
        return [name], None
    compiler = shlex.split(name)
    include = sysconfig.get_paths()["include"]
    probe = subprocess.run(
        [*compiler, "-std=c++17", "-fsyntax-only", f"-I{include}", "-x", "c++", "-"],
        input="#include <Python.h>\n#include <optional>\nstd::optional<int> x;\n",
        capture_output=True,
        text=True,
    )
    if probe.returncode == 0:
        # One compiler for objects and for linking, whatever Python itself was built with.
        os.environ["CXX"] = name
        return compiler, None
    if not (Path(include) / "Python.h").is_file():
        return None, f"Python.h is not in {include} (Debian and Ubuntu: apt install python3-dev)"
    complaint = next((line for line in probe.stderr.splitlines() if "error" in line), probe.stderr.strip())
    return None, f"{name} does not compile a C++17 program ({complaint})"


def is_clang(compiler):
    return "clang" in subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout


def openmp_flags(compiler):
    """Flags of the compile step. Nothing is linked: the calls bind to the OpenMP runtime that torch brought.

    So there is one thread pool and ``torch.set_num_threads`` counts. Linking with -fopenmp would map a second runtime
    wherever torch ships its own under another name. A compiler whose calls torch's runtime does not know (clang beside
    libgomp) builds single-threaded kernels, which give the same bits.
    """
    if os.name == "nt":
        return ["/openmp"]
    if sys.platform == "darwin":
        return []  # Apple's clang has no OpenMP
    entry = "__kmpc_fork_call" if is_clang(compiler) else "GOMP_parallel"
    runtime = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return ["-fopenmp"] if hasattr(runtime, entry) else []


def extensions():
    """What is built, and one line that says so."""
    wish = os.environ.get("MSAM_KERNELS_CPP", "")
    compiler, missing = (None, "MSAM_KERNELS_CPP=0") if wish == "0" else find_compiler()
    if missing:
        if wish == "1" or (os.environ.get("CXX") and wish != "0"):
            raise SystemExit(f"msam_kernels: the C++ kernels cannot be built: {missing}; {COMPILER_REMEDY}")
        remedy = "unset it and build again" if wish == "0" else COMPILER_REMEDY
        line = f"pure Python (backend 'reference'), without the C++ kernels: {missing}; to get them, {remedy}"
        stale = sorted(p.name for p in (ROOT / "msam_kernels").glob("_C.*"))
        return [], line + (f" (an earlier build is still in use: {', '.join(stale)})" if stale else "")
    openmp = openmp_flags(compiler or ["cl"])
    if os.name == "nt":
        flags = ["/O2", "/std:c++17", "/fp:precise", *openmp]
    else:
        # No -march: kernels.cpp picks the instruction set at run time. No contraction: the same bits everywhere. Neither
        # errno nor traps: they change no result, and loops with them stay scalar.
        strict = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
        # Torch's headers use a little of C++20. gcc takes arrays that are filled on every path for uninitialized.
        warn = ["-Wall", "-Wno-c++20-extensions", *([] if is_clang(compiler) else ["-Wno-maybe-uninitialized"])]
        flags = ["-O3", "-std=c++17", *strict, "-fvisibility=hidden", "-g0", *warn, *openmp]
    extension = CppExtension(
        "msam_kernels._C",
        # Relative, as setuptools demands; sorted, so that builds repeat.
        sources=sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.cpp") if "cuda" not in p.parts),
        define_macros=[("MSAM_TORCH_VERSION", f'"{torch.__version__}"')],
        extra_compile_args={"cxx": flags},
    )
    threads = "threads of torch's OpenMP" if openmp else "single-threaded: no OpenMP that torch shares"
    return [extension], f"C++ kernels built with {shlex.join(compiler)} for torch {torch.__version__}, {threads}"


put_ninja_on_path()
ext_modules, summary = extensions()
distribution = setup(
    ext_modules=ext_modules,
    cmdclass={"build_ext": Build},
    # Here because pyproject.toml's two ways of saying it each fail with some setuptools.
    license="Apache-2.0",
)
if distribution.have_run.keys() & {"build", "build_ext", "editable_wheel"}:
    print(f"msam_kernels: {summary}")
