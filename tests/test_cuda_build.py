# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels as nvcc compiles them, which takes no GPU: all of csrc/cuda and the binding, for sm_80 to sm_120.

What ptxas reports and what the disassembly shows is what a GPU will run: registers that do not spill, and 16 bytes for
every load and store of the main loops.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from msam_kernels import backends

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
STORAGE = ("float", "double", "msam::bf16", "msam::half")
# Kernel -> variants, each for every storage type and for few and for many pointers.
KERNELS = {
    **{"norm_kernel": 4, "perturb_kernel": 4, "ascend_kernel": 4},
    **{"gram_kernel": 3, "descend_kernel": 2, "update_kernel": 4},
}
REGISTERS = 65536  # of a multiprocessor
MORE = ("80", "100", "120")  # compute capabilities beside 9.0
OPERATIONS = re.compile(r"\b((?:LD|ST)[GL]?\b[.\w]*)")
pytestmark = [pytest.mark.host, pytest.mark.slow]


def tool(name: str) -> str:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [shutil.which(name), *(str(Path(home, "bin", name)) for home in homes if home)]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        candidates.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name))
    for candidate in candidates:
        if candidate and Path(candidate).is_file():
            return candidate
    missing = f"{name} is missing: install the CUDA toolkit, or put its bin folder on PATH"
    if os.environ.get("CI") == "true":
        pytest.fail(missing, pytrace=False)
    pytest.skip(missing)


def nvcc_flags() -> list[str]:
    """Those of setup.py, and what torch adds to every extension."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "NVCC_FLAGS":
            flags = ast.literal_eval(node.value)
            break
    removed = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
    return [*flags, *(f"-D__CUDA_NO_{name}__" for name in removed), "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC"]


@dataclass
class Kernel:
    name: str
    stack: int
    spilled: int
    registers: int
    operations: set[str]  # of memory, in its disassembly

    @property
    def kind(self) -> str:
        return re.search(r"(\w+_kernel)<", self.name)[1]

    def has(self, operation: str) -> bool:
        return any(re.fullmatch(operation, found) for found in self.operations)


def check(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    assert "warning" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def compiled(architecture: str, folder: Path) -> list[Kernel]:
    """Every kernel of kernels.cu; takes about 30 s."""
    target, source = str(folder / "kernels.cubin"), str(CSRC / "cuda" / "kernels.cu")
    command = [tool("nvcc"), *nvcc_flags(), "-Xptxas=-v", f"-arch=sm_{architecture}", "-cubin", source, "-o", target]
    usage = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        check(command),
        re.DOTALL,
    )
    parts = re.split(r"Function : (\w+)\n", check([tool("cuobjdump"), "-sass", target]))
    operations = {entry: set(OPERATIONS.findall(text)) for entry, text in zip(parts[1::2], parts[2::2], strict=True)}
    readable = check(["c++filt", *(entry for entry, *_ in usage)]).splitlines()
    return [
        Kernel(name, int(stack), int(stores) + int(loads), int(registers), operations[entry])
        for name, (entry, stack, stores, loads, registers) in zip(readable, usage, strict=True)
    ]


def blocks_of(k: Kernel, architecture: str) -> int:
    """Blocks of 256 threads that share a multiprocessor, at least: what the loads in flight of kernels.cuh take."""
    adam = re.search(r"update_kernel<(\S+), \(msam::Rule\)1, (true|false)", k.name)
    if adam and ("double" in k.name or int(architecture) >= 100 or (adam[2] == "true" and adam[1] != "float")):
        return 2
    # From there on a kernel takes more registers, and the sums of fp64 hold twice the numbers.
    if int(architecture) >= 100 and "descend_kernel<double, true" in k.name:
        return 2
    return 3


@pytest.mark.parametrize("architecture", ["90", *(pytest.param(a, marks=pytest.mark.exhaustive) for a in MORE)])
def test_every_kernel_is_there_and_fits_its_registers_and_moves_16_bytes(architecture, tmp_path):
    if f"sm_{architecture}" not in check([tool("nvcc"), "--list-gpu-code"]).split():
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    found = compiled(architecture, tmp_path)
    for kind, variants in KERNELS.items():
        assert sum(k.kind == kind for k in found) == variants * len(STORAGE) * 2, kind
    assert {k.kind for k in found} == set(KERNELS)
    for k in found:
        assert (k.stack, k.spilled) == (0, 0), k.name
        assert not k.has(r"(LDL|STL)\b.*"), k.name
        # An access that has to find out which memory it is.
        assert not k.has(r"(LD|ST)\.E.*\.128"), k.name
        assert k.has(r"LDG\.E.*\.128"), k.name
        assert k.kind in ("norm_kernel", "gram_kernel") or k.has(r"STG\.E.*\.128"), k.name
        # Evict-first accesses were slower by 3 to 10 % on an H200.
        assert not k.has(r"(LD|ST)G\..*\bEF\b.*"), k.name
        assert k.registers * 256 * blocks_of(k, architecture) <= REGISTERS, k.name


@pytest.mark.exhaustive
def test_the_binding_compiles_with_cuda():
    # The nvcc on PATH may be a link or a script outside of its toolkit.
    top = re.search(r"^#\$ TOP=(.+)$", check([tool("nvcc"), "--dryrun", "-x", "cu", "-E", os.devnull]), re.MULTILINE)
    home = Path(top[1].strip()).resolve()
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    include = Path(torch.__file__).parent / "include"
    folders = [
        include,
        include / "torch" / "csrc" / "api" / "include",
        home / "include",
        sysconfig.get_paths()["include"],
    ]
    # A CPU build of torch lacks one header of c10/cuda, which only says how libc10_cuda was built.
    defines = ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"] if torch.version.cuda is None else []
    defines += ['-DMSAM_CUDA="12.1"', '-DMSAM_TORCH_VERSION="2"', "-DTORCH_EXTENSION_NAME=_C"]
    options = ["-std=c++17", "-Wall", "-fsyntax-only", *defines, *(f"-isystem{f}" for f in folders)]
    sources = [CSRC / "cuda" / "operators.cpp", CSRC / "module.cpp"]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda source: check([compiler, *options, str(source)]), sources))


@pytest.mark.usefixtures("extension")
def test_the_build_says_whether_it_has_cuda():
    built = backends.extension.CUDA
    if torch.version.cuda is None:
        assert built is None
        assert "has no CUDA" in backends.available_backends()["cuda"]
        with pytest.raises(RuntimeError, match=r"'cuda' is not available: .*FORCE_CUDA=1 pip install"):
            backends.get_backend("cuda", torch.device("cuda"))
    elif built is not None:
        assert built.startswith(torch.version.cuda)
