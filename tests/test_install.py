# SPDX-License-Identifier: Apache-2.0
"""What is handed out: an archive of the sources, and the wheel that is built of it, where there is only torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parent.parent
USE = """
import torch, msam_kernels
from msam_kernels import backends
p = torch.ones(3, requires_grad=True)
opt = msam_kernels.MicroBatchSAM(torch.optim.SGD([p], lr=0.1), rho=0.5)
opt.step(lambda: p.square().sum().backward())
print(msam_kernels.__version__, backends.extension is not None, [round(x, 4) for x in p.tolist()], msam_kernels.__file__)
"""


def run(*words: object, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """A command outside of the checkout, which it does not see."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MSAM_KERNELS_CPP")}
    env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "MAX_JOBS": "2", **environment}
    return subprocess.run([*map(str, words)], cwd=folder, env=env, capture_output=True, text=True, timeout=1700)


def succeeded(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def needed_by(name: str, found: set[str]) -> set[str]:
    """The distributions that one needs here, itself among them."""
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:  # for another system
        return found
    if distribution.name not in found:
        found.add(distribution.name)
        for requirement in distribution.requires or ():
            if "extra ==" not in requirement:
                needed_by(re.match(r"[\w.-]+", requirement)[0], found)
    return found


def environment_with(folder: Path, *packages: str) -> Path:
    """A new environment that has these packages and what they need, as links to this one's; its Python."""
    succeeded(run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder.parent))
    python = folder / "bin" / "python"
    place = Path(
        succeeded(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder)).strip()
    )
    for name in {needed for package in packages for needed in needed_by(package, set())}:
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (place / top).exists():
                (place / top).symlink_to(distribution.locate_file(top))
    return python


def pip(python: Path, *words: object, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "-m", "pip", "--python", python, *words, folder=folder, **environment)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Iterator[Path]:
    """The archive, made of a copy of what is committed, or of this checkout where that has no git."""
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("sources")
    clone = folder / "clone"
    if (ROOT / ".git").exists() and shutil.which("git"):
        succeeded(run("git", "clone", "-q", ROOT, clone, folder=folder))
    else:
        shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns("build", ".venv", "*.so", "__pycache__"))
    done = run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder, folder=clone, MSAM_KERNELS_CPP="0")
    succeeded(done)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.mark.parametrize(
    ("compiler", "stable"),
    [(False, ""), (True, ""), (True, "1")],
    ids=["without a compiler", "with a compiler", "for every Python"],
)
def test_the_wheel_works_where_there_is_only_torch(compiler, stable, sources, tmp_path):
    """Its version is that of the archive, which has the commit; what it lacks it says once."""
    python = environment_with(tmp_path / "building", "torch", "setuptools", "wheel", "ninja", "pybind11")
    choice = (
        {"MSAM_KERNELS_CPP": "1", "MSAM_KERNELS_STABLE": stable}
        if compiler
        else {"CXX": "", "PATH": str(python.parent)}
    )
    words = ("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, sources)
    succeeded(pip(python, *words, folder=tmp_path, **choice))
    (wheel,) = tmp_path.glob("*.whl")
    version = re.fullmatch(r"msam_kernels-(.+)\.tar\.gz", sources.name)[1]
    assert wheel.name.startswith(f"msam_kernels-{version}-")
    assert compiler != wheel.name.endswith("-none-any.whl")
    assert ("-cp310-abi3-" in wheel.name) == bool(stable)
    names = zipfile.ZipFile(wheel).namelist()
    built = {Path(name).name.split(".")[0] for name in names if name.endswith(".so")}
    assert built == ({"_stable"} if stable else {"_C", "_stable"} if compiler else set())
    assert {name.split("/")[0] for name in names} == {"msam_kernels", f"msam_kernels-{version}.dist-info"}
    assert "msam_kernels/py.typed" in names
    told = zipfile.ZipFile(wheel).read(f"msam_kernels-{version}.dist-info/METADATA").decode()
    needed = re.findall(r"^Requires-Dist: ([^;\n]+)$", told, re.MULTILINE)
    assert needed == ["torch>=2.10" if stable else "torch>=2.6"]
    empty = environment_with(tmp_path / "empty", "torch")
    succeeded(pip(empty, "install", "--no-index", wheel, folder=tmp_path))
    done = run(empty, "-c", USE, folder=tmp_path)
    assert succeeded(done).startswith(f"{version} {compiler} [0.7423, 0.7423, 0.7423] {tmp_path / 'empty'}")
    assert (done.stderr.count("RuntimeWarning: backend 'reference'"), "is missing" in done.stderr) == (
        (0, False) if compiler else (1, True)
    )
    told = succeeded(run(empty, "-m", "msam_kernels", "info", folder=tmp_path))
    assert f"msam_kernels {version} in {tmp_path / 'empty'}" in told
    assert ("  cpu: available" in told) == compiler
    assert "Python imports the clone" not in told


def test_an_isolated_build_meets_the_torch_of_the_environment(sources, tmp_path):
    """``pip install .`` as habit has it: no other torch is fetched."""
    python = environment_with(tmp_path / "environment", "torch")
    done = pip(python, "install", "-v", "--no-deps", sources, folder=tmp_path, MSAM_KERNELS_CPP="0")
    if done.returncode and re.search(
        "No matching distribution found|Could not find a version", done.stdout + done.stderr
    ):
        pytest.skip("the packages that builds need cannot be fetched here")
    assert not re.search(r"(Collecting|Downloading) \S*torch", done.stdout)
    succeeded(done)
    assert "msam_kernels: pure Python" in done.stdout + done.stderr
    assert "[0.7423, 0.7423, 0.7423]" in succeeded(run(python, "-c", USE, folder=tmp_path))


def test_an_isolated_build_without_torch_stops_with_the_sentence_that_helps(sources, tmp_path):
    python = environment_with(tmp_path / "environment")
    done = pip(python, "install", "--no-deps", sources, folder=tmp_path)
    told = done.stdout + done.stderr
    if re.search("No matching distribution found|Could not find a version", told):
        pytest.skip("the packages that builds need cannot be fetched here")
    assert done.returncode != 0
    assert re.search(r"msam_kernels: torch is missing, .*pip install torch==.*--no-build-isolation", told)


def test_the_version_is_that_of_the_commit(sources, tmp_path):
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("no git")
    commit = succeeded(run("git", "rev-parse", "--short=9", "HEAD", folder=ROOT)).strip()
    assert re.fullmatch(rf"msam_kernels-\d+\.\d+\.\d+(\.dev\d+\+g{commit})?\.tar\.gz", sources.name)
    bare = tmp_path / "without git"
    shutil.copytree(sources.parent / "clone", bare, ignore=shutil.ignore_patterns(".git", "*.egg-info"))
    done = run(sys.executable, "setup.py", "-q", "--version", folder=bare, MSAM_KERNELS_CPP="0")
    assert re.search(r"^\d+\.\d+\.\d+$", succeeded(done), re.MULTILINE)
