# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels as setup.py has them compiled: each file with the flags of its instruction set, and with no others.

What a processor may run is decided at run time, so nothing that every processor runs may hold an instruction of a file that
has more. The disassembly of the library shows it, and the symbols of a file show that the linker has no choice to make.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from msam_kernels import backends

ROOT = Path(__file__).resolve().parent.parent
STORAGE = ("float", "double", "bf16", "half")
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c", "-mprefer-vector-width=512"],
}
HAS_STABLE_ABI = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 10)
X86 = sys.platform == "linux" and platform.machine() == "x86_64"
pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux' tools write"),
]
on_x86 = pytest.mark.skipif(not X86, reason="one instruction set on this architecture")

# Notes its arguments, and makes empty files of what it should compile or link.
RECORDER = """#!/bin/sh
out=
previous=
for word in "$@"; do
  test "$previous" != -o || out=$word
  previous=$word
done
test "$out" || exec {compiler} "$@"
printf '%s\\0' "$@" >>{log}
echo >>{log}
: >"$out"
"""
SETUP = """
import runpy, sys
from torch.utils import cpp_extension
if sys.argv.pop(1) == "without ninja":
    cpp_extension.is_ninja_available = lambda: False
runpy.run_path("setup.py", run_name="__main__")
"""


def compiler() -> list[str]:
    name = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if name is None:
        pytest.skip("no C++ compiler")
    return shlex.split(name)


def output(*command: str | Path, **options) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is missing")
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def calls(way: str, folder: Path, stable: str = "0", modules: int = 1) -> dict[str, list[str]]:
    """By C++ file, the arguments that setup.py's build gives the compiler; each is compiled once."""
    log, recorder = folder / "log", folder / "recorder"
    recorder.write_text(RECORDER.format(compiler=shlex.join(compiler()), log=shlex.quote(str(log))))
    recorder.chmod(0o755)
    # Older setuptools compiles C++ with CC.
    env = {
        **os.environ,
        "CC": str(recorder),
        "CXX": str(recorder),
        "MAX_JOBS": "1",
        "MSAM_KERNELS_CPP": "1",
        "MSAM_KERNELS_CUDA": "0",
    }
    env["MSAM_KERNELS_STABLE"] = stable
    build = ("build_ext", "--build-temp", folder / "temp", "--build-lib", folder / "lib")
    output(sys.executable, "-c", SETUP, way, *build, cwd=ROOT, env=env)
    recorded = [line.split("\0")[:-1] for line in log.read_text().splitlines()]
    compiled = [call for call in recorded if "-c" in call]
    assert len(recorded) == len(compiled) + modules, "and the linker"
    sources = [next(word for word in call if word.endswith(".cpp")) for call in compiled]
    assert len(set(sources)) == len(sources)
    return {(ROOT / s).relative_to(ROOT / "csrc").as_posix(): call for s, call in zip(sources, compiled, strict=True)}


def left_by_build(source: str) -> Path | None:
    """The object file that ``build_ext --inplace`` made of the sources as they are; None where it is not there."""
    (*_, made) = (
        None,
        *ROOT.glob(f"build/temp.*-{sys.implementation.cache_tag}/csrc/{Path(source).with_suffix('.o')}"),
    )
    sources = [ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    return made if made and made.stat().st_mtime > max(p.stat().st_mtime for p in sources) else None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "stable", "modules"),
    [("with ninja", "", {"_C", "_stable"}), ("without ninja", "", {"_C", "_stable"}), ("with ninja", "1", {"_stable"})],
    ids=["with ninja", "without ninja", "the stable module alone"],
)
def test_every_file_has_the_flags_of_its_instruction_set_and_no_others(way, stable, modules, tmp_path):
    if not HAS_STABLE_ABI:
        modules = modules - {"_stable"}
    if not modules:
        pytest.skip("this torch has no stable ABI that is enough")
    found = calls(way, tmp_path, stable, len(modules))
    assert {name.split(".")[0] for name in os.listdir(tmp_path / "lib" / "msam_kernels")} == modules
    for name, call in found.items():
        assert any("TORCH_TARGET_VERSION=0x020a" in word for word in call) == (stable == "1" or "stable/" in name), name
    assert {name for name in found if "units" in name} == {f"cpu/units/{i}_{s}.cpp" for i in FLAGS for s in STORAGE}
    for name, call in found.items():
        isa = Path(name).name.split("_")[0] if "units" in name else "baseline"
        assert [word for word in call if re.match("-m(?!cpu|tune)", word)] == (FLAGS[isa] if X86 else []), name
        assert "-ffp-contract=off" in call, name


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(not HAS_STABLE_ABI, reason="this torch has no stable ABI that is enough")
def test_a_build_in_place_removes_what_another_choice_left(tmp_path):
    """It would be used instead. Those of other Pythons stay, and where nothing can be built, everything does."""
    clone, recorder = tmp_path / "clone", tmp_path / "recorder"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns("*.so", "build", ".*", "docs", "tests", "benchmarks"))
    recorder.write_text(RECORDER.format(compiler=shlex.join(compiler()), log=os.devnull))
    recorder.chmod(0o755)
    own, *_ = EXTENSION_SUFFIXES
    others = {"_C.cpython-38-x86_64-linux-gnu.so", "_stable.py38.so"}
    for name in (*others, f"_C{own}", "_stable.abi3.so"):
        (clone / "msam_kernels" / name).write_bytes(b"stale")
    env = {**os.environ, "PYTHONPATH": str(clone), "CXX": str(recorder), "MSAM_KERNELS_CUDA": "0"}

    def left(cpp: str, stable: str) -> dict[str, bytes]:
        choice = {"MSAM_KERNELS_CPP": cpp, "MSAM_KERNELS_STABLE": stable}
        output(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=clone, env={**env, **choice})
        files = {path.name: path.read_bytes() for path in (clone / "msam_kernels").glob("*.so")}
        assert all(files.pop(name) == b"stale" for name in others)
        return files

    assert left("0", "") == {f"_C{own}": b"stale", "_stable.abi3.so": b"stale"}
    assert left("1", "1") == {"_stable.abi3.so": b""}
    assert left("1", "0") == {f"_C{own}": b""}
    assert left("1", "") == {f"_C{own}": b"", "_stable.abi3.so": b""}
    # What this environment cannot build another one may run on.
    setup = clone / "setup.py"
    setup.write_text(setup.read_text().replace("STABLE_TORCH_AT_LEAST = (2, 10)", "STABLE_TORCH_AT_LEAST = (99, 0)"))
    assert left("1", "") == {f"_C{own}": b"", "_stable.abi3.so": b""}


@on_x86
@pytest.mark.exhaustive
def test_the_linker_has_no_choice_between_instruction_sets(tmp_path):
    # An inline function that two files define is a weak symbol in both, and the linker keeps either. And what a file does
    # when it is loaded, every processor does.
    for name, call in calls("with ninja", tmp_path).items():
        if "units" not in name:
            continue
        unit = left_by_build(name)
        if unit is None:
            if "half" not in name:  # the same code for other types
                continue
            unit = tmp_path / "unit.o"
            output(*compiler(), *call[: call.index("-o")], "-o", unit, *call[call.index("-o") + 2 :])
        symbols = output("nm", "-C", unit)
        defined = re.findall(r"^[0-9a-f]+ ([A-ZuVvwW]) (.*)", symbols, re.MULTILINE)
        isa = Path(name).name.split("_")[0]
        assert [place for _, place in defined] == [f"msam::cpu::{isa}::of_{Path(name).stem.split('_')[1]}"]
        wanted = set(re.findall(r"^ +[Uw] (.*)", symbols, re.MULTILINE)) - {"_GLOBAL_OFFSET_TABLE_"}
        assert wanted <= {"memcpy", "memset"}, name
        assert not re.search(r"\.(init_array|ctors|text\.startup)", output("objdump", "-h", unit)), name


@pytest.fixture(scope="module")
def code(extension) -> dict[str, list[str]]:
    """The library's instructions by instruction set; under "any", those that every processor runs."""
    out: dict[str, list[str]] = {"any": []}
    into = out["any"]
    for line in output("objdump", "-d", "-C", "--no-show-raw-insn", backends.extension.__file__).splitlines():
        if line.endswith(">:"):
            names = re.search(r"<(?:.*\b)?msam::cpu::(baseline|avx2|avx512)::", line)
            into = out.setdefault(names[1], []) if names else out["any"]
        elif line.startswith(" "):
            into.append(line.split(":", 1)[1].strip())
    if len(out) == 1:
        pytest.skip("the library is stripped")
    return out


@on_x86
def test_what_every_processor_runs_has_nothing_of_avx(code):
    assert code.keys() == {"any", *FLAGS}
    for isa in ("any", "baseline"):
        assert len(code[isa]) > 10000
        assert [line for line in code[isa] if re.match(r"v|.*%[yz]mm", line)] == []


@on_x86
def test_instruction_sets_have_what_they_are_there_for(code):
    def count(isa: str, pattern: str) -> int:
        return sum(re.match(pattern, line) is not None for line in code[isa])

    assert count("avx2", ".*%ymm") > 10000
    assert count("avx2", ".*%zmm") == 0
    assert count("avx512", ".*%zmm") > 10000
    for isa in ("avx2", "avx512"):
        assert count(isa, "vcvtph2ps") > 0  # fp16
        assert count(isa, "vcvtps2ph") > 0
    assert count("avx512", "vmovnt(dq|ps|pd) +%zmm") > 0  # a cache line at once, past the cache
    assert count("avx512", "v?movnt(?!.*%zmm)") == 0
    for isa in code:
        assert count(isa, "vfn?m(add|sub)") == 0  # contraction would change the bits
