# SPDX-License-Identifier: Apache-2.0
"""The operators through torch's stable ABI: what tests those of ``_C`` tests them too, where ``_C`` does not load."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_C = 'import sys; sys.modules["msam_kernels._C"] = None\n'


@pytest.fixture(scope="module")
def library() -> Path:
    """``_stable`` as it was built; only who asked for no build of it gets a skip."""
    found = importlib.util.find_spec("msam_kernels._stable")
    if found is not None:
        return Path(found.origin)
    if os.environ.get("MSAM_KERNELS_CPP") == "0" or os.environ.get("MSAM_KERNELS_STABLE") == "0":
        pytest.skip("not built, as was asked for")
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 10):
        pytest.skip("this torch has no stable ABI that is enough")
    return pytest.fail("_stable is not built", pytrace=False)


@pytest.fixture(scope="module")
def environment(library, tmp_path_factory) -> dict[str, str]:
    """One in which no process loads ``_C``."""
    folder = tmp_path_factory.mktemp("without_C")
    (folder / "sitecustomize.py").write_text(WITHOUT_C)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def run(*words: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, cwd=ROOT, **options)


def check(code: str, environment: dict[str, str]) -> None:
    """That Python runs it to its end, without a warning."""
    done = run(sys.executable, "-W", "error", "-c", code, env=environment)
    assert done.returncode == 0, done.stderr


def passed(environment: dict[str, str], tests: str) -> int:
    """How many, if all of them do."""
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *shlex.split(tests)]
    done = run(sys.executable, *words, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    return int(re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tests", "at_least"),
    [
        ("tests/test_golden.py -k 'cpu and flattened and closures'", 50),
        ("tests/test_kernels.py -k 'refused'", 200),
    ],
    ids=["golden rows", "bad calls"],
)
def test_tests_of_the_kernels_pass(tests, at_least, environment):
    assert passed(environment, f"-m 'not exhaustive' {tests}") >= at_least


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("module", ["golden", "kernels", "precision", "optimizer"])
def test_whole_modules_of_tests_pass(module, environment):
    assert passed(environment, f"-m 'not exhaustive' -k 'not reference' tests/test_{module}.py") > 50


def test_info_says_which_module_is_used_and_why(environment):
    done = run(sys.executable, "-m", "msam_kernels", "info", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("  cpu: "))
    assert line.startswith("  cpu: available; compiler: ")
    assert re.search(r"; through torch's stable ABI, as the faster _C does not load \(.*msam_kernels\._C.*\)$", line)


def test_an_instruction_set_that_is_not_there_is_one_sentence(environment):
    done = run(sys.executable, "-m", "msam_kernels", "info", env={**environment, "MSAM_KERNELS_ISA": "neon"})
    assert "cpu: not available: MSAM_KERNELS_ISA=neon is not there on this processor: unset it" in done.stdout


@pytest.mark.parametrize(
    "signatures", [None, "norm(Tensor[], Tensor) -> Tensor"], ids=["an early build", "other types"]
)
def test_a_file_of_other_sources_is_refused_where_it_is_needed(signatures, environment):
    """As ``_C`` is by torch, which knows its types. Where ``_C`` loads, nobody looks."""
    code = (
        "import sys, types\n"
        "stale = sys.modules['msam_kernels._stable'] = types.ModuleType('_stable')\n"
        "stale.__file__, stale.build_info = '/somewhere/_stable.abi3.so', dict\n"
        + (f"stale.signatures = lambda: {signatures!r}\n" if signatures else "")
        + "import msam_kernels"
    )
    done = run(sys.executable, "-c", code, env=environment)
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: the compiled extension /somewhere/_stable.abi3.so is of other sources than this package: build it "
        "again, with `make build` or `pip install --no-build-isolation -e .` (it has no norm(Tensor[], Tensor[], Tensor, "
    )
    if importlib.util.find_spec("msam_kernels._C"):
        done = run(sys.executable, "-W", "error", "-c", code, env={**environment, "PYTHONPATH": str(ROOT)})
        assert (done.returncode, done.stderr) == (0, "")


def test_every_argument_of_every_operator_counts(environment):
    code = (
        "from msam_kernels import backends\n"
        "from msam_kernels.backends import stable\n"
        "for schema in backends._SCHEMAS:\n"
        "    head, _, result = schema.partition(') -> ')\n"
        "    name, _, arguments = head.partition('(')\n"
        "    arguments = [argument for argument in arguments.split(', ') if argument != '*']\n"
        "    assert arguments\n"
        "    for k in range(len(arguments)):\n"
        "        without = ', '.join(arguments[:k] + arguments[k + 1:])\n"
        "        try:\n"
        "            stable.check_schemas([f'{name}({without}) -> {result}'])\n"
        "        except RuntimeError as error:\n"
        "            assert str(error).startswith(f'it has no {name}('), error\n"
        "        else:\n"
        "            raise AssertionError(arguments[k])\n"
    )
    check(code, environment)


def test_calls_in_grad_mode_take_any_dense_order_and_leave_no_trace_in_autograd(environment):
    code = (
        "import torch\n"
        "from msam_kernels import backends\n"
        "w = torch.ones(2, 3, 5, 1).to(memory_format=torch.channels_last).transpose(0, 2).requires_grad_()\n"
        "norm_sq = backends.extension.norm([], [w], torch.tensor([[0, 0, 0, 30, 0]]))\n"
        "assert norm_sq.tolist() == [30.0] and not norm_sq.requires_grad, norm_sq\n"
    )
    check(code, environment)


def test_it_asks_torch_and_python_for_what_is_stable_alone(library):
    """Functions of C: torch's that its shims have, and Python's of the limited API. Of C++ only the standard library."""
    if shutil.which("nm") is None:
        pytest.skip("nm is missing")
    assert ".abi3." in library.name
    done = run("nm", "-D", "--undefined-only", library)
    assert done.returncode == 0, done.stderr
    names = {line.split()[-1].split("@")[0] for line in done.stdout.splitlines()}
    assert {"torch_library_impl", "torch_parallel_for", "aoti_torch_get_storage_size", "PyModule_Create2"} <= names
    assert [name for name in names if re.match(r"_Z", name) and re.search(r"3c10|2at|5torch|8pybind11", name)] == []
    assert {name for name in names if name.startswith(("Py", "_Py"))} == {
        *("PyErr_SetString", "PyExc_RuntimeError", "PyModule_Create2", "Py_BuildValue")
    }


def other_pythons() -> list[str]:
    """Those of other versions that are on PATH, or that pyenv has."""
    names = [f"python3.{minor}" for minor in range(10, 20) if minor != sys.version_info.minor]
    folders = os.pathsep.join(map(str, Path.home().glob(".pyenv/versions/*/bin")))
    found = [shutil.which(name, path=folders) or shutil.which(name) for name in names]
    return [path for path in found if path and run(path, "-c", "").returncode == 0]


def test_other_pythons_load_the_same_file(library):
    """Beside this torch's libraries, which know no Python."""
    pythons = other_pythons()
    if not pythons:
        pytest.skip("there is no other Python")
    code = (
        "import ctypes, importlib.machinery, importlib.util, sys\n"
        f"for name in ('c10', 'torch_cpu'): ctypes.CDLL({str(Path(torch.__file__).parent / 'lib')!r} + f'/lib{{name}}.so',"
        " ctypes.RTLD_GLOBAL)\n"
        f"loader = importlib.machinery.ExtensionFileLoader('msam_kernels._stable', {str(library)!r})\n"
        "module = importlib.util.module_from_spec(importlib.util.spec_from_loader('msam_kernels._stable', loader))\n"
        "loader.exec_module(module)\n"
        "print(sys.version_info[:2], module.build_info()['instruction_set'])\n"
    )
    for python in pythons:
        done = run(python, "-c", code, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
        assert done.returncode == 0, (python, done.stderr)
        assert re.fullmatch(r"\(3, \d+\) (baseline|avx2|avx512)\n", done.stdout), python
