# SPDX-License-Identifier: Apache-2.0
"""The suite itself, in small: pytest with this project's settings and ``conftest.py`` over a folder of one test file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from msam_kernels import backends

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = [pytest.param((), id="one process"), pytest.param(("-p", "xdist", "-n", "1"), id="xdist")]


def suite(folder: Path, tests: str, *options: str, **environment: str) -> tuple[dict[str, str], str]:
    """(outcome by test, output) of a run over ``tests``."""
    if "xdist" in options:
        pytest.importorskip("xdist")
    (folder / "tests").mkdir()
    for name in ("pyproject.toml", "tests/conftest.py", "tests/plain.py"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "tests" / "test_ours.py").write_text(tests)
    # This process may be one of xdist's, which marks it so.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST") and k != "PYTEST_ADDOPTS"}
    env |= {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), **environment}
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    outcomes = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) \S*test_ours\.py::(\w+)", output, re.MULTILINE)
    return {test: outcome for outcome, test in outcomes}, output


# ---- what it says ----------------------------------------------------------------------------------------------------

COMPARES = """
import pytest

def test_the_same(covers_instruction_set):
    covers_instruction_set("avx2")

def test_not_the_same(covers_instruction_set):
    covers_instruction_set("avx3")
    assert False

def test_not_there(covers_instruction_set):
    covers_instruction_set("avx512")
    pytest.skip("not there")
"""


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("options", PROCESSES)
def test_a_run_says_which_instruction_sets_it_covered(options, tmp_path):
    _, output = suite(tmp_path, COMPARES, *options)
    (line,) = re.findall(r"^instruction sets of the CPU kernels: (.*)$", output, re.MULTILINE)
    whole = backends.extension.build_info()["instruction_set"]
    assert line == f"whole run as {whole}; bits compared: baseline, avx2; not on this processor: avx512"


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(
    ("isa", "whole"), [("baseline", "baseline"), ("sse5", "none of them")], ids=["baseline", "one that is not there"]
)
def test_a_run_without_comparisons_says_so_and_what_it_was_asked_for(isa, whole, tmp_path):
    _, output = suite(tmp_path, "def test_nothing():\n    pass\n", MSAM_KERNELS_ISA=isa)
    assert f"\ninstruction sets of the CPU kernels: whole run as {whole}; bits compared: none\n" in output
