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
from functools import partial
from pathlib import Path

import pytest
import torch

from msam_kernels import methods
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
            if script.name in ("bench_step.py", "bench_train.py", "bench_family.py"):
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
        assert 1 <= passes <= 8
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

    one = {"SAM": 10, "ASAM": 11, "F-SAM": 13, "Stable SAM": 11, "Bilateral SAM": 17, "GSAM": 13, "LookSAM": 8.6}
    assert {method: passes(method) for method in one} == one
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

    def make_peer(params):
        mask = {"mask": contest.half(params)} if sparse else {}
        peer = kind(sgd(params, **kind.base_options), rho=0.3, method=method, **settings, **mask)
        if isinstance(peer, peers.Compile):
            peer._run = lambda function, *args: function(*args)
        return peer

    def make_yardstick(params):
        options = {"update_every": 1000} if sparse else settings
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


def test_the_crossover_is_where_one_launch_stops_to_win(load):
    assert load("bench_ascend").crossover([1, 2, 3, 4], {1: True, 2: True, 3: False, 4: True}.__getitem__) == 2
    assert load("bench_ascend").crossover([1, 2], lambda n: False) == 0


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
