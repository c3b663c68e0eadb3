# SPDX-License-Identifier: Apache-2.0
"""The command line, and what the build says when something is missing."""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import msam_kernels
from msam_kernels import __main__ as cli
from msam_kernels import backends

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parent.parent


def python(*args: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Python in the checkout or another one; ``environment`` goes on top of this process's own."""
    env = {**os.environ, "PYTHONPATH": str(folder), **environment}
    return subprocess.run([sys.executable, *args], cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def without_extension(monkeypatch) -> None:
    """As ``backends`` is where ``_C`` was not built."""
    monkeypatch.setattr(backends, "extension", None)
    monkeypatch.setattr(backends, "missing_extension", ModuleNotFoundError("no module named msam_kernels._C"))
    backends._warn_once.cache_clear()


def test_info_says_versions_and_backends():
    done = python("-m", "msam_kernels", "info")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"msam_kernels {msam_kernels.__version__}" in done.stdout
    assert f"torch {torch.__version__}" in done.stdout
    assert f"Python {sys.version.split()[0]}" in done.stdout
    for name in backends.available_backends():
        assert f"  {name}: " in done.stdout
    assert "  reference: available" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_info_says_that_triton_needs_a_gpu_or_the_interpreter():
    pytest.importorskip("triton", "{}.{}".format(*backends.TRITON_AT_LEAST))
    lines = {}
    for interpreted in ("0", "1"):
        done = python("-m", "msam_kernels", "info", TRITON_INTERPRET=interpreted)
        (lines[interpreted],) = (line for line in done.stdout.splitlines() if line.startswith("  triton: "))
    assert "not available: torch sees no GPU" in lines["0"]
    assert "set TRITON_INTERPRET=1" in lines["0"]
    assert lines["1"] == "  triton: available"


@pytest.mark.usefixtures("extension")
def test_info_says_how_the_extension_was_built(capsys):
    cli.main(["info"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  cpu: available"))
    facts = backends.extension.build_info()
    assert {"compiler", "instruction_set", "threads", "built_with_torch"} <= facts.keys()
    assert all(str(value) in line for value in facts.values())


def test_info_says_how_to_get_a_missing_extension():
    # A subprocess, so that the import in backends itself fails.
    code = (
        "import sys; sys.modules |= {'msam_kernels._C': None, 'msam_kernels._stable': None}\n"
        "from msam_kernels.__main__ import main; main(['info'])"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^  cpu: not available: .*compiler.*pip install --no-build-isolation", done.stdout, re.MULTILINE)
    assert "  reference: available" in done.stdout


def test_an_instruction_set_that_is_not_there_is_one_sentence(extension):
    done = python("-m", "msam_kernels", "info", MSAM_KERNELS_ISA="neon")
    assert (done.returncode, done.stderr) == (0, "")
    assert "cpu: not available: MSAM_KERNELS_ISA=neon is not there on this processor: unset it" in done.stdout
    code = "import torch, msam_kernels; p = torch.ones(2, requires_grad=True); msam_kernels.SAM([p], torch.optim.SGD, lr=0.1)"
    done = python("-c", code, MSAM_KERNELS_ISA="neon")
    assert "RuntimeError: backend 'cpu' is not available: MSAM_KERNELS_ISA=neon" in done.stderr


def test_missing_extension_is_no_silent_fall_back(monkeypatch):
    without_extension(monkeypatch)
    with pytest.raises(RuntimeError, match=r"'cpu' is not available: .*compiler.*rebuild"):
        backends.get_backend("cpu", torch.device("cpu"))
    with pytest.warns(RuntimeWarning, match=r"'reference', .*slower, is used, as .* is missing \(no module.*compiler"):
        assert backends.get_backend("auto", torch.device("cpu")) is backends.reference
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.get_backend("auto", torch.device("cpu")) is backends.reference, "it is said once"
        backends._warn_once.cache_clear()
        assert backends.get_backend("reference", torch.device("cpu")) is backends.reference, (
            "and not to who asked for it"
        )


def clone_with(tmp_path: Path, extension: bytes) -> Path:
    """The package somewhere else, with extensions that are this file."""
    shutil.copytree(
        ROOT / "msam_kernels", tmp_path / "msam_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    first, *_, last = importlib.machinery.EXTENSION_SUFFIXES
    # Where there is none, an editable install would lend its own.
    for name in (f"_C{first}", f"_stable{last}"):
        (tmp_path / "msam_kernels" / name).write_bytes(extension)
    return tmp_path


def test_an_extension_that_does_not_load_is_not_called_missing(tmp_path):
    """It says which file, what the loader said, and how to build it anew: in info, and once at the first use."""
    folder = clone_with(tmp_path, b"\x7fELF of another torch")
    done = python("-m", "msam_kernels", "info", folder=folder)
    assert (done.returncode, done.stderr) == (0, "")
    said = rf"the compiled extension {folder}\S+_C\S+ does not load, it was built for .* \(.+\): rebuild with"
    assert re.search(rf"^  cpu: not available: {said}", done.stdout, re.MULTILINE)
    code = (
        "import torch, msam_kernels\n"
        "for _ in range(2): msam_kernels.SAM([torch.ones(2, requires_grad=True)], torch.optim.SGD, lr=0.1)"
    )
    done = python("-c", code, folder=folder)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(said, done.stderr)) == 1
    assert "RuntimeWarning: backend 'reference'" in done.stderr
    for library in (ROOT / "msam_kernels").glob("_stable.*"):
        shutil.copy(library, folder / "msam_kernels")
        done = python("-c", code, folder=folder)
        assert done.returncode == 0, done.stderr
        assert (
            len(re.findall(f"RuntimeWarning: .* stable ABI, which is slower on small models, as {said}", done.stderr))
            == 1
        )


def test_info_is_what_a_bug_report_needs():
    done = python("-m", "msam_kernels", "info", MSAM_TEST_DEVICE="cpu")
    assert (done.returncode, done.stderr) == (0, "")
    for line in (
        rf"msam_kernels {re.escape(msam_kernels.__version__)} in \S+(, commit \S+)?",
        rf"torch {re.escape(torch.__version__)}, \d+ threads, (no CUDA|CUDA .*|HIP .*)",
        rf"processor: {torch.backends.cpu.get_cpu_capability()} as torch sees it",
        r"frameworks: .*numpy \S+.*" if find_spec("numpy") else r"frameworks: .*",
        r"environment: .*MSAM_TEST_DEVICE=cpu.*",
    ):
        assert re.search(f"^{line}$", done.stdout, re.MULTILINE), line


def test_info_in_a_clone_says_that_python_imports_the_clone(tmp_path, monkeypatch, capsys):
    installed = tmp_path / "msam_kernels"
    installed.mkdir()
    (installed / "__init__.py").write_text("")
    (tmp_path / "msam_kernels-0.1.0.dist-info").mkdir()
    (tmp_path / "msam_kernels-0.1.0.dist-info" / "METADATA").write_text("Name: msam_kernels\nVersion: 0.1.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    cli.main(["info"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Python imports"))
    assert f"the clone in {ROOT}, " in line
    assert f"not what was installed in {installed}: run from another folder, or build the clone with" in line
    monkeypatch.setattr(cli, "ROOT", tmp_path)  # no clone
    cli.main(["info"])
    assert "Python imports" not in capsys.readouterr().out


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout whose script only reports what it was called with."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "neighbour_of_script.py").write_text("ANSWER = 42\n")
    (tmp_path / "scripts" / "script_of_test_cli.py").write_text(
        "import sys\n"
        "import neighbour_of_script\n"
        "def main(argv):\n"
        "    print(argv, sys.argv, neighbour_of_script.ANSWER)\n"
        "    return 7\n"
    )
    script = Path("scripts", "script_of_test_cli.py")
    monkeypatch.setattr(cli, "SCRIPTS", {"bench": script, "demo": script, "rho": script})
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    return tmp_path


@pytest.mark.parametrize("command", ["bench", "demo", "rho"])
@pytest.mark.parametrize("options", [[], ["--quick", "x", "--", "--help"], ["--help"]])
def test_scripts_get_their_options(command, options, checkout, capsys):
    assert cli.main([command, *options]) == 7
    assert capsys.readouterr().out == f"{options} {[f'python -m msam_kernels {command}', *options]} 42\n"


@pytest.mark.parametrize("command", ["bench", "demo", "rho"])
def test_scripts_need_a_checkout(command, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=rf"{command}.* runs .*\.py of a source checkout.*clone") as stop:
        cli.main([command])
    assert "\n" not in stop.value.code


@pytest.mark.parametrize(
    "command", ["rho", *(pytest.param(c, marks=pytest.mark.exhaustive) for c in ("bench", "demo"))]
)
def test_scripts_answer_help(command):
    done = python("-m", "msam_kernels", command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python -m msam_kernels {command} ")
    assert "--quick" in done.stdout


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["info", "more"]])
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m msam_kernels")


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"msam_kernels {msam_kernels.__version__}\n"


# The build. `build_ext` without --inplace, into a directory of the test's own: this checkout's extension stays.


def build(tmp_path, code: str = "pass", **environment: str) -> subprocess.CompletedProcess:
    argv = ["setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    code = f"import runpy, sys; sys.argv = {argv}; {code}; runpy.run_path('setup.py', run_name='__main__')"
    return python("-c", code, **environment)


def test_what_is_packaged_is_complete(tmp_path):
    """The files that a wheel is made of, and the archive of the sources."""
    folder = str(tmp_path)
    commands = [
        *("egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder),
        *("build", "--build-base", folder, "--build-lib", str(tmp_path / "lib")),
    ]
    done = python("setup.py", "-q", *commands, MSAM_KERNELS_CPP="0")
    assert done.returncode == 0, done.stderr
    package = ROOT / "msam_kernels"
    files = {p.relative_to(ROOT) for p in package.rglob("*") if p.suffix in (".py", ".typed")}
    assert {Path("msam_kernels", *name) for name in (("py.typed",), ("backends", "reference.py"))} <= files
    assert {p.relative_to(tmp_path / "lib") for p in (tmp_path / "lib").rglob("*") if p.is_file()} == files
    files |= {p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        names = {Path(*Path(name).parts[1:]) for name in sources.getnames()}
    assert files <= names
    assert {Path(name) for name in ("setup.py", "LICENSE", ".ci/run", "tests/test_cli.py")} <= names


def test_build_without_torch_is_one_sentence(tmp_path):
    done = build(tmp_path, "sys.modules['torch'] = None")
    assert done.returncode == 1
    assert re.fullmatch(r"msam_kernels: torch is missing, .*pip install torch==.*--no-build-isolation.*\n", done.stderr)


def test_build_with_an_old_torch_is_one_sentence(tmp_path):
    done = build(tmp_path, "import torch; torch.__version__ = '2.5.1+cpu'")
    assert done.returncode == 1
    assert re.fullmatch(r"msam_kernels: torch is 2\.5\.1\+cpu, .*pip install.*\n", done.stderr)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"MSAM_KERNELS_CPP": "0"}, "MSAM_KERNELS_CPP=0"), ({"MSAM_KERNELS_CPP": ""}, "no C++ compiler was found")],
)
def test_build_without_compiler_is_pure_python(tmp_path, environment, reason):
    done = build(tmp_path, CXX="", PATH=str(tmp_path), **environment)
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    assert line.startswith(
        f"msam_kernels: pure Python (backend 'reference'), without the C++ kernels: {reason}; to get"
    )
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(os.name == "nt", reason="the stand-in compiler is a shell script")
def test_build_with_a_compiler_that_does_not_work_is_pure_python(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'error: unrecognized option -std=c++17' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = build(tmp_path, CXX="", PATH=str(tmp_path), MSAM_KERNELS_CPP="")
    assert done.returncode == 0, done.stderr
    assert "c++ does not compile a C++17 program (error: unrecognized option -std=c++17)" in done.stdout


@pytest.mark.parametrize("environment", [{"MSAM_KERNELS_CPP": "1", "CXX": ""}, {"MSAM_KERNELS_CPP": "", "CXX": "g+++"}])
def test_build_that_was_asked_for_kernels_stops_without_compiler(tmp_path, environment):
    done = build(tmp_path, PATH=str(tmp_path), **environment)
    assert done.returncode == 1
    told = re.sub(r"No CUDA runtime is found.*\n", "", done.stderr)  # by an older torch with CUDA
    assert re.fullmatch(r"msam_kernels: the C\+\+ kernels cannot be built: .*; install a C\+\+17 compiler .*\n", told)


@pytest.mark.usefixtures("extension")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps")
def test_extension_shares_the_openmp_of_torch():
    """A second runtime would mean a second thread pool, which ``torch.set_num_threads`` does not reach."""
    done = python(
        "-c",
        "import re, torch\n"
        "def runtimes():\n"
        "    return sorted(set(re.findall(r'/\\S*lib(?:gomp|omp|iomp)\\S*', open('/proc/self/maps').read())))\n"
        "before = runtimes()\n"
        "from msam_kernels import _C\n"
        "assert before == runtimes(), (before, runtimes())\n"
        "assert before or _C.build_info()['threads'] == 'none'\n",
    )
    assert done.returncode == 0, done.stderr
