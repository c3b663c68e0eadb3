# SPDX-License-Identifier: Apache-2.0
"""The demo, the family's example and that of rho run from beginning to end."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from msam_kernels import flatness, methods

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo.py"
FAMILY = ROOT / "examples" / "methods.py"
RHO = ROOT / "examples" / "rho.py"
PNG = b"\x89PNG\r\n"


@contextmanager
def loaded(script: Path, name: str) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(name, script)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up there.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="module")
def demo():
    with loaded(DEMO, "demo_under_test") as module:
        yield module


@pytest.fixture(scope="module")
def family():
    with loaded(FAMILY, "family_under_test") as module:
        yield module


@pytest.fixture(scope="module")
def rho():
    with loaded(RHO, "rho_under_test") as module:
        yield module


def quick_run(script: Path, packages: dict[str, str], folder: Path, *more: str) -> list[str]:
    """The printed lines of ``--quick``; pictures are in ``folder``."""
    for package in packages:
        pytest.importorskip(package)
    picture = folder / "picture.png"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # In a process of its own: it seeds, and starts processes that import the script by name.
    run = subprocess.run(
        [sys.executable, str(script), "--quick", "--workers", "2", "--output", str(picture), *more],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.splitlines()


def rows_of(label: str, lines: list[str]) -> list[list[str]]:
    return [line[len(label) :].split() for line in lines if line.startswith(label + "  ")]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_quick_run_prints_a_row_per_contestant_and_task_and_writes_a_picture(demo, tmp_path):
    lines = quick_run(DEMO, demo.PACKAGES, tmp_path)
    assert str(tmp_path / "picture.png") in lines[-1]
    for contestant in demo.CONTESTANTS:
        rows = rows_of(contestant.label, lines)
        assert len(rows) == len(demo.TASKS), contestant.label
        for rho, accuracy, sharpness, step, *_ in rows:
            assert (rho == "–") == (contestant.method is None)
            # Two epochs are enough to be better than a guess among ten classes.
            assert 20 < float(accuracy) <= 100
            assert 0 < float(sharpness) < 1000
            assert float(step) > 0
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_quick_run_of_the_family_prints_a_row_per_method_and_writes_a_picture(family, tmp_path):
    lines = quick_run(FAMILY, family.PACKAGES, tmp_path)
    assert str(tmp_path / "picture.png") in lines[-1]
    steps = replace(family.TASK, epochs=2).steps
    perturbing = {
        "SGD": 0,
        "Momentum-SAM": 0,
        "LookSAM": -(-steps // 5),
        "late-phase SAM": steps - round(family.START * steps),
    }
    for contestant in family.family(steps):
        (row,) = rows_of(contestant.label, lines)
        rho, accuracy, sharpness, passes, step, optimizer = row
        assert (rho == "–") == (contestant.method is None)
        # Chance is 10. The radius of Momentum-SAM is that of a whole training: two epochs have only begun.
        assert (12 if contestant.name == "Momentum-SAM" else 20) < float(accuracy) <= 100
        assert 0 < float(sharpness) < 1000
        expected = 3 if contestant.name == "Bilateral SAM" else 1 + perturbing.get(contestant.name, steps) / steps
        assert float(passes) == pytest.approx(expected, abs=0.005)
        assert 0 < float(optimizer) < float(step)
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_quick_run_of_rho_prints_ranges_and_accuracies_and_writes_pictures_and_a_csv(rho, tmp_path):
    lines = quick_run(RHO, rho.PACKAGES, tmp_path, "--csv", str(tmp_path / "rho.csv"))
    for stage in rho.STAGES:
        rows = [line.split() for line in lines if line.startswith(f"  {stage} ")]
        assert len(rows) == len(rho.TASKS) * 2 * len(rho.METHODS) * len(rho.COUNTS)
    for contestant in rho.contestants(rho.TASKS[0]):
        values = [row[1] for row in rows_of(f"  {contestant.label}", lines) if float(row[0]) == contestant.rho[0]]
        assert len(values) == len(rho.TASKS)
        assert all(0 <= float(value) <= 100 for value in values)
    for number in (1, 2):
        assert str(tmp_path / f"picture-{number}.png") in lines[-1]
        assert (tmp_path / f"picture-{number}.png").read_bytes().startswith(PNG)
    with (tmp_path / "rho.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    swept = [row for row in rows if row["rise"]]
    assert len(swept) == len(rho.TASKS) * len(rho.STAGES) * 2 * len(rho.METHODS) * len(rho.COUNTS) * len(flatness.RHOS)
    assert len(rows) - len(swept) == len(rho.TASKS) * len(rho.contestants(rho.TASKS[0]))
    assert all(row["commit"] and row["torch"] for row in rows)


def test_the_family_has_every_method(family):
    model = family.TASK.build()
    told = [c.method for c in family.family(100) if c.method]
    told = [method if isinstance(method, methods.SAM) else method(model) for method in told]
    assert any(method.only for method in told)
    given = [part for method in told for part in getattr(method, "parts", [method])]
    named = [v for v in vars(methods).values() if isinstance(v, type) and issubclass(v, methods.SAM)]
    assert {type(method) for method in given} == {*named} - {methods.Composition}
    assert len({c.label for c in family.family(100)}) == len(family.family(100))


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no terminal to pretend")
def test_ctrl_c_in_mid_training_stops_it_within_two_seconds_with_one_line(demo, tmp_path):
    for package in demo.PACKAGES:
        pytest.importorskip(package)
    terminal, end = os.openpty()
    words = [sys.executable, str(DEMO), "--workers", "2", "--output", str(tmp_path / "picture.png")]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    run = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=end,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
        text=True,
    )
    os.close(end)
    said = ""
    try:
        while not re.search(r"[1-9]\d*/\d+ epochs", said):  # both processes train by now
            said += os.read(terminal, 1000).decode()
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does, to all of them
        begun = time.monotonic()
        assert run.wait(60) == 130
        seconds = time.monotonic() - begun
        with suppress(OSError):  # the end of a terminal
            while True:
                said += os.read(terminal, 1000).decode()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.stdout.close()
        os.close(terminal)
    assert said.rpartition("\033[K")[2].split() == ["stopped:", "nothing", "was", "written"]
    assert seconds < 2 * max(1.0, os.getloadavg()[0] / os.cpu_count())  # of its own: others may want the cores too
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_the_bar_is_quiet(demo, capsys):
    progress = demo.training.Progress(1000, "epochs")
    for _ in range(1000):
        progress.update()
        progress.say("training")
    progress.clear()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["picture.doc", "picture", "picture.PNGG"])
def test_a_picture_that_cannot_be_written_is_refused_at_the_start(name, demo, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit):
        demo.main(["--output", str(tmp_path / name)])
    assert re.search(rf"--output: \S+{name} must end in one of .*\.png, ", capsys.readouterr().err)


def rows_with(demo, accuracies):
    training = demo.training
    return [
        training.Row(
            contestant,
            [training.Outcome(accuracy + d, 8.0 / (1 + i), 2.0) for d in (-1.0, 1.0)],
            {
                kind: training.Cost(2.0 + i, cost)
                for kind, cost in (("plain", 0.5), ("fused", 0.2))
                if i or kind == "plain"
            },
        )
        for i, (contestant, accuracy) in enumerate(zip(demo.CONTESTANTS, accuracies, strict=False))
    ]


def test_the_picture_says_what_was_found_and_which_side_is_better(demo):
    pytest.importorskip("matplotlib")
    tasks = demo.TASKS
    rows = [rows_with(demo, (75.0, 80.0, 81.5)), rows_with(demo, (99.0, 99.1, 99.0))]
    fig = demo.training.picture(tasks, rows)
    assert fig.get_suptitle() == (
        "mSAM (2) is 6.5 points more accurate than SGD on MNIST-1D, in a minimum 3.0 times as flat, with steps 2.0 times "
        "as long"
    )
    labels = [panel.get_xlabel() for panel in fig.axes]
    assert len(labels) == 8
    assert labels[:4] == labels[4:]
    assert [label.split("   ") for label in labels[:4]] == [
        ["test accuracy, %", "better →"],
        ["← better", "sharpness: top Hessian eigenvalue"],
        ["← better", "a whole step, ms"],
        ["← better", "of that, the optimizer, ms"],
    ]
    drawn = sorted({x for line in fig.axes[2].lines for x in line.get_xdata()})
    assert drawn == [2.0, 3.0, 4.0]
    assert demo.training.message(tasks, [rows_with(demo, (75.0, 74.0))] * 2) == "Nothing here is more accurate than SGD"


def test_missing_packages_are_named_with_the_remedy(demo, monkeypatch):
    monkeypatch.setitem(demo.PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(SystemExit, match="needs no-such-package: run `python -m pip install no-such-package`"):
        demo.main([])


def test_the_family_asks_for_its_own_packages(family, monkeypatch):
    monkeypatch.setitem(family.PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(SystemExit, match=r"needs no-such-package: run .* or `make family`"):
        family.main([])


@pytest.mark.parametrize("option", ["workers", "epochs", "seeds"])
def test_the_family_refuses_numbers_that_mean_nothing(option, family, capsys):
    with pytest.raises(SystemExit):
        family.main([f"--{option}", "0"])
    assert f"--{option} must be at least 1, got 0" in capsys.readouterr().err
