# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels as nvcc compiles them, which takes no GPU: all of csrc/cuda and the binding, for sm_80 to sm_120.

What ptxas reports and what the disassembly shows is what a GPU will run: registers that do not spill, and 16 bytes for
every load and store of the main loops.
"""

from __future__ import annotations

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
# Kernel -> variants, each for every storage type and for few and for many pointers; those of stacks, for many alone; and those
# of masters, for few and for many, of 16 bits alone.
KERNELS = {
    **{"norm_kernel": (4, 4, 0), "perturb_kernel": (4, 4, 4), "ascend_kernel": (4, 4, 4)},
    **{"gram_kernel": (3, 3, 0), "descend_kernel": (2, 1, 2), "update_kernel": (6, 2, 4)},
}
ROUNDING = ("perturb_kernel", "ascend_kernel")  # of 16 bits also at random: twice the variants
REGISTERS = 65536  # of a multiprocessor
ARCHITECTURES = ("80", "90", "100", "120")  # compute capabilities, times ten
OPERATIONS = re.compile(r"\b((?:LD|ST)[GL]?\b[.\w]*)")
pytestmark = [pytest.mark.host, pytest.mark.slow]


@pytest.fixture
def cubin(monkeypatch):
    """The module of benchmarks/; without nvcc there is nothing to look at."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("cubin")
    try:
        module.tool("nvcc"), module.tool("cuobjdump")
    except module.Missing as missing:
        if os.environ.get("CI") == "true":
            pytest.fail(str(missing), pytrace=False)
        pytest.skip(str(missing))
    return module


@dataclass
class Kernel:
    name: str
    stack: int
    spilled: int
    registers: int
    operations: set[str]  # of memory, in its disassembly

    @property
    def kind(self) -> str:
        return re.search(r"(\w+_kernel)\b", self.name)[1]

    def has(self, operation: str) -> bool:
        return any(re.fullmatch(operation, found) for found in self.operations)


def check(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    assert "warning" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def compiled(cubin, architecture: str, folder: Path) -> list[Kernel]:
    made, report = cubin.kernels(architecture, folder)
    assert "warning" not in report, report
    return [Kernel(k.name, k.stack, k.spilled, k.registers, set(OPERATIONS.findall(k.text))) for k in made]


def blocks_of(k: Kernel, architecture: str) -> int:
    """Blocks of 256 threads that share a multiprocessor, at least: what the loads in flight of kernels.cuh take."""
    if re.search(
        r"update_kernel<\S+, \(msam::Rule\)\d, \S+, \S+, true", k.name
    ):  # of what goes off the weights after it
        return 2
    if re.search(r"(update|descend|perturb|ascend)_kernel<.*, true, msam::cuda::Parameters", k.name):  # of masters
        return 2
    adam = re.search(r"update_kernel<(\S+), \(msam::Rule\)1, (true|false)", k.name)
    if adam and ("double" in k.name or int(architecture) >= 100 or (adam[2] == "true" and adam[1] != "float")):
        return 2
    if re.search(r"update_kernel<\S+, \(msam::Rule\)\d, true, true", k.name):  # of stacks
        return 2
    friendly = re.search(r"(?:perturb|ascend)_kernel<(\S+), true, (\w+), (\w+), (\w+)", k.name)
    if friendly:
        (adaptive, stochastic, stacked), later = (friendly[i] == "true" for i in (2, 3, 4)), int(architecture) >= 100
        if stochastic and (adaptive or later):
            return 1 if stacked else 2
        if adaptive and stacked and later and friendly[1] in ("msam::bf16", "msam::half"):
            return 1
    if re.search(r"(perturb|ascend)_kernel<\S+, \S+, \S+, \S+, true", k.name):  # of stacks
        return 2
    # From there on a kernel takes more registers, and the sums of fp64 hold twice the numbers.
    if int(architecture) >= 100 and re.search(r"descend_kernel<(double, true|\S+, true, true)", k.name):
        return 2
    return 3


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)  # nvcc takes minutes for all kernels of all storage types
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_there_and_fits_its_registers_and_moves_16_bytes(architecture, cubin, tmp_path):
    if f"sm_{architecture}" not in cubin.output(cubin.tool("nvcc"), "--list-gpu-code").split():
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    found = compiled(cubin, architecture, tmp_path)
    for kind, (variants, of_stacks, of_masters) in KERNELS.items():
        short = 4 if kind in ROUNDING else 2
        wanted = (variants * 2 + of_stacks) * (len(STORAGE) - 2 + short) + of_masters * 2 * short
        assert sum(k.kind == kind for k in found) == wanted, kind
    assert {k.kind for k in found} == {*KERNELS, "weigh_kernel"}
    for k in found:
        assert (k.stack, k.spilled) == (0, 0), k.name
        assert not k.has(r"(LDL|STL)\b.*"), k.name
        # An access that has to find out which memory it is.
        assert not k.has(r"(LD|ST)\.E.*\.128"), k.name
        if k.kind == "weigh_kernel":  # of numbers alone
            continue
        assert k.has(r"LDG\.E.*\.128"), k.name
        assert k.kind in ("norm_kernel", "gram_kernel") or k.has(r"STG\.E.*\.128"), k.name
        # Evict-first accesses were slower by 3 to 10 % on an H200.
        assert not k.has(r"(LD|ST)G\..*\bEF\b.*"), k.name
        assert k.registers * 256 * blocks_of(k, architecture) <= REGISTERS, k.name


@pytest.mark.exhaustive
def test_the_binding_compiles_with_cuda(cubin):
    # The nvcc on PATH may be a link or a script outside of its toolkit.
    top = re.search(
        r"^#\$ TOP=(.+)$", cubin.output(cubin.tool("nvcc"), "--dryrun", "-x", "cu", "-E", os.devnull), re.MULTILINE
    )
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


def test_the_plain_kernels_of_the_sweep_compile(cubin, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(cubin.__file__).parent))
    bench = importlib.import_module("bench_sweep")
    assert bench.build(tmp_path / "sweep.so", "sm_90").stat().st_size > 10_000
