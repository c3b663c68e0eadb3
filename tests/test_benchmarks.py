# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own machinery, and ``make gpu`` as far as it goes without a GPU."""

from __future__ import annotations

import csv
import importlib
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """The benchmark of a name, as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def gpu(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS / "gpu.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


# ---- make gpu --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_is_one_sentence(tmp_path):
    done = gpu("--results", str(tmp_path / "results"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "a CUDA GPU is needed" in done.stderr
    assert "GPU_PYTHON" in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_a_rehearsal_writes_a_summary(tmp_path):
    done = gpu("--rehearse", "--results", str(tmp_path), "--parts", "sanitize_memcheck", "steps_small", "train_sgd")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "summary.md").read_text()
    for part in ("sanitize_memcheck", "steps_small", "train_sgd"):
        assert f"| {part} | passed |" in summary
        assert (tmp_path / f"{part}.log").is_file()
    for table in ("steps-small.csv", "train-sgd.csv", "parts.csv"):
        header, row = (tmp_path / table).read_text().splitlines()[:2]
        assert {"machine", "python", "torch", "commit"} <= set(header.split(","))
        assert f",{torch.__version__}," in row
    assert done.stdout.splitlines()[-1].endswith(str(tmp_path))


def test_parts_are_chosen_by_name_or_beginning(load, tmp_path):
    module = load("gpu")
    known = module.parts(tmp_path, 480, 2, False)
    names = [part.name for part in module.selected(["build", "suite", "train"], known)]
    assert names == ["build", "suite_optimizer", "suite_rest", "train_sgd", "train_adamw"]
    assert module.selected([], known) == list(known.values())
    with pytest.raises(SystemExit, match="no part 'suit'; parts are build, test"):
        module.selected(["suit"], known)


def test_every_command_names_files_and_options_that_exist(load, tmp_path):
    module = load("gpu")
    for part in module.parts(tmp_path, 480, 2, False).values():
        for command in part.commands:
            for word in command:
                if word.startswith("--ignore="):
                    word = word.removeprefix("--ignore=")
                if word.endswith(".py"):
                    assert (ROOT / word).is_file(), word
            script = Path(command[1])
            if script.name in ("bench_step.py", "bench_train.py"):
                load(script.stem).parse(command[2:])


def test_a_part_that_fails_or_hangs_stops_no_other(load, tmp_path, capsys):
    module = load("gpu")
    codes = {"fails": "print('words'); raise SystemExit(3)", "hangs": "import time; time.sleep(60)", "passes": ""}
    parts = [module.Part(name, [[sys.executable, "-c", code]]) for name, code in codes.items()]
    parts.append(module.Part("absent", [["/no/such/tool"]]))
    start = time.monotonic()
    outcomes = module.run_all(parts, tmp_path, 2, dict(os.environ), 4)
    assert time.monotonic() - start < 30
    verdicts = ["failed with status 3", "ran out of its 2 s", "passed", "failed"]
    assert [outcome.verdict for outcome in outcomes] == verdicts
    assert [outcome.failed for outcome in outcomes] == [True, True, False, True]
    assert "words" in (tmp_path / "fails.log").read_text()
    module.report(outcomes, {"machine": "none"}, ["a note"], tmp_path)
    assert "| fails | failed with status 3 |" in (tmp_path / "summary.md").read_text()
    assert "/no/such/tool" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("...\n==== 312 passed, 4 skipped in 40.1s (0:00:40) ====\n", "312 passed, 4 skipped in 40.1s (0:00:40)"),
        ("sgd: 10 variants ran\n========= ERROR SUMMARY: 0 errors\n", "ERROR SUMMARY: 0 errors"),
        ("  a  1.2x  1x  reached\n  b  0.5x  1x  not reached\n", "1 of 2 goals reached"),
        ("nothing known\n", ""),
    ],
)
def test_a_log_in_a_line(log, words, load, tmp_path):
    path = tmp_path / "part.log"
    path.write_text(log)
    assert load("gpu").in_a_line(path) == words


# ---- bench_step ------------------------------------------------------------------------------------------------------


def test_shapes_are_those_of_the_networks(load):
    shapes = load("shapes")
    counts = {name: (len(make()), sum(map(math.prod, make()))) for name, make in shapes.SHAPES.items()}
    assert counts["resnet18"] == (62, 11_689_512)
    assert counts["resnet50"] == (161, 25_557_032)
    assert counts["vit_b"] == (152, 86_567_656)
    assert counts["transformer350m"] == (292, 354_823_168)
    assert counts["transformer1_3b"] == (292, 1_315_723_264)


def test_goals_on_a_gpu_name_the_worst_case(load, capsys):
    """A GPU's report, from rows as a GPU would give them."""
    bench = load("bench_step")
    results = bench.Results({"device": "cuda", "contestants": "ours loop compile"})
    results.add(kind="copy", shape="copy", dtype="float32", contestant="copy_", passes=2, gb_per_s=4000.0)
    where = {"shape": "resnet50", "dtype": "float32", "numel": 25_557_032, "tensors": 161}
    case = {**where, "method": "sam", "base": "sgd"}
    for m, ours in ((1, 0.5), (4, 2.0)):
        results.add(kind="assign", contestant="assign", micro_batches=m, ms=0.1, **case)
        for name, ms in (("ours", ours), ("loop", 6.0), ("compile", 1.9)):
            more = {"host_us": 90.0 * m, "launches": 2.0, "device_ms": ms, "iqr_ms": 0.0, "gb_per_s": 2000.0}
            more |= {"extra_over_parameters": 0.0, "deviation": 1e-7}
            results.add(kind="step", contestant=name, micro_batches=m, ms=ms, **more, **case)
    bench.print_shape(results, "resnet50", "float32")
    bench.print_goals(results)
    lines = {line.split("  ")[1]: line for line in capsys.readouterr().out.splitlines() if "reached" in line}
    speed = lines["resnet50: times faster than the best of loop, foreach, pytorch_optimizer"]
    assert "3.00x (float32, sam, m = 4)" in speed
    assert "not reached" in speed
    assert "0.95x" in lines["resnet50: times faster than the best compiled"]
    assert "360 µs" in lines["resnet50: host time per micro-batch"]
    assert lines["launches per micro-batch"].endswith("≤ 3      reached")


@pytest.mark.usefixtures("extension")
def test_a_contestant_that_computes_something_else_is_not_timed(load, monkeypatch, capsys):
    bench, peers = load("bench_step"), load("peers")
    monkeypatch.setattr(peers, "EPS", 1e3)  # of the peers; what they are compared with is one of them
    options = (
        "--shapes cnn --no-kernels --no-memory --rounds 1 --seconds 0.01 --methods sam --peers loop --micro-batches 1"
    )
    assert bench.main(options.split()) == 1
    output = capsys.readouterr().out
    assert "<- too far" in output
    assert "not timed, since contestants do not compute the same: cnn, SAM, sgd, 1 micro-batches" in output


# ---- bench_family ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("extension")
def test_every_method_is_timed_against_its_plain_loop(load, tmp_path, capsys):
    bench, table = load("bench_family"), tmp_path / "family.csv"
    assert bench.main(["--shape", "cnn", "--rounds", "1", "--seconds", "0.01", "--csv", str(table)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {name for name in bench.FAMILY if any(line.strip().startswith(name + "  ") for line in lines)} == {
        *bench.FAMILY
    }
    with table.open() as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "step" and row["contestant"] == "ours"]
    assert [row["method"] for row in rows] == list(bench.FAMILY)
    # No temporary of the size of the parameters.
    assert all(float(row["extra_over_parameters"]) < 0.1 for row in rows)
    assert all(float(row["deviation"]) < 1e-12 for row in rows)


@pytest.mark.usefixtures("extension")
def test_a_method_that_computes_something_else_is_not_timed(load, monkeypatch):
    bench = load("bench_family")
    monkeypatch.setattr(bench, "EPS", 1e3)  # of the loop
    with pytest.raises(
        SystemExit, match=r"SAM: not the same step as the plain loop, and not timed: ours: \S+ of 1e-12"
    ):
        bench.main(["--shape", "cnn", "--rounds", "1", "--seconds", "0.01"])


# ---- other benchmarks ------------------------------------------------------------------------------------------------


def test_the_crossover_is_where_one_launch_stops_to_win(load):
    assert load("bench_ascend").crossover([1, 2, 3, 4], {1: True, 2: True, 3: False, 4: True}.__getitem__) == 2
    assert load("bench_ascend").crossover([1, 2], lambda n: False) == 0


def test_a_peer_in_graphs_takes_the_same_steps(load):
    """On the CPU without graphs: its fixed accumulator, and mode "max-autotune-no-cudagraphs", change no bit."""
    peers = load("peers")
    results = []
    for name in ("foreach", "compile cudagraphs"):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(7))]
        peer = peers.PEERS[name](torch.optim.SGD(params, lr=0.1, momentum=0.9), rho=0.5)
        if name != "foreach":
            peer._run = lambda function, *args: function(*args)  # uncompiled: seconds less

        def closure(params=params):
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            return loss

        for _ in range(3):
            peer.step([closure] * 3)
        results.append([p.detach() for p in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
