# SPDX-License-Identifier: Apache-2.0
"""Everything that has to be shown on a machine with a CUDA GPU, in parts: build, tests, compute-sanitizer, benchmarks.

    make gpu                                    # all of it; or, without make:
    python3 benchmarks/gpu.py --results build/gpu --parts build test steps

It needs no network and no environment of its own: torch, nvcc, ninja, pybind11, pytest and hypothesis are those of the
Python that runs it. Each part is a process with a log in the results folder, ends within ``--limit`` seconds, and stops
no other. Checks run side by side where there are cores; benchmarks run alone. Last come ``summary.md`` and
``parts.csv`` there, and a short table here. The exit status is 1 if a part failed.

``--rehearse`` runs what a machine without a GPU can run of each part, in small.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import measure
from measure import Results, print_table

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Those with most tests; the rest is another part.
OPTIMIZER_TESTS = tuple(f"tests/test_{name}.py" for name in ("optimizer", "golden", "conventions"))
FAILED_SANITIZER = 9
# What a rehearsal runs of the benchmarks.
SMALL = {
    "bench_step.py": ("--micro-batches", "1", "--shapes", "cnn", "--peers", "loop"),
    "bench_train.py": ("--micro-batches", "1", "--models", "transformer", "--base", "sgd", "--no-compile"),
    "bench_family.py": ("--shape", "cnn"),
}
EAGER = ("loop", "foreach", "foreach+fused", "pytorch_optimizer")


@dataclass
class Part:
    """Commands that run one after the other; ``alone``: nothing may run beside it."""

    name: str
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    alone: bool = False


@dataclass
class Outcome:
    part: Part
    verdict: str
    seconds: float
    log: Path

    @property
    def failed(self) -> bool:
        return self.verdict != "passed"


def parts(results: Path, limit: float, workers: int, rehearse: bool) -> dict[str, Part]:
    python = sys.executable
    # pytest-benchmark, where it is installed, would warn of xdist, and warnings are errors.
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    if importlib.util.find_spec("xdist") and workers > 1:
        pytest += ["-n", str(workers)]
    on_gpu = {} if rehearse else {"MSAM_TEST_DEVICE": "cuda"}
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    if rehearse:  # where a GPU would do the work, see that the tests are found
        pytest += ["--collect-only"]

    def checks(name: str, *arguments: str, **environment: str) -> Part:
        return Part(name, [[*pytest, *arguments]], {**threads, **environment})

    def bench(script: str, csv: str, *arguments: str) -> list[str]:
        # It ends by itself, a case after its own limit: with its table, which a process that is stopped does not print.
        common = ["--limit", f"{0.7 * limit:g}", "--csv", str(results / f"{csv}.csv")]
        if rehearse:
            arguments = SMALL[script]
            common += ["--rounds", "2", "--seconds", "0.05"]
        else:
            common += ["--device", "cuda"]
        return [python, str(ROOT / "benchmarks" / script), *arguments, *common]

    def steps(csv: str, shapes: str, *arguments: str, method: str = "SAM", peers: Sequence[str] = (*EAGER, "compile")):
        options = ("--no-kernels", "--seconds", "1.5", "--shapes", *shapes.split(), "--methods", method)
        return bench("bench_step.py", csv, *options, "--peers", *peers, *arguments)

    def kernels(backend: str, shapes: str) -> list[str]:
        dtypes = ("--dtype", "float32", "bfloat16")
        options = ("--no-steps", "--seconds", "2", "--backend", backend, "--shapes", *shapes.split(), *dtypes)
        return bench("bench_step.py", f"kernels-{backend}", *options)

    def train(csv: str, models: str, base: str) -> list[str]:
        return bench("bench_train.py", csv, "--seconds", "2", "--models", *models.split(), "--base", base)

    # What was asked for must not be left out silently.
    wanted = {"MSAM_KERNELS_CPP": "1"} | ({} if rehearse else {"FORCE_CUDA": "1"})
    build = [[python, "setup.py", "-q", "build_ext", "--inplace"], [python, "-m", "msam_kernels", "info"]]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    # Tests look at API errors themselves; torch provokes harmless ones.
    sanitizer = [sanitizer, "--error-exitcode", str(FAILED_SANITIZER), "--print-limit", "20", "--launch-timeout", "300"]
    sanitizer += ["--report-api-errors", "no", "--tool"]
    all_kernels = [python, "tests/test_gpu.py", "cpu" if rehearse else "cuda", "fp32", "bf16"]
    # Each tensor an allocation of its own, so that what lies beyond it belongs to nobody.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **threads}
    rest = [f"--ignore={path}" for path in (*OPTIMIZER_TESTS, "tests/test_gpu.py", "tests/test_graphs.py")]
    ascend = [python, "benchmarks/bench_ascend.py", "--csv", str(results / "ascend.csv")]
    # Steps at the largest sizes are measured in turns; fragments must not decide how many fit.
    large = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    modes = ("compile", "compile max-autotune", "compile cudagraphs")
    everything = [
        Part("build", build, wanted, alone=True),
        checks("test", "tests/test_gpu.py", "tests/test_graphs.py", **on_gpu),
        checks("test_triton", "tests/test_triton.py", **on_gpu),
        checks("suite_optimizer", "-m", "not host", *OPTIMIZER_TESTS, **on_gpu),
        checks("suite_rest", "-m", "not host", *rest, **on_gpu),
        *(
            Part(f"sanitize_{tool}", [all_kernels if rehearse else [*sanitizer, tool, *all_kernels]], uncached)
            for tool in TOOLS
        ),
        Part(
            "kernels",
            [
                kernels("cpu" if rehearse else "cuda", "resnet18 transformer100m transformer350m transformer1_3b"),
                *([] if rehearse else [kernels("triton", "resnet18 transformer350m"), ascend]),
            ],
            alone=True,
        ),
        Part("steps_small", [steps("steps-small", "resnet18 resnet50 vit_b")], alone=True),
        Part(
            "steps_large",
            [steps("steps-large", "transformer350m transformer1_3b", "--micro-batches", "1", "4")],
            large,
            alone=True,
        ),
        Part(
            "steps_compile",
            [steps("steps-compile", "resnet50 transformer350m", "--micro-batches", "1", "4", peers=modes)],
            alone=True,
        ),
        Part(
            "steps_fsam",
            [steps("steps-fsam", "resnet50 transformer350m", "--micro-batches", "1", method="F-SAM")],
            alone=True,
        ),
        Part("family", [bench("bench_family.py", "family")], alone=True),
        Part("train_sgd", [train("train-sgd", "cnn transformer resnet18", "sgd")], alone=True),
        Part("train_adamw", [train("train-adamw", "cnn transformer", "adamw")], alone=True),
    ]
    return {part.name: part for part in everything}


def selected(names: Sequence[str], known: dict[str, Part]) -> list[Part]:
    """``names`` or what begins with them: "sanitize" is all four tools.

    Raises:
        SystemExit: a name that is none.
    """
    for name in names:
        if not any(known_name == name or known_name.startswith(name + "_") for known_name in known):
            raise SystemExit(f"there is no part {name!r}; parts are {', '.join(known)}, or what several begin with")
    return [part for n, part in known.items() if not names or any(n == x or n.startswith(x + "_") for x in names)]


# -- run ---------------------------------------------------------------------------------------------------------------


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").split("\n") if line.strip()]
    return lines[-1].split("\r")[-1][:100] if lines else ""


def stop(process: subprocess.Popen) -> None:
    """With all that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def run(part: Part, results: Path, limit: float, environment: dict[str, str]) -> Outcome:
    log = results / f"{part.name}.log"
    start = reported = time.monotonic()
    verdict = "passed"
    print(f"{part.name}: begun", flush=True)
    with log.open("w") as file:
        for command in part.commands:
            file.write("$ " + " ".join([*(f"{k}={v}" for k, v in part.environment.items()), *command]) + "\n\n")
            file.flush()
            options = {"cwd": ROOT, "stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
            try:
                process = subprocess.Popen(command, env={**environment, **part.environment}, **options)
            except OSError as error:
                verdict = "failed"
                file.write(f"{error}\n")
                break
            try:
                while process.poll() is None:
                    time.sleep(0.2)
                    if time.monotonic() - start > limit:
                        verdict = f"ran out of its {limit:g} s"
                        break
                    if time.monotonic() - reported > 30:
                        reported = time.monotonic()
                        print(f"{part.name}: {reported - start:.0f} s: {last_line(log)}", flush=True)
            finally:
                stop(process)
            if verdict != "passed":
                break
            if process.returncode:
                verdict = f"failed with status {process.returncode}"
            file.write("\n")
    seconds = time.monotonic() - start
    print(f"{part.name}: {verdict}, {seconds:.0f} s", flush=True)
    if verdict != "passed":
        tail = log.read_text(errors="replace").rstrip().split("\n")[-15:]
        print("\n".join(f"  | {line[:160]}" for line in tail), flush=True)
    return Outcome(part, verdict, seconds, log)


def run_all(chosen: list[Part], results: Path, limit: float, environment: dict, side_by_side: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    waiting: list[Part] = []

    def finish_checks():
        with ThreadPoolExecutor(max(1, side_by_side)) as pool:
            outcomes.extend(pool.map(lambda part: run(part, results, limit, environment), waiting))
        waiting.clear()

    for part in chosen:
        if part.alone:
            finish_checks()
            outcomes.append(run(part, results, limit, environment))
        else:
            waiting.append(part)
    finish_checks()
    return outcomes


def wheels(folder: Path, target: Path) -> str | None:
    """Install those wheels of ``folder`` that this Python lacks into ``target``; the path to put on PYTHONPATH."""
    lacking = [w for w in sorted(folder.glob("*.whl")) if measure.installed(w.name.split("-")[0]) == "not installed"]
    if not lacking:
        return None
    shutil.rmtree(target, ignore_errors=True)
    options = ["-q", "--no-index", "--no-deps", "--no-compile", "--find-links", str(folder), "--target", str(target)]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options, *map(str, lacking)])
    if done.returncode:
        raise SystemExit(f"the wheels in {folder} cannot be installed; leave WHEELS out to go without them")
    print("from wheels: " + ", ".join(w.name for w in lacking))
    return str(target)


def left_out() -> list[str]:
    uses = {
        "pytorch_optimizer": "a peer of the benchmark",
        "xdist": "tests in parallel",
        "pytest_timeout": "a time limit for a single test",
        "hypothesis": "the tests, which fail without",
    }
    return [
        f"{name} is not installed: without {use}" for name, use in uses.items() if not importlib.util.find_spec(name)
    ]


# -- report ------------------------------------------------------------------------------------------------------------

# What a log says in one line, the last match of the first that matches.
WORDS = (
    r"^=* ?(\d+ (?:passed|failed|skipped|error)[^=]*?(?: in [\d.]+s.*?)?)=*$",
    r"^=* ?(.*ERROR SUMMARY: .*|.*RACECHECK SUMMARY: .*)$",
    r"^(\d[\d/]* tests? collected.*)$",
    r"^(msam_kernels: .*)$",
)


def in_a_line(log: Path) -> str:
    text = log.read_text(errors="replace")
    verdicts = re.findall(r"  (not reached|reached)\s*$", text, re.MULTILINE)
    if verdicts:
        return f"{verdicts.count('reached')} of {len(verdicts)} goals reached"
    for pattern in WORDS:
        if found := re.findall(pattern, text, re.MULTILINE):
            return found[-1].strip("= ")[:90]
    return ""


def goals(log: Path) -> list[str]:
    """What the benchmarks of a part have to say about their goals."""
    sections = []
    for output in log.read_text(errors="replace").split("\n$ "):
        start = max(output.find("== goals"), 0) or max(output.find("\n== norm + perturb"), 0)
        if start:
            sections.append(output[start:].strip())
    return sections


def report(outcomes: list[Outcome], facts: dict[str, object], notes: list[str], results: Path) -> None:
    rows = [(o.part.name, o.verdict, f"{o.seconds:.0f} s", in_a_line(o.log)) for o in outcomes]
    table = Results(facts)
    for outcome, (_, _, _, words) in zip(outcomes, rows, strict=True):
        table.add(part=outcome.part.name, verdict=outcome.verdict, seconds=outcome.seconds, says=words)
    table.write(results / "parts.csv")
    title = "Rehearsal without a GPU: says nothing of one" if facts.get("device") == "cpu" else "Results on a GPU"
    lines = [f"# {title}", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items()), ""]
    lines += ["| part | | time | |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines += ["", *(f"* {note}" for note in notes)]
    for outcome in outcomes:
        for section in goals(outcome.log):
            lines += ["", f"## {outcome.part.name}", "", "```", section, "```"]
    (results / "summary.md").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(notes))
    print(", ".join(f"{k} {v}" for k, v in facts.items()) + "\n")
    print_table(("part", "", "time", ""), rows)
    print(f"\nsummary, logs and measurements: {results}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--parts", nargs="*", default=[], help="default: all; `--parts list` names them")
    parser.add_argument("--limit", type=float, default=480, help="seconds for a part (480)")
    parser.add_argument("--side-by-side", type=int, default=max(1, cores // 4), help="checks at a time (cores / 4)")
    parser.add_argument(
        "--workers", type=int, default=min(4, cores), help="test processes of one part, with pytest-xdist"
    )
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels; those that this Python lacks are used, in build/"
    )
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, what can be run there, in small")
    args = parser.parse_args(argv)
    results = args.results.resolve()
    known = parts(results, args.limit, args.workers, args.rehearse)
    if args.parts == ["list"]:
        print(" ".join(known))
        return 0
    names = [part.name for part in selected(args.parts, known)]
    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit(
            f"a CUDA GPU is needed, and torch {torch.__version__} of {sys.executable} sees none (`nvidia-smi` tells whether "
            "one is there): name another Python with GPU_PYTHON, or rehearse on the CPU with ARGS=--rehearse"
        )
    results.mkdir(parents=True, exist_ok=True)
    extra = wheels(args.wheels.resolve(), ROOT / "build" / "wheels") if args.wheels else None
    path = [str(ROOT), *([extra] if extra else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    if extra:
        sys.path.append(extra)
        known = parts(results, args.limit, args.workers, args.rehearse)  # pytest-xdist may be among them
    facts = {**measure.where(torch.device("cpu" if args.rehearse else "cuda")), "commit": measure.commit()}
    facts["date"] = measure.now()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    # The parts must not disagree because one of them changed a file.
    environment["MSAM_KERNELS_COMMIT"] = str(facts["commit"])
    outcomes = run_all([known[name] for name in names], results, args.limit, environment, args.side_by_side)
    report(outcomes, facts, left_out(), results)
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
