# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own machinery, and ``make gpu`` as far as it goes without a GPU."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from msam_kernels import backends, methods
from msam_kernels._torch import is_shared
from plain import PlainSAM

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
@pytest.mark.exhaustive
@pytest.mark.usefixtures("extension")
def test_a_rehearsal_writes_a_summary(tmp_path):
    options = ("--budget", "1800", "--prebuilt", "msam_kernels")
    names = ["smoke", "sanitize_memcheck", "steps_small", "train_sgd", "kernels_ascend"]
    done = gpu("--rehearse", "--results", str(tmp_path), *options, "--parts", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "summary.md").read_text()
    for part in names:
        assert f"| {part} | passed |" in summary
        assert (tmp_path / f"{part}.log").is_file()
    assert "| cnn, 59k: SAM, m = 1 |" in summary
    assert "of unknown sources, for torch" in summary
    for table in ("steps-small.csv", "train-sgd.csv", "ascend.csv", "parts.csv"):
        header, row = (tmp_path / table).read_text().splitlines()[:2]
        assert {"machine", "python", "torch", "commit"} <= set(header.split(","))
        assert f",{torch.__version__}," in row
    assert summary.split("\n## ")[0].strip() in done.stdout
    assert done.stdout.splitlines()[-1].endswith(str(tmp_path))


def test_parts_are_chosen_by_name_or_beginning(load, tmp_path):
    module = load("gpu")
    known = module.parts(tmp_path, 2, False)
    names = [part.name for part in module.selected(["build", "suite", "kernels"], known)]
    assert names == ["build", "kernels", "suite_optimizer", "suite_rest", "kernels_triton", "kernels_ascend"]
    assert module.selected([], known) == list(known.values())
    with pytest.raises(SystemExit, match="no part 'suit'; parts are build, smoke"):
        module.selected(["suit"], known)


@pytest.mark.parametrize("rehearse", [False, True], ids=["on a GPU", "rehearsal"])
def test_every_command_names_files_and_options_that_exist(rehearse, load, tmp_path):
    module = load("gpu")
    for part in module.parts(tmp_path, 2, rehearse).values():
        for command in (module.with_seconds(c, 100) for c in part.commands):
            for word in command:
                if word.startswith("--ignore="):
                    word = word.removeprefix("--ignore=")
                if word.endswith(".py"):
                    assert (ROOT / word).is_file(), word
            script = Path(command[1])
            if script.name.startswith("bench_"):
                args = load(script.stem).parse(command[2:])
                assert args.limit == 70
                assert (args.device.type == "cpu") == rehearse


# ---- make gpu, time --------------------------------------------------------------------------------------------------


def turns_of(module, *weights: float, least: float = 20.0):
    return [[module.Part(str(i), [], weight=w, least=least)] for i, w in enumerate(weights)]


def test_checks_that_follow_each_other_run_side_by_side_where_there_are_cores(load):
    module = load("gpu")
    chosen = [module.Part(n, [], alone=n.isupper(), cores=2 + (n == "d")) for n in "AabcBdCe"]

    def names(cores):
        return ["".join(part.name for part in turn) for turn in module.turns(chosen, cores)]

    assert names(6) == ["A", "abc", "B", "d", "C", "e"]
    assert names(4) == ["A", "ab", "c", "B", "d", "C", "e"]
    assert names(1) == list("AabcBdCe")


@pytest.mark.parametrize("left", [60, 100, 101, 840, 10_000])
def test_a_budget_is_shared_by_weight_after_the_least(left, load):
    module = load("gpu")
    to_come = turns_of(module, 30, 10, 60, 10, 10)
    used = []
    for i in range(len(to_come)):
        used.append(module.share(left - sum(used), to_come[i:]))
    assert sum(used) == pytest.approx(left)
    served = [s for s in used if s > 1e-9]
    assert len(served) == min(5, left // 20)  # the last are those who go without
    assert min(served) >= 20 - 1e-9
    if left == 840:
        assert used == pytest.approx([20 + 740 * w / 120 for w in (30, 10, 60, 10, 10)])


def test_what_a_part_leaves_goes_to_those_after_it_and_what_it_takes_too_much_comes_from_all(load):
    module = load("gpu")
    to_come = turns_of(module, 10, 10, 30)
    assert module.share(160, to_come) == pytest.approx(40)
    assert module.share(150, to_come[1:]) == pytest.approx(20 + 110 / 4)  # the first took 10
    assert module.share(100, to_come[1:]) == pytest.approx(20 + 60 / 4)  # it took 60
    assert module.share(30, to_come[1:]) == 30  # it took 130: the second is served, the third has what that leaves
    assert module.share(12, to_come[2:]) == 12


def test_a_part_that_needs_more_than_others_has_it_first(load):
    module = load("gpu")
    to_come = turns_of(module, 10, least=200) + turns_of(module, 10, 10)
    assert module.share(230, to_come) == pytest.approx(200 + 10 / 2)
    assert module.share(100, to_come) == 100


@pytest.mark.parametrize("cores", [2, 16])
@pytest.mark.parametrize("budget", [60.0, 240.0, 840.0])
def test_the_plan_is_the_whole_budget(budget, cores, load, tmp_path):
    module = load("gpu")
    to_come = module.turns(list(module.parts(tmp_path, min(4, cores), False).values()), cores)
    rows = module.plan(to_come, budget, 480)
    assert sum(float(seconds) for _, _, seconds in rows if seconds != "what is left") == pytest.approx(budget, abs=8)
    assert rows[0][0] == "build"
    assert {name for names, _, _ in rows for name in names.split(", ")} == set(module.parts(tmp_path, 2, False))
    assert all(seconds == "480" for _, _, seconds in module.plan(to_come, None, 480))


def test_840_seconds_hold_every_part_of_a_prebuilt_extension(load, tmp_path):
    """On the machine that ``make gpu`` is planned for, with 16 cores."""
    module = load("gpu")
    chosen = [part for name, part in module.parts(tmp_path, 4, False).items() if name != "build"]
    rows = module.plan(module.turns(chosen, 16), 840 - module.SPARE, 480)
    assert all(float(seconds) >= 25 for _, _, seconds in rows)
    assert rows[0][0] == "smoke"


# ---- make gpu, runs --------------------------------------------------------------------------------------------------

FACTS = {"device": "none", "machine": "none", "commit": "none"}


def python(code: str, name: str = "part", **options):
    return importlib.import_module("gpu").Part(name, [[sys.executable, "-c", code]], **options)


def outcomes(record) -> dict[str, str]:
    return {name: outcome.verdict for name, outcome in record.outcomes.items()}


@pytest.mark.exhaustive  # it waits
def test_a_part_that_fails_or_hangs_stops_no_other(load, tmp_path, capsys):
    module = load("gpu")
    codes = {"fails": "print('words'); raise SystemExit(3)", "hangs": "import time; time.sleep(60)", "passes": ""}
    parts = [python(code, name) for name, code in codes.items()]
    parts.append(module.Part("absent", [["/no/such/tool"]]))
    to_run = module.turns(parts, 4)
    record = module.Record(to_run, FACTS, ["a note"], tmp_path)
    start = time.monotonic()
    module.run_all(to_run, record, lambda to_come: 1.0, dict(os.environ))
    assert time.monotonic() - start < 30
    verdicts = ["failed with status 3", "ran out of its 1 s", "passed", "failed"]
    assert list(outcomes(record).values()) == verdicts
    assert [outcome.is_failure(False) for outcome in record.outcomes.values()] == [True, True, False, True]
    assert [outcome.is_failure(True) for outcome in record.outcomes.values()] == [True, False, False, True]
    assert "words" in (tmp_path / "fails.log").read_text()
    summary = (tmp_path / "summary.md").read_text()
    assert "| fails | failed with status 3 |" in summary
    assert "* a note" in summary
    assert "/no/such/tool" in capsys.readouterr().out


@pytest.mark.exhaustive  # it waits
def test_a_part_that_overruns_leaves_the_others_their_shares(load, tmp_path):
    module = load("gpu")
    parts = [python("import time; time.sleep(60)", name, alone=True, least=0.5) for name in "ab"]
    parts.append(python("print('12 passed in 1s')", "last", alone=True, least=0.5))
    to_run = module.turns(parts, 1)
    record = module.Record(to_run, FACTS, [], tmp_path)
    end = time.monotonic() + 9
    module.run_all(to_run, record, lambda to_come: module.share(end - time.monotonic(), to_come), dict(os.environ))
    assert time.monotonic() < end + 30, "a part had its 60 seconds"
    assert all(verdict.startswith("ran out of its") for verdict in list(outcomes(record).values())[:2])
    assert outcomes(record)["last"] == "passed"


def test_parts_for_which_no_time_is_left_are_not_begun(load, tmp_path):
    module = load("gpu")
    to_run = module.turns([python("", "a", alone=True), python("", "b", alone=True)], 1)
    record = module.Record(to_run, FACTS, [], tmp_path)
    module.run_all(to_run, record, lambda to_come: 30.0 if len(to_come) == 2 else 0.5, dict(os.environ))
    assert outcomes(record) == {"a": "passed", "b": "not begun"}
    assert not record.outcomes["b"].is_failure(True)
    assert record.outcomes["b"].is_failure(False)


INTERRUPTED = """
import time
print("3 failed, 5 passed in 1s" if {failed} else "5 passed in 1s", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("what it has")
"""


@pytest.mark.exhaustive  # it waits
def test_who_runs_out_of_time_can_say_what_it_has_and_failures_stay_failures(load, tmp_path):
    module = load("gpu")
    to_run = [[python(INTERRUPTED.format(failed=name == "red"), name) for name in ("red", "green")]]
    record = module.Record(to_run, FACTS, [], tmp_path)
    module.run_all(to_run, record, lambda to_come: 1.0, dict(os.environ))
    assert all("what it has" in (tmp_path / f"{name}.log").read_text() for name in ("red", "green"))
    assert outcomes(record) == {"red": "failed, and ran out of its 1 s", "green": "ran out of its 1 s"}
    assert [outcome.is_failure(True) for outcome in record.outcomes.values()] == [True, False]


def test_results_are_on_disk_while_the_next_part_runs(load, tmp_path):
    """So whoever kills it then has them: this part looks."""
    module, seen = load("gpu"), tmp_path / "seen"
    look = f"import shutil, sys; shutil.copytree({str(tmp_path / 'results')!r}, {str(seen)!r})"
    to_run = module.turns(
        [python("print('7 passed in 1s')", "a", alone=True), python(look, "b"), python("", "c", alone=True)], 1
    )
    record = module.Record(to_run, FACTS, [], tmp_path / "results")
    module.run_all(to_run, record, lambda to_come: 30.0, dict(os.environ))
    summary = (seen / "summary.md").read_text()
    for line in ("| a | passed | ", "| b | begun |", "| c | not begun |"):
        assert line in summary
    with (seen / "parts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["part"], row["verdict"]) for row in rows] == [("a", "passed"), ("b", "begun"), ("c", "not begun")]
    assert rows[0]["says"] == "7 passed in 1s"


@pytest.mark.exhaustive  # it waits
def test_who_is_asked_to_stop_stops_its_parts_and_begins_no_other(load, tmp_path):
    module = load("gpu")
    to_run = module.turns([python("import time; time.sleep(60)", "a"), python("", "b", alone=True)], 1)
    record = module.Record(to_run, FACTS, [], tmp_path)
    timer = threading.Timer(0.3, record.over.set)
    timer.start()
    start = time.monotonic()
    module.run_all(to_run, record, lambda to_come: 60.0, dict(os.environ))
    assert time.monotonic() - start < 10
    assert outcomes(record) == {"a": "stopped", "b": "not begun"}


def test_a_benchmark_that_is_interrupted_keeps_the_cases_before(load, tmp_path, capsys):
    measure = load("measure")
    args = measure.parser("", seconds=1, rounds=1).parse_args(["--csv", str(tmp_path / "table.csv")])
    results = measure.Results({"machine": "none"})

    def interrupted(say):
        raise KeyboardInterrupt

    def jobs():
        try:
            yield "first", lambda say: results.add(case="first")
            yield "second", interrupted
            yield "third", lambda say: results.add(case="third")
        finally:
            print("a table of what there is")

    failed = measure.run(jobs(), 3, results, args)
    assert failed == ["second"]
    assert measure.conclude(results, args, failed) == 1
    output = capsys.readouterr().out
    assert "a table of what there is" in output
    assert "Interrupted in second" in output
    with (tmp_path / "table.csv").open() as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["first"]


# ---- make gpu, an extension from elsewhere ---------------------------------------------------------------------------

HERE = {"built_with_torch": torch.__version__, "cuda": "13.0 for 9.0"}


@pytest.fixture
def checkout(tmp_path):
    """A checkout in small, without an extension."""
    root = tmp_path / "checkout"
    (root / "msam_kernels").mkdir(parents=True)
    (root / "csrc" / "cpu").mkdir(parents=True)
    (root / "setup.py").write_text("flags")
    (root / "csrc" / "cpu" / "a.cpp").write_text("code")
    return root


@pytest.fixture
def quickly(load, monkeypatch):
    """Without loading the extension in a process of its own: what this one knows."""
    monkeypatch.setattr(load("prebuilt"), "info", lambda file: backends.extension.build_info())


def here(folder: Path) -> Path:
    """The extension of this Python in ``folder``, as a copy."""
    folder.mkdir(parents=True)
    return Path(shutil.copy(backends.extension.__file__, folder))


def used_from(path: Path, file: Path, checkout: Path) -> str:
    (note,) = importlib.import_module("prebuilt").use(path, checkout, on_gpu=False)
    (target,) = (checkout / "msam_kernels").iterdir()
    assert target.name == file.name
    assert target.read_bytes() == file.read_bytes()
    return note


@pytest.mark.usefixtures("extension", "quickly")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_extension_from_elsewhere_is_used(kind, checkout, tmp_path):
    file = here(tmp_path / "elsewhere" / "msam_kernels")
    used_from(file if kind == "file" else tmp_path / "elsewhere", file, checkout)


@pytest.mark.usefixtures("extension", "load")
def test_a_wheel_from_elsewhere_is_used_and_its_extension_says_what_it_is_for(checkout, tmp_path):
    file, wheel = here(tmp_path / "elsewhere"), tmp_path / "msam_kernels-1-cp3-cp3-linux.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, f"msam_kernels/{file.name}")
        archive.writestr("msam_kernels/__init__.py", "raise ImportError")
    assert f"of unknown sources, for torch {torch.__version__}, CUDA " in used_from(wheel, file, checkout)


@pytest.mark.usefixtures("extension", "quickly")
def test_what_was_built_from_other_sources_is_refused(load, checkout, tmp_path):
    prebuilt, file = load("prebuilt"), here(tmp_path / "elsewhere")
    notes = file.parent / prebuilt.NOTES
    notes.write_text(json.dumps({"sources": prebuilt.sources(checkout)}))
    (note,) = prebuilt.use(file.parent, checkout, on_gpu=False)
    assert "of these sources" in note
    (checkout / "msam_kernels" / file.name).unlink()
    (checkout / "csrc" / "cpu" / "a.cpp").write_text("other code")
    with pytest.raises(SystemExit, match=r"was built from other sources than this checkout has: .*make gpu-build"):
        prebuilt.use(file.parent, checkout, on_gpu=False)
    assert not list((checkout / "msam_kernels").iterdir())


def test_what_is_no_extension_for_this_python_is_refused(load, checkout, tmp_path):
    prebuilt, folder = load("prebuilt"), tmp_path / "elsewhere"
    folder.mkdir()

    def refused(path, words):
        with pytest.raises(SystemExit, match=words) as raised:
            prebuilt.use(path, checkout, on_gpu=False)
        assert str(path) in str(raised.value)
        assert "make gpu-build PYTHON=python3." in str(raised.value)
        assert not list((checkout / "msam_kernels").iterdir())

    refused(tmp_path / "absent", "does not exist")
    (tmp_path / "a.whl").write_text("no wheel")
    refused(tmp_path / "a.whl", "is no wheel")
    refused(folder, r"has no extension in it, no _C\.\*\.so")
    (folder / "_C.cpython-27-x86_64-linux-gnu.so").write_text("")
    refused(folder, r"is for another Python \(_C\.cpython-27-")
    (folder / f"_C{EXTENSION_SUFFIXES[0]}").write_text("no library")
    refused(
        folder,
        f"cannot be loaded with torch {re.escape(torch.__version__)} \\(ImportError: .*file too short|invalid ELF",
    )


@pytest.mark.parametrize(
    ("facts", "capability", "words"),
    [
        ({}, (9, 0), None),
        ({"cuda": "none"}, None, None),
        ({"built_with_torch": torch.__version__.split("+")[0] + "+cu999"}, None, None),
        (
            {"built_with_torch": "1.2.3+cu130"},
            None,
            r"is for torch 1\.2\.3\+cu130, and here is " + re.escape(torch.__version__),
        ),
        ({"cuda": "none"}, (9, 0), "has no CUDA kernels"),
        ({"cuda": "12.8 for 9.0"}, (9, 0), r"is for CUDA 12\.8, and torch here for 13\.0"),
        ({}, (8, 0), r"is for compute capability 9\.0, and the GPU here has 8\.0"),
    ],
    ids=["fits", "no GPU", "another build of torch", "another torch", "no CUDA", "another CUDA", "another GPU"],
)
def test_what_does_not_fit_is_said(facts, capability, words, load, monkeypatch):
    prebuilt = load("prebuilt")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if words is None:
        prebuilt.check(Path("x"), HERE | facts, capability)
        return
    with pytest.raises(SystemExit, match=f"^x {words}: build one that fits"):
        prebuilt.check(Path("x"), HERE | facts, capability)


@pytest.mark.parametrize(
    ("targets", "capability", "fits"),
    [
        ("9.0", (9, 0), True),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0+PTX", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("8.0;9.0+PTX", (12, 0), True),
        ("8.0 9.0", (9, 0), True),
        ("Hopper", (9, 0), True),
    ],
)
def test_what_a_gpu_runs(targets, capability, fits, load):
    assert load("prebuilt").serves(targets, capability) == fits


# ---- make gpu, report ------------------------------------------------------------------------------------------------


def test_the_page_about_gpus_has_the_numbers_of_the_files(load):
    """Tables as they are printed, so that new files cannot leave old numbers there."""
    module = load("gpu_tables")
    rows = module.read(module.RESULTS.glob("h200-*.csv"))
    tables = "\n".join(module.text(rows))
    assert tables.count("| ---") > 3
    page = (ROOT / "docs" / "gpu.md").read_text()
    for table in tables.strip().split("\n\n"):
        assert table in page
    assert {row["commit"] for row in rows if "commit" in row} == {"9e8c072"}


def test_tables_have_what_there_is_and_the_later_of_two_measurements(load, tmp_path):
    module, measure = load("gpu_tables"), load("measure")
    for day, ms in ((2, 3.0), (1, 2.0)):
        results = measure.Results({"backend": "cuda", "date": f"2026-01-0{day}"})
        case = {"kind": "step", "shape": "s", "numel": 2_000_000, "dtype": "bfloat16", "method": "SAM", "base": "adamw"}
        case["micro_batches"] = 4
        results.add(contestant="ours", ms=ms, host_us=None, launches=3.0, **case)
        results.add(contestant="loop", ms=6.0, **case)
        results.add(contestant="foreach", ms=1.0, **{**case, "micro_batches": 1})  # ours is missing there
        results.write(tmp_path / f"{day}.csv")
    lines = module.text(module.read(tmp_path.glob("*.csv")))
    assert lines == [
        "",
        "| step | ours | loop | foreach | our host time | launches |",
        "| --- | --- | --- | --- | --- | --- |",
        "| s, 2.0M: SAM, adamw, bf16, m = 4 | 3.00 ms | 2.00x | – | – | 3 |",
    ]


def test_ratios_are_of_one_run(load, tmp_path):
    """The later one has our time, and the earlier one's peer is compared with ours of then."""
    module, measure = load("gpu_tables"), load("measure")
    for day, times in ((1, {"ours": 2.0, "loop": 6.0}), (2, {"ours": 4.0, "compile": 8.0})):
        results = measure.Results({"backend": "cuda", "date": f"2026-01-0{day}"})
        for name, ms in times.items():
            case = {
                "shape": "s",
                "numel": 2_000_000,
                "dtype": "float32",
                "method": "SAM",
                "base": "sgd",
                "micro_batches": 1,
            }
            results.add(kind="step", contestant=name, ms=ms, **case)
        results.write(tmp_path / f"{day}.csv")
    lines = module.text(module.read(tmp_path.glob("*.csv")))
    assert lines[1].startswith("| step | ours | loop | compile |")
    assert lines[3].startswith("| s, 2.0M: SAM, m = 1 | 4.00 ms | 3.00x | 2.00x |")


def test_numbers_of_other_code_in_the_folder_are_not_shown_as_those_of_this_run(load, tmp_path):
    module, measure = load("gpu"), load("measure")
    for commit, ms in (("none", 3.0), ("another", 2.0)):
        results = measure.Results({**FACTS, "commit": commit})
        results.add(
            kind="step",
            shape=commit,
            numel=2_000_000,
            dtype="float32",
            method="SAM",
            base="sgd",
            micro_batches=1,
            contestant="ours",
            ms=ms,
        )
        results.write(tmp_path / f"{commit}.csv")
    text = module.Record([], FACTS, [], tmp_path).text()
    assert "none, 2.0M: SAM, m = 1 | 3.00 ms" in text
    assert "another" not in text


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_picture_can_be_drawn_again(load, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert load("gpu_tables").main(["--plot", str(tmp_path / "picture.png")]) == 0
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    assert "picture: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("...\n==== 312 passed, 4 skipped in 40.1s (0:00:40) ====\n", "312 passed, 4 skipped in 40.1s (0:00:40)"),
        ("20 calls of 2 operators ran\n========= ERROR SUMMARY: 0 errors\n", "ERROR SUMMARY: 0 errors"),
        ("  a  1.2x  1x  reached\n  b  0.5x  1x  not reached\n", "1 of 2 goals reached"),
        ("sgd: 10 variants\n20 calls of 2 operators ran\n", "20 calls of 2 operators ran"),
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
    results = bench.Results({"device": "cuda"})
    results.add(kind="copy", shape="copy", dtype="float32", contestant="copy_", passes=2, gb_per_s=4000.0)
    where = {"shape": "resnet50", "dtype": "float32", "numel": 25_557_032, "tensors": 161}
    case = {**where, "method": "SAM", "base": "sgd"}
    for m, ours in ((1, 0.5), (4, 2.0)):
        for name, ms in (("ours", ours), ("loop", 6.0), ("compile", 1.9)):
            more = {"host_us": 90.0 * m, "launches": 2.0, "device_ms": ms, "iqr_ms": 0.0, "gb_per_s": 2000.0}
            more |= {"extra_over_parameters": 0.0, "deviation": 1e-7}
            results.add(kind="step", contestant=name, micro_batches=m, ms=ms, **more, **case)
    bench.print_shape(results, "resnet50", "float32")
    bench.print_goals(results)
    lines = {line.split("  ")[1]: line for line in capsys.readouterr().out.splitlines() if "reached" in line}
    speed = lines["resnet50: times faster than the best of loop, foreach, pytorch_optimizer"]
    assert "3.00x (float32, SAM, m = 4)" in speed
    assert "not reached" in speed
    assert "0.95x" in lines["resnet50: times faster than the best compiled"]
    assert "360 µs" in lines["resnet50: host time per micro-batch"]
    assert lines["launches per micro-batch"].endswith("≤ 3      reached")


# One case, as short as it can be.
SHORT = ["--shapes", "cnn", "--methods", "SAM", "--micro-batches", "1", "--no-kernels", "--no-memory"]
SHORT += ["--rounds", "1", "--seconds", "0.01"]


@pytest.mark.usefixtures("extension")
def test_nobody_is_timed_where_ours_computes_something_else(load, monkeypatch, capsys):
    bench, peers = load("bench_step"), load("peers")
    monkeypatch.setattr(peers, "EPS", 1e3)  # of the peers; what ours is compared with is one of them
    assert bench.main([*SHORT, "--peers", "loop"]) == 1
    output = capsys.readouterr().out
    assert "cnn, SAM, sgd, 1 micro-batch: ours computes something else, and nobody is timed: " in output
    assert "not timed, for the reasons above: cnn, SAM, sgd, 1 micro-batch" in output


@pytest.mark.usefixtures("extension")
def test_a_peer_that_is_wrong_or_fails_or_takes_too_long_is_left_out_and_the_others_are_timed(
    load, monkeypatch, capsys
):
    bench, peers = load("bench_step"), load("peers")

    class Wrong(peers.Foreach):
        def ascend(self, grads, *, first):
            super().ascend(grads, first=first)
            grads[0].zero_()  # so far so good
            self.params[0].data.add_(1)

        def descent(self, known, grads, closure, first):
            return [g * 2 for g in super().descent(known, grads, closure, first)]

    class Failing(peers.Foreach):
        def ascend(self, grads, *, first):
            raise ArithmeticError("out of numbers\nand more")

    class Endless(peers.Foreach):
        def ascend(self, grads, *, first):
            time.sleep(60)

    changed = {"foreach": Wrong, "foreach+fused": Failing, "compile": Endless}
    monkeypatch.setattr(peers, "PEERS", {**peers.PEERS, **changed})
    assert bench.main([*SHORT, "--peers", "loop", *changed, "--peer-seconds", "1"]) == 0
    output = capsys.readouterr().out
    where = "cnn, SAM, sgd, 1 micro-batch: "
    assert f"{where}foreach computes something else, and is left out: " in output
    assert f"{where}foreach+fused is left out, ArithmeticError: out of numbers\n" in output
    assert f"{where}compile is left out, TimeoutError: did not end within 1 s\n" in output
    rows = [line.split()[0] for line in output.splitlines() if " ± " in line]
    assert {"ours", "loop"} == set(rows)


def test_gradients_belong_to_nobody_else_and_making_them_does_not_count(load):
    """As after a backward pass; whoever keeps them needs no copy."""
    gradients = load("gradients")
    problem = gradients.Gradients([(5, 3), (7,)], torch.float32, torch.device("cpu"))
    params = problem.parameters()
    for kind in (gradients.Backward, gradients.Checked):
        backward = kind(problem, params)
        backward()
        assert not any(is_shared(p.grad) for p in params)
        assert backward.seconds > 0
        for p in params:
            p.grad = None
        backward.prepare(2)
        assert backward.seconds == 0


def test_a_pass_with_gradients_left_is_an_error(load):
    gradients = load("gradients")
    problem = gradients.Gradients([(3,)], torch.float64, torch.device("cpu"))
    backward = gradients.Checked(problem, problem.parameters())
    backward()
    with pytest.raises(RuntimeError, match=r"without clearing p\.grad"):
        backward()


def test_extra_memory_is_what_a_call_allocates_at_a_time(load):
    measure = load("measure")
    before = [torch.ones(1000)]

    def run():
        before.clear()  # what was there before makes no room
        a = torch.ones(500)
        b = a + 1
        del a
        return b + 1

    assert measure.extra_memory(measure.Call(run)) == pytest.approx(4000, abs=64)


def test_every_kernel_is_called_as_the_operators_want_it(load):
    kernels, gradients = load("kernels"), load("gradients")
    problem = gradients.Gradients([(5, 3), (7,), (200, 100)], torch.float32, torch.device("cpu"))
    weights = [w.clone() for w in problem.weights]
    calls = kernels.kernel_calls(problem, "reference")
    for passes, call in calls.values():
        assert 1 <= passes <= 13
        call.prepare(2)
        call()
        call()
    assert all(torch.equal(a, b) for a, b in zip(problem.weights, weights, strict=True))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_checkouts_are_compared(load, tmp_path, capsys):
    compare, table = load("compare"), tmp_path / "compare.csv"
    options = f"--shapes cnn --methods SAM LookSAM --ways passes --rounds 2 --turns 1 --seconds 0.01 --csv {table}"
    assert compare.main([str(ROOT), str(ROOT), *options.split()]) == 0
    assert "cnn (59k), LookSAM, passes, m = 1" in capsys.readouterr().out
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["SAM", "LookSAM"]
    assert all(0.1 < float(row["ratio"]) < 10 for row in rows)


def test_bytes_of_a_step_are_those_of_the_contract(load):
    contest = load("contest")

    def passes(method, m=1, base="sgd", **options):
        return contest.Case("cnn", method, base, torch.float32, m).passes(**options)

    one = {
        "SAM": 10,
        "ASAM": 11,
        "F-SAM": 13,
        "Stable SAM": 11,
        "Bilateral SAM": 17,
        "GSAM": 13,
        "LookSAM": 8.6,
        "LE-SAM": 10,
    }
    one |= {"VaSSO": 13, "WSAM": 11, "Momentum-SAM": 10}
    assert {method: passes(method) for method in one} == one
    assert (passes("Momentum-SAM", 3), passes("Momentum-SAM", 3, passes_loop=True)) == (5 + 3 + 6, 5 + 3 + 5 + 5)
    assert passes("WSAM", passes_loop=True) == passes("SAM", passes_loop=True) + 3 + 3
    assert passes("WSAM", 2) == passes("SAM", 2) + 3 + 4 + 3
    assert passes("SAM-ON") == pytest.approx(5 + 5 * 474 / 58_998)
    assert passes("SAM", base="adamw") == passes("SAM", passes_loop=True) == 12
    assert passes("SAM", 4) == 4 * 4 + 1 + 2 + 5 + 5 + 6


# ---- peers -----------------------------------------------------------------------------------------------------------

SETTINGS = {
    "SAM": {},
    "ASAM": {"eta": 0.01},
    "F-SAM": {"sigma": 0.5, "lmbda": 0.6},
    "Stable SAM": {},
    "Sparse SAM": {},
    "LookSAM": {"k": 2, "alpha": 0.7},
    "Bilateral SAM": {"rho_min": 0.1},
    "GSAM": {"alpha": 0.4},
    "LE-SAM": {"sigma": 0.9},
    "VaSSO": {"theta": 0.4},
    "WSAM": {"gamma": 0.8},
    "Momentum-SAM": {},
    "SAM-ON": {},
}


def walked(make, count: int) -> torch.Tensor:
    """The weights after some steps of what ``make`` makes of a base optimizer's parameters."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((5, 3), (7,))]
    peer = make(params)

    def closure(i):
        loss = sum((1 + i) * (p - 1).square().sum() + (p**4).sum() for p in params)
        loss.backward()
        return loss

    for _ in range(5):
        peer.step([partial(closure, i) for i in range(count)])
    return torch.cat([p.detach().flatten() for p in params])


LISTS = ("foreach", "foreach+fused", "compile", "compile cudagraphs")
KNOWN = [*(("loop", method) for method in SETTINGS), *((name, method) for name in LISTS for method in ("SAM", "F-SAM"))]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("name", "method"), KNOWN)
def test_a_peer_takes_the_steps_of_the_yardstick(name, method, count, load):
    """The compiled ones without the compiler: the fixed accumulator of the one in graphs changes no bit."""
    peers, contest = load("peers"), load("contest")
    kind, settings = peers.PEERS[name], SETTINGS[method]
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-3)
    sparse = method == "Sparse SAM"
    case = contest.Case("cnn", method, "sgd", torch.float64, count)

    def make_peer(params):
        peer = kind(sgd(params, **kind.base_options), rho=0.3, method=method, **settings, **case.special(params))
        if isinstance(peer, peers.Compile):
            peer._run = lambda function, *args: function(*args)
        return peer

    def make_yardstick(params):
        options = {"update_every": 1000} if sparse else dict(settings)
        if method == "SAM-ON":
            options["only"] = params[1:]
        plain = PlainSAM(sgd(params), rho=0.3, method=getattr(methods, contest.FAMILY[method].kind)(**options))
        if sparse:
            plain.mask = dict(zip(params, contest.half(params), strict=True))
        return plain

    torch.testing.assert_close(walked(make_peer, count), walked(make_yardstick, count), rtol=1e-12, atol=1e-12)


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
    assert all(float(row["deviation"]) < 1e-6 for row in rows)


# ---- other benchmarks ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("extension")
def test_what_the_host_does_is_timed_call_by_call(load, tmp_path, capsys):
    bench, table = load("bench_host"), tmp_path / "host.csv"
    small = ["--rounds", "1", "--seconds", "0.001", "--methods", "SAM", "GSAM"]
    assert bench.main([*small, "--micro-batches", "1", "2", "--csv", str(table)]) == 0
    assert "GSAM, passes, m = 2" in capsys.readouterr().out
    with table.open() as file:
        rows = list(csv.DictReader(file))
    calls = {way: {row["call"] for row in rows if row["way"] == way} for way in bench.WAYS}
    every = {*bench.CALLS} - {"free"}
    assert calls == {"closure": every - {"clear"}, "passes": every}
    times = {(row["method"], row["way"], row["micro_batches"], row["call"]): float(row["us"]) for row in rows}
    assert all(us > 0 for us in times.values())
    to_kernel = {key: us for key, us in times.items() if bench.TO_KERNEL in key[-1]}
    assert all(us < times[(*key[:-1], key[-1].removesuffix(bench.TO_KERNEL))] for key, us in to_kernel.items())


def test_the_model_of_the_host_has_the_tensors_of_resnet50(load):
    model = load("bench_host").narrow_resnet(torch.device("cpu"))
    assert len(list(model.parameters())) == 161


@pytest.mark.usefixtures("extension")
def test_one_launch_and_two_take_turns(load, monkeypatch, tmp_path, capsys):
    bench, seen = load("bench_ascend"), []
    ascend = backends.extension.ascend
    counted = SimpleNamespace(norm=backends.extension.norm)
    counted.ascend = lambda *a, arrived, **k: (seen.append(arrived is not None), ascend(*a, arrived=arrived, **k))
    monkeypatch.setattr(backends, "get_backend", lambda *_: counted)
    options = "--device cpu --sizes 6000 60000 --dtype float32 --rounds 1 --seconds 0.01"
    assert bench.main([*options.split(), "--csv", str(tmp_path / "ascend.csv")]) == 0
    assert set(seen) == {True, False}
    with (tmp_path / "ascend.csv").open() as file:
        rows = [(row["numel"], row["way"]) for row in csv.DictReader(file)]
    assert sorted(rows) == [(numel, way) for numel in ("6000", "60000") for way in bench.WAYS]
    assert "two / one" in capsys.readouterr().out


def test_the_sweep_keeps_the_best_of_each_pattern(load, tmp_path, capsys):
    bench = load("bench_sweep")
    options = "--device cpu --sizes 4000 --rounds 1"
    assert bench.main([*options.split(), "--csv", str(tmp_path / "sweep.csv")]) == 0
    with (tmp_path / "sweep.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "plain"]
    assert [(r["pattern"], r["rank"]) for r in rows] == [(p, f"best {k}") for p in bench.PATTERNS for k in (1, 2, 3)]
    assert all(
        float(a["gb_per_s"]) >= float(b["gb_per_s"])
        for a, b in itertools.pairwise(rows)
        if a["pattern"] == b["pattern"]
    )
    wanted = {pattern for pattern in load("gpu_tables").KERNELS.values() if pattern}
    assert wanted <= set(bench.PATTERNS), "the tables look for these"
    assert "loads ahead" in capsys.readouterr().out


def test_the_sweep_refuses_kernels_that_compute_something_else(load):
    bench = load("bench_sweep")

    def one_element_less(streams, *_):
        bench.on_a_cpu(streams)
        streams.outputs[-1][-1] += 1

    with pytest.raises(load("measure").Failed, match=r"R1 W1 apart with 4096 elements, .* computes something else"):
        bench.check(one_element_less, torch.device("cpu"))


# One round: a load, a quotient with a way for unusual numbers, a choice of two ways, a store.
SASS = """LDG.E.128 R4
FCHK P0, R4, R5
@!P0 BRA 0x50
FMUL R4
CALL.REL.NOINC 0x200
@P1 BRA 0x80
MUFU.RCP R6
F2F.F64.F32 R8
STG.E.128 R4
@P2 BRA 0x0"""


def test_the_model_of_kernels_takes_the_longest_ordinary_way_round_the_main_loop(load):
    model = load("kernel_model")
    body = [(16 * i, line) for i, line in enumerate(SASS.splitlines())]
    kernel = model.Kernel(70, [*body, (0xA0, "LDG.E.128 R0"), (0xB0, "@P0 BRA 0xa0")])
    loop = kernel.loop(1, 1)
    assert (loop.instructions, dict(loop.mix), loop.branches) == (8, {"MUFU": 1, "F2F64": 1}, 1)
    assert kernel.resident == 3  # of 72 registers a thread
    with pytest.raises(SystemExit, match="no loop with 2 loads"):
        kernel.loop(2, 1)


@pytest.mark.parametrize(("branches", "slow"), [(0, False), (24, True)], ids=["no branches", "branches"])
def test_the_model_of_kernels_is_bound_by_memory_or_by_what_a_thread_does(branches, slow, load, monkeypatch):
    """354.8M elements in fp32, 1 read and 1 write: 2.8 GB at no more than the sweep's bandwidth."""
    model = load("kernel_model")
    monkeypatch.setattr(model.Kernel, "loop", lambda *_: model.Loop(40, {}, branches))
    p = model.predict(model.Entry(1, 1, "", 1, 1, 1), model.Kernel(64, []), [354_800_000], 4, 4096, False)
    assert p.limit == ("latency" if slow else "memory")
    assert p.blocks == -(-354_800_000 // 4096)
    assert (p.seconds > 8 * 354.8e6 / 3000e9) == slow
    assert p.seconds > 8 * 354.8e6 / 4172e9
