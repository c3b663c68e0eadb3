# SPDX-License-Identifier: Apache-2.0
"""The pages say what runs, and what was measured."""

from __future__ import annotations

import csv
import itertools
import re
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from msam_kernels import MicroBatchSAM, flatness, methods

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parent.parent
CHOOSING = ROOT / "docs" / "choosing.md"
MEASURED = ROOT / "benchmarks" / "results" / "cpu-zen4-2cores-rho.csv"


#: On the line before a block that one process on a CPU cannot run.
NEEDS = "<!-- needs (?:a GPU|several processes) -->"
BLOCK = re.compile(rf"^({NEEDS}\n)?( *)```python\n(.*?)^\2```", re.MULTILINE | re.DOTALL)
PAGES = [
    ROOT / "README.md",
    *sorted(
        page
        for page in (ROOT / "docs").glob("*.md")
        if "```python" in page.read_text("utf-8") and page.name != "frameworks.md"  # test_frameworks.py runs that
    ),
]


class Model(nn.Sequential):
    """The reader's: with a norm layer, dropout and a head."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))

    @property
    def head(self) -> nn.Module:
        return self[-1]


def names_of_the_reader() -> dict[str, object]:
    torch.manual_seed(0)
    model = Model()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = [(torch.randn(32, 6), torch.randint(3, (32,))) for _ in range(5)]
    x, y = loader[0]
    return {
        **{"torch": torch, "F": F, "itertools": itertools, "clip_grad_norm_": nn.utils.clip_grad_norm_, "tqdm": iter},
        **{"MicroBatchSAM": MicroBatchSAM, "methods": methods, "model": model, "base": base, "loader": loader},
        **{"opt": MicroBatchSAM(base, model=model), "loss_fn": lambda x, y: F.cross_entropy(model(x), y)},
        **{"x": x, "y": y, "epochs": 2, "correct": 0, "running": 0.0},
        **{"scaler": torch.amp.GradScaler("cpu"), "device": "cpu", "folder": "checkpoint"},
    }


def test_no_block_of_code_is_passed_by():
    assert {page.name for page in PAGES} >= {
        "README.md",
        "index.md",
        "choosing.md",
        "family.md",
        "faq.md",
        "parallel.md",
    }
    for page in PAGES:
        text = page.read_text("utf-8")
        assert (
            len(BLOCK.findall(text)) == text.count("```python") == len(re.findall(NEEDS, text)) + len(runnable(page))
        ), page.name


def runnable(page: Path) -> list[str]:
    return [textwrap.dedent(code) for needs, _, code in BLOCK.findall(page.read_text("utf-8")) if not needs]


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable or uninitialized")
@pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated")
@pytest.mark.filterwarnings("error::UserWarning")  # a page shows no mistake
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_every_page_runs(page, tmp_path, monkeypatch):
    """One block after the other, with a model and a loader such as the reader has."""
    if page == CHOOSING:
        pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    names = names_of_the_reader()
    for needs, _, code in BLOCK.findall(page.read_text("utf-8")):
        compiled = compile(textwrap.dedent(code), str(page), "exec")
        if not needs:
            exec(compiled, names)
    if page == CHOOSING:
        assert names["low"] < names["high"]
        assert len(names["sweep"].losses) == 16
        assert (tmp_path / "sweep.png").stat().st_size > 1000


def test_the_readme_is_short_and_its_links_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120
    for page in pages:
        links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text("utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == [], page.name


# ---- figures ---------------------------------------------------------------------------------------------------------


def measured(**wanted: str) -> list[dict[str, str]]:
    with MEASURED.open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[name] == value for name, value in wanted.items())]


def table_of(heading: str) -> list[list[str]]:
    """The rows of the table that has this in its first line."""
    lines = CHOOSING.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|") and heading in line)
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first + 2 :])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def ratios_of(rows: list[dict[str, str]], name: str) -> torch.Tensor:
    return torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)


def sweep_of(**case: str) -> flatness.RhoSweep:
    """As it was measured, of one micro-batch that stands for all."""
    rows = measured(**case)
    assert rows, case
    columns = [ratios_of(rows, name)[:, None] for name in ("rise", "arrived", "along", "moved")]
    one = torch.ones(1, dtype=torch.float64)
    return flatness.RhoSweep(ratios_of(rows, "rho"), float(rows[0]["loss"]) * one, one, *columns)


def test_the_ranges_of_choosing_are_those_of_the_results():
    rows = table_of("rho worth trying")
    assert len(rows) == 12
    for task, weights, method, *cells in rows:
        for cell, (dtype, m) in zip(cells, [("float32", "1"), ("float32", "4"), ("bfloat16", "1")], strict=True):
            low, high = sweep_of(task=task, weights=weights, method=method, dtype=dtype, m=m).worth_trying()
            assert cell == f"{low:g} to {high:g}", (task, weights, method, dtype, m)


def test_the_accuracies_of_choosing_are_those_of_the_results():
    rows = table_of("accuracy on data held out")
    assert len(rows) == 2
    for task, *cells in rows:
        found = measured(task=task, weights="from fresh")
        assert len(found) == len(cells)
        best = max(float(row["accuracy"]) for row in found)
        for cell, row in zip(cells, found, strict=True):
            value = float(row["accuracy"])
            assert cell == (f"**{value:.1f}**" if value == best else f"{value:.1f}")


def test_what_arrives_in_16_bits_is_that_of_the_results():
    rows = table_of("of e that arrives in bf16")
    assert len(rows) == 4
    for task, method, *cells in rows:
        found = sweep_of(task=task, weights="a tenth", method=method, dtype="bfloat16", m="1")
        chosen = [found.rhos.tolist().index(rho) for rho in (0.001, 0.01, 0.1, 1.0)]
        expected = [f"{found.along[r].item():.2f} ({found.moved[r].item():.0%})" for r in chosen]
        assert cells == [text.replace("%", " %") for text in expected], (task, method)
