# SPDX-License-Identifier: Apache-2.0
"""The demo runs from beginning to end."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo_under_test", DEMO)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.slow
def test_quick_run_prints_a_row_per_contestant_and_task_and_writes_a_picture(demo, tmp_path):
    for package in demo.PACKAGES:
        pytest.importorskip(package)
    picture = tmp_path / "picture.png"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # In a process of its own: it seeds, and starts processes that import the demo by name.
    run = subprocess.run(
        [sys.executable, str(DEMO), "--quick", "--workers", "2", "--output", str(picture)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.splitlines()
    for contestant in demo.CONTESTANTS:
        rows = [line[len(contestant.label) :].split() for line in lines if line.startswith(contestant.label + "  ")]
        assert len(rows) == len(demo.TASKS), contestant.label
        for rho, accuracy, sharpness, step, *_ in rows:
            assert (rho == "–") == (contestant.method is None)
            # Two epochs are enough to be better than a guess among ten classes.
            assert 20 < float(accuracy) <= 100
            assert 0 < float(sharpness) < 1000
            assert float(step) > 0
    assert str(picture) in lines[-1]
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


def test_missing_packages_are_named_with_the_remedy(demo, monkeypatch):
    monkeypatch.setitem(demo.PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(SystemExit, match="needs no-such-package: run `python -m pip install no-such-package`"):
        demo.main([])
