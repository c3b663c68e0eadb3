# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels as nvcc compiles them, which takes no GPU: all of csrc/cuda and the binding, for sm_80 and sm_90.

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
ARCHITECTURES = ("80", "90")
STORAGE = ("float", "double", "msam::bf16", "msam::half")
# Kernel -> variants, each for every storage type and for few and for many pointers.
KERNELS = {
    **{"norm_kernel": 4, "perturb_kernel": 4, "ascend_kernel": 4},
    **{"gram_kernel": 3, "descend_kernel": 2, "update_kernel": 4},
}
REGISTERS = 65536  # of a multiprocessor
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
    code: str  # its disassembly

    @property
    def kind(self) -> str:
        return re.search(r"(\w+_kernel)<", self.name)[1]


def check(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    assert "warning" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def compiled(architecture: str, folder: Path, nvcc: list[str], cuobjdump: str) -> list[Kernel]:
    """Every kernel of kernels.cu; takes about 20 s."""
    target = folder / f"kernels.{architecture}.o"
    source = str(CSRC / "cuda" / "kernels.cu")
    report = check([*nvcc, "-Xptxas", "-v", f"-arch=sm_{architecture}", "-c", source, "-o", str(target)])
    usage = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    parts = re.split(r"Function : (\w+)\n", check([cuobjdump, "-sass", str(target)]))
    code = dict(zip(parts[1::2], parts[2::2], strict=True))
    readable = check(["c++filt", *(entry for entry, *_ in usage)]).splitlines()
    return [
        Kernel(name, int(stack), int(stores) + int(loads), int(registers), code[entry])
        for name, (entry, stack, stores, loads, registers) in zip(readable, usage, strict=True)
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, list[Kernel]]:
    nvcc, cuobjdump = [tool("nvcc"), *nvcc_flags()], tool("cuobjdump")  # here: ast.parse fails in two threads at once
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor() as pool:
        futures = {a: pool.submit(compiled, a, folder, nvcc, cuobjdump) for a in ARCHITECTURES}
        return {a: f.result() for a, f in futures.items()}


def test_every_kernel_is_there_and_fits_its_registers_and_moves_16_bytes(kernels):
    for architecture, found in kernels.items():
        for kind, variants in KERNELS.items():
            assert sum(k.kind == kind for k in found) == variants * len(STORAGE) * 2, (architecture, kind)
        assert {k.kind for k in found} == set(KERNELS)
        for k in found:
            where = f"sm_{architecture}: {k.name}"
            assert (k.stack, k.spilled) == (0, 0), where
            assert not re.search(r"\b(LDL|STL)\b", k.code), where
            assert re.search(r"\bLDG\.E[.\w]*\.128\b", k.code), where
            reads_only = k.kind in ("norm_kernel", "gram_kernel")
            assert reads_only or re.search(r"\bSTG\.E[.\w]*\.128\b", k.code), where
            # What is saved leaves the cache first.
            assert k.kind not in ("perturb_kernel", "ascend_kernel") or re.search(r"\bSTG\.E\.EF\.128\b", k.code), where
            # Enough blocks of 256 threads for the loads in flight that kernels.cuh counts on.
            few = "double" in k.name or re.search(r"update_kernel<msam::\w+, \(msam::Rule\)1, true", k.name)
            blocks = 2 if few else 3
            assert k.registers * 256 * blocks <= REGISTERS, where


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
