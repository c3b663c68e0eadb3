# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of a checkout as nvcc makes them: what ptxas reports of each, and its disassembly. Needs no GPU."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Missing(RuntimeError):
    """A tool that is not there; the message says how to get it."""


def tool(name: str) -> str:
    """nvcc or cuobjdump: on PATH, of the toolkit, or of triton.

    Raises:
        Missing: it is nowhere.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [shutil.which(name), *(str(Path(home, "bin", name)) for home in homes if home)]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        candidates.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name))
    for candidate in candidates:
        if candidate and Path(candidate).is_file():
            return candidate
    raise Missing(f"{name} is missing: install the CUDA toolkit, or put its bin folder on PATH")


def output(*command: str) -> str:
    """Of both streams.

    Raises:
        RuntimeError: the command failed, and what it printed.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def nvcc_flags(root: Path = ROOT) -> list[str]:
    """Those of the checkout's setup.py, and what torch adds to every extension."""
    for node in ast.parse((root / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "NVCC_FLAGS":
            flags = ast.literal_eval(node.value)
            break
    removed = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
    return [*flags, *(f"-D__CUDA_NO_{name}__" for name in removed), "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC"]


@dataclass
class Made:
    """A kernel: its name with template arguments, bytes of stack, bytes spilled and loaded back, registers, disassembly."""

    name: str
    stack: int
    spilled: int
    registers: int
    text: str


def kernels(architecture: str, folder: Path, root: Path = ROOT) -> tuple[list[Made], str]:
    """All of csrc/cuda/kernels.cu for such a compute capability ("90"), and what nvcc said; takes about 30 s."""
    source, target = str(root / "csrc" / "cuda" / "kernels.cu"), str(folder / "kernels.cubin")
    options = ["-Xptxas=-v", f"-arch=sm_{architecture}", "-cubin", source, "-o", target]
    report = output(tool("nvcc"), *nvcc_flags(root), *options)
    usage = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    parts = re.split(r"Function : (\w+)\n", output(tool("cuobjdump"), "-sass", target))
    text = dict(zip(parts[1::2], parts[2::2], strict=True))
    names = output("c++filt", *(entry for entry, *_ in usage)).splitlines()
    made = [
        Made(name, int(stack), int(stores) + int(loads), int(registers), text[entry])
        for name, (entry, stack, stores, loads, registers) in zip(names, usage, strict=True)
    ]
    return made, report
