# SPDX-License-Identifier: Apache-2.0
"""What every test shares: the backends under test, a seed, hypothesis profiles."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator
from functools import partial

import hypothesis
import pytest
import torch

from msam_kernels import backends
from plain import BACKENDS, DEVICE

if DEVICE.type == "cpu":  # Triton's kernels are then interpreted; it looks when they are defined, in test_triton.py
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
# The same examples on every run: a red build is then a fact about the commit.
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("default"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Without pytest-timeout, its setting in pyproject.toml is no mistake: there is no limit then."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds for a test; needs pytest-timeout")


# Under this name a report carries what its test compared, from a process of pytest-xdist too.
COVERED = "instruction set"


@pytest.fixture
def covers_instruction_set(record_property) -> Callable[[str], None]:
    """For a test that compares an instruction set's bits with those of baseline: puts its name into the last lines."""
    return partial(record_property, COVERED)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which instruction sets of the CPU kernels the run covered: a processor may lack some."""
    if config.option.collectonly:
        return

    def named(outcome: str) -> list[str]:
        reports = [r for r in terminalreporter.getreports(outcome) if isinstance(r, pytest.TestReport)]
        return sorted({value for r in reports for name, value in r.user_properties if name == COVERED})

    there = backends.available_backends()["cpu"] is None
    whole = backends.extension.build_info()["instruction_set"] if there else "none of them"
    compared = ["baseline", *named("passed")]
    words = [f"whole run as {whole}", "bits compared: " + (", ".join(compared) if compared[1:] else "none")]
    if lacking := named("skipped"):
        words.append("not on this processor: " + ", ".join(lacking))
    terminalreporter.write_line("instruction sets of the CPU kernels: " + "; ".join(words))


def require_extension() -> None:
    """Fail without the compiled kernels. Only who set MSAM_KERNELS_CPP=0, and so asked for no build, gets a skip."""
    missing = backends.available_backends()["cpu"]
    if missing is None:
        return
    if os.environ.get("MSAM_KERNELS_CPP") == "0":
        pytest.skip("MSAM_KERNELS_CPP=0: without the compiled kernels")
    pytest.fail(missing, pytrace=False)


@pytest.fixture(scope="session")
def extension() -> None:
    """For tests of the compiled kernels alone."""
    require_extension()


# What holds for one backend holds for the others as far as their operators agree, which these test; the rest of the suite
# runs on the compiled backends alone, and on the reference where nothing was compiled.
ON_EVERY_BACKEND = {"test_kernels", "test_golden", "test_old_files", "test_methods"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "backend" in metafunc.fixturenames and not any("backend" in names for names in named):
        compiled = [name for name in BACKENDS if name != "reference"]
        if os.environ.get("MSAM_KERNELS_CPP") == "0" and backends.available_backends()["cpu"]:
            compiled = ["reference"]
        names = BACKENDS if metafunc.module.__name__ in ON_EVERY_BACKEND else compiled
        metafunc.parametrize("backend", names, indirect=True, scope="session")


@pytest.fixture
def process_group() -> Iterator[None]:
    """This process alone, for what wants to be distributed."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def backend(request) -> str:
    """A backend, by the name that ``MicroBatchSAM(backend=...)`` takes."""
    if request.param == "cpu":
        require_extension()
    return request.param


def pytest_collection_finish() -> None:
    """Thousands of tests are thousands of objects that live on: the garbage collector need not look at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _device(request) -> Iterator[None]:
    """Tests marked ``host`` are about the CPU, whatever the others run on.

    On a GPU convolutions are torch's own there, which repeat to the bit: cuDNN's add up in orders that change from call to call
    and with the memory format, so that two models that should train alike part by more than the 1e-12 that tests allow.
    """
    if DEVICE.type == "cpu" or request.node.get_closest_marker("host") is not None:
        yield
        return
    torch.set_default_device(DEVICE)
    with torch.backends.cudnn.flags(enabled=False):
        yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    if DEVICE.type == "cpu":
        torch.default_generator.manual_seed(0)  # torch.manual_seed takes 2 ms to note who called it, for GPUs to come
    else:
        torch.manual_seed(0)
