# SPDX-License-Identifier: Apache-2.0
"""The suite itself: whose warnings stop it, and what it says.

Much of this is seen in small: pytest with this project's settings and ``conftest.py`` over a folder of one test file.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import mutants
from msam_kernels import backends

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = [
    pytest.param((), id="one process"),
    pytest.param(("-p", "xdist", "-n", "1"), id="xdist", marks=pytest.mark.exhaustive),
]


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
    outcomes = re.findall(r"^(PASSED|FAILED|ERROR) \S*test_ours\.py::(\w+)", output, re.MULTILINE)
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


@pytest.mark.exhaustive
@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(
    ("isa", "whole"), [("baseline", "baseline"), ("sse5", "none of them")], ids=["baseline", "one that is not there"]
)
def test_a_run_without_comparisons_says_so_and_what_it_was_asked_for(isa, whole, tmp_path):
    _, output = suite(tmp_path, "def test_nothing():\n    pass\n", MSAM_KERNELS_ISA=isa)
    assert f"\ninstruction sets of the CPU kernels: whole run as {whole}; bits compared: none\n" in output


# ---- whose warnings stop it ------------------------------------------------------------------------------------------

NOTICE = "Warning: Profiler clears events at the end of each cycle."
# What is warned, and whether that is an error: (module, words, category).
WARNINGS = {
    "the package": (("msam_kernels", "words", UserWarning), True),
    "a module of the package": (("msam_kernels.optimizer", "words", DeprecationWarning), True),
    "torch": (("torch", "words", FutureWarning), True),
    "a module of torch": (("torch.autograd.graph", "words", UserWarning), True),
    "torch's profiler on something else": (("torch.profiler.profiler", "words", UserWarning), True),
    "a script": (("__main__", "words", UserWarning), True),
    "an example under test": (("demo_under_test", "words", UserWarning), True),
    "pytest on a class that it cannot collect": (("tests", "words", pytest.PytestCollectionWarning), True),
    "torch's profiler on cycles": (("torch.profiler.profiler", NOTICE, UserWarning), False),
    "torch's profiler on cycles, said of a test": (("test_conventions", NOTICE, UserWarning), False),
    "pytest": (("_pytest.config", "words", pytest.PytestConfigWarning), False),
    "a plugin": (("pytest_benchmark.logger", "words", pytest.PytestWarning), False),
    "a plugin of one module": (("pytest_timeout", "words", UserWarning), False),
    "a plugin on a test, which has a path then": ((str(ROOT / "tests" / "test_cli"), "words", UserWarning), False),
    "another package": (("numpy.lib", "words", DeprecationWarning), False),
    "a package whose name begins like torch's": (("torchvision.ops", "words", UserWarning), False),
    "a package whose name begins like ours": (("msam_kernels_extra", "words", UserWarning), False),
    "a package with a module named like ours": (("optree.methods", "words", UserWarning), False),
}


def is_error(module: str, message: str, category: type[Warning]) -> bool:
    with warnings.catch_warnings(record=True):  # with the filters that pytest has set for this test
        try:
            warnings.warn_explicit(message, category, "somewhere.py", 1, module=module, registry={})
        except category:
            return True
    return False


@pytest.mark.parametrize(("warned", "expected"), WARNINGS.values(), ids=WARNINGS)
def test_a_warning_is_an_error_if_it_is_about_us_or_torch(warned, expected):
    assert is_error(*warned) == expected


@pytest.mark.parametrize("folder", ["msam_kernels", "tests", "benchmarks", "examples"])
def test_warnings_about_every_module_of_this_repository_are_errors(folder):
    prefix = "msam_kernels." if folder == "msam_kernels" else ""
    modules = [prefix + path.stem for path in (ROOT / folder).glob("*.py")]
    assert modules
    assert [m for m in modules if not is_error(m, "words", UserWarning)] == []


# pytest-benchmark warned as the first does, of its being off beside pytest-xdist.
PLUGIN = """
import warnings
import pytest

def pytest_configure(config):
    warnings.warn(pytest.PytestWarning("while it is set up"))
    config.issue_config_time_warning(UserWarning("while it is set up, as pytest has it"), stacklevel=2)

def pytest_collection_modifyitems():
    warnings.warn("during collection")

@pytest.hookimpl
def pytest_runtest_call(item):
    warnings.warn("before a test")
    item.warn(pytest.PytestWarning("of a test"))

@pytest.fixture
def noisy():
    warnings.warn("in a fixture", DeprecationWarning)

def pytest_sessionfinish():
    warnings.warn("at the end")
"""
# The name of a test begins with its outcome.
OURS = """
import threading, warnings
import numpy, pytest, torch

def warn_in(module):
    exec("import warnings; warnings.warn('words')", {"__name__": module})

def test_passes_beside_the_plugin(noisy):
    pass

def test_passes_where_the_profiler_has_cycles():
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], schedule=schedule) as profile:
        for _ in range(5):
            profile.step()

def test_fails_where_the_package_warns():
    warn_in("msam_kernels.optimizer")

def test_fails_where_torch_warns():
    warn_in("torch.optim.lr_scheduler")

def test_fails_where_torch_warns_in_compiled_code():
    array = numpy.zeros(2)
    array.setflags(write=False)
    torch.from_numpy(array)

def test_fails_where_it_warns_itself():
    warnings.warn("words")

def test_fails_where_a_thread_does():
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()

def test_fails_where_a_destructor_does():
    class Broken:
        def __del__(self):
            raise ValueError

    Broken()

def test_fails_where_it_returns_what_it_should_assert():
    return True
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", PROCESSES)
def test_a_plugin_that_warns_stops_nothing_and_a_warning_of_ours_does(options, tmp_path):
    (tmp_path / "other_peoples_plugin.py").write_text(PLUGIN)
    outcomes, output = suite(tmp_path, OURS, "-p", "other_peoples_plugin", *options)
    names = re.findall(r"^def (test_\w+)", OURS, re.MULTILINE)
    assert outcomes == {n: "PASSED" if n.startswith("test_passes") else "FAILED" for n in names}, output
    for words in ("while it is set up", "during collection", "before a test", "in a fixture", "at the end"):
        assert words in output  # shown all the same


@pytest.mark.exhaustive
def test_without_pytest_timeout_its_setting_is_no_mistake(tmp_path):
    outcomes, output = suite(tmp_path, "def test_nothing():\n    pass\n", "-p", "no:timeout")
    assert outcomes == {"test_nothing": "PASSED"}, output
    assert "warning" not in output


# ---- faults ------------------------------------------------------------------------------------------------------------


def test_every_fault_fits_the_file_that_it_is_planted_in():
    places = {m.fault: (ROOT / m.file).read_text(encoding="utf-8").count(m.old) for m in mutants.MUTANTS}
    assert {fault: count for fault, count in places.items() if count != 1} == {}
