# SPDX-License-Identifier: Apache-2.0
"""Everything that has to be shown on a machine with a CUDA GPU, in parts: build, tests, compute-sanitizer, benchmarks.

    make gpu                                    # all of it; or, without make:
    python3 benchmarks/gpu.py --results build/gpu --parts build test steps
    make gpu BUDGET=840                         # as much of it as 14 minutes hold; with ARGS=--plan, only what that is

It needs no network and no environment of its own: torch, nvcc, ninja, pybind11, pytest and hypothesis are those of the
Python that runs it. Each part is a process with a log in the results folder, ends in its time, and stops no other. The most
telling come first. Checks run side by side where there are cores; benchmarks run alone.

A part has ``--limit`` seconds, or with ``--budget`` its share of what is left of that: the least that it needs, and of the
rest its part by weight. What one does not use goes to those after it; the last are not begun where time for them is lacking.

Benchmarks write their tables after every case, ``summary.md`` and ``parts.csv`` are written whenever a part begins or ends:
what is stopped from outside keeps all but the case at hand. The exit status is 1 if a part failed; running out of a share of
a budget is no failure.

``--prebuilt`` takes an extension that was built elsewhere, see ``prebuilt.py``. ``--rehearse`` runs what a machine without a
GPU can run of each part, in small.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import gpu_tables
import measure
import prebuilt
from measure import Results, print_table

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Those with most tests; the rest is another part.
OPTIMIZER_TESTS = tuple(f"tests/test_{name}.py" for name in ("optimizer", "golden", "conventions"))
FAILED_SANITIZER = 9
# What a rehearsal makes of a benchmark's options.
SMALL = {
    "bench_step.py": ("--micro-batches", "1", "--shapes", "cnn", "--peers", "loop", "--dtype", "float32"),
    "bench_train.py": ("--micro-batches", "1", "--models", "transformer", "--base", "sgd", "--no-compile"),
    "bench_family.py": ("--shape", "cnn"),
    "bench_sweep.py": ("--device", "cpu", "--sizes", "100000"),
    "bench_ascend.py": ("--device", "cpu", "--sizes", "100000", "--dtype", "float32"),
}
EAGER = ("loop", "foreach", "foreach+fused", "pytorch_optimizer")
COMPILED = ("compile", "compile max-autotune", "compile cudagraphs")

SPARE = 10.0  # seconds of a budget for its end: the last part is stopped
GRACE = (6, 2, 1)  # seconds after SIGINT, on which benchmarks and tests say what they have, SIGTERM and SIGKILL


@dataclass
class Part:
    """Commands that run one after the other. ``alone``: nothing may run beside it; else it keeps so many ``cores`` busy.

    ``least``: seconds of a budget without which it is not worth beginning: Python starts, and one case. ``weight``: how many
    more it would like of 14 minutes. A word "{0.7}" of a command stands for that share of the seconds that the command has.
    """

    name: str
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    alone: bool = False
    cores: int = 1
    weight: float = 10.0
    least: float = 20.0


@dataclass
class Outcome:
    verdict: str = "not begun"
    seconds: float = 0.0

    def is_failure(self, in_budget: bool) -> bool:
        """Whoever has a share of a budget may run out of it, or not come to it."""
        return self.verdict.startswith("failed") if in_budget else self.verdict != "passed"


def parts(results: Path, workers: int, rehearse: bool) -> dict[str, Part]:
    """All there are, by name, the most telling first."""
    python = sys.executable
    # pytest-benchmark, where it is installed, would warn of xdist, and warnings are errors.
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    if importlib.util.find_spec("xdist") and workers > 1:
        pytest += ["-n", str(workers)]
    on_gpu = {} if rehearse else {"MSAM_TEST_DEVICE": "cuda"}
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    if rehearse:  # where a GPU would do the work, see that the tests are found
        pytest += ["--collect-only"]

    def checks(name: str, *arguments: str, weight: float = 140, **environment: str) -> Part:
        command = [*pytest, *arguments]
        return Part(name, [command], {**threads, **environment}, cores=workers, weight=weight)

    def bench(script: str, csv: str, *arguments: str) -> list[str]:
        # It ends by itself, a case after its own limit; three peers that never end leave time for the others.
        command = [python, str(ROOT / "benchmarks" / script), "--limit", "{0.7}", "--peer-seconds", "{0.25}"]
        command += ["--csv", str(results / f"{csv}.csv")] if csv else []
        if rehearse:
            return [*command, *arguments, *SMALL[script], "--rounds", "2", "--seconds", "0.05"]
        return [*command, "--device", "cuda", *arguments]

    def steps(csv: str, shapes: str, *arguments: str, method: str = "SAM", peers: Sequence[str] = EAGER):
        options = ("--no-kernels", "--seconds", "1.5", "--shapes", *shapes.split(), "--methods", method)
        return bench("bench_step.py", csv, *options, "--peers", *peers, *arguments)

    def compiled(csv: str, shapes: str, *arguments: str, method: str = "SAM") -> list[str]:
        options = ("--micro-batches", "1", "4", *arguments)
        return steps(csv, shapes, *options, method=method, peers=COMPILED)

    def kernels(backend: str, shapes: str) -> list[str]:
        options = ("--no-steps", "--seconds", "2", "--backend", "cpu" if rehearse else backend)
        dtypes = ("--dtype", "float32", "bfloat16")
        return bench("bench_step.py", f"kernels-{backend}", *options, "--shapes", *shapes.split(), *dtypes)

    def train(csv: str, models: str, base: str, *arguments: str) -> list[str]:
        options = ("--seconds", "2", "--models", *models.split(), "--base", *base.split())
        return bench("bench_train.py", csv, *options, *arguments)

    def timed(name: str, command: list[str], weight: float, **environment: str) -> Part:
        return Part(name, [command], environment, alone=True, weight=weight)

    # What was asked for must not be left out silently.
    wanted = {"MSAM_KERNELS_CPP": "1"} | ({} if rehearse else {"FORCE_CUDA": "1"})
    build = [[python, "setup.py", "-q", "build_ext", "--inplace"], [python, "-m", "msam_kernels", "info"]]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    # Tests look at API errors themselves; torch provokes harmless ones.
    sanitizer = [sanitizer, "--error-exitcode", str(FAILED_SANITIZER), "--print-limit", "20", "--launch-timeout", "300"]
    sanitizer += ["--report-api-errors", "no", "--tool"]
    device = "cpu" if rehearse else "cuda"
    script = [python, "tests/test_gpu.py"]
    all_kernels = [device, "fp32", "bf16"]
    # Each tensor an allocation of its own, so that what lies beyond it belongs to nobody.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **threads}
    rest = [f"--ignore={path}" for path in (*OPTIMIZER_TESTS, "tests/test_gpu.py", "tests/test_graphs.py")]
    # Steps at the largest sizes are measured in turns; fragments must not decide how many fit.
    large = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    ascend = ["--backend", "cpu"] if rehearse else []
    most = "resnet50 transformer350m"
    # What it times is thrown away; what it compiles, the compiler keeps on disk for those who are timed.
    once = ("--peers-only", "--no-memory", "--rounds", "1", "--seconds", "0.1", "--peer-seconds", "{0.6}")
    everything = [
        Part("build", build, wanted, alone=True, weight=100, least=200),
        Part("smoke", [[*script, "--against-cpu", *all_kernels]], threads, alone=True, weight=20),
        timed("kernels", kernels("cuda", "transformer350m resnet18 transformer100m transformer1_3b"), 40),
        timed("sweep", bench("bench_sweep.py", "sweep"), 10),
        timed("steps_small", steps("steps-small", "resnet50 resnet18 vit_b"), 60),
        timed(
            "steps_large",
            steps("steps-large", "transformer350m transformer1_3b", "--micro-batches", "1", "4"),
            40,
            **large,
        ),
        timed("train_sgd", train("train-sgd", "cnn transformer mlp resnet18 vit", "sgd", "--no-compile"), 80),
        timed("steps_fsam", steps("steps-fsam", most, "--micro-batches", "1", method="F-SAM"), 20),
        checks("test", "tests/test_gpu.py", "tests/test_graphs.py", **on_gpu),
        checks("suite_optimizer", "-m", "not host", *OPTIMIZER_TESTS, **on_gpu),
        checks("suite_rest", "-m", "not host", *rest, **on_gpu),
        checks("test_triton", "tests/test_triton.py", **on_gpu),
        *(
            Part(
                f"sanitize_{tool}",
                [[*script, *all_kernels] if rehearse else [*sanitizer, tool, *script, *all_kernels]],
                uncached,
                weight=60,
            )
            for tool in TOOLS
        ),
        Part("steps_warm", [compiled("", most, *once)], cores=4, weight=60),
        timed("kernels_triton", kernels("triton", "transformer350m resnet18"), 30),
        timed("steps_compile", compiled("steps-compile", f"{most} resnet18 vit_b transformer1_3b"), 40),
        timed("kernels_ascend", bench("bench_ascend.py", "ascend", *ascend), 20),
        timed("train_adamw", train("train-adamw", "cnn transformer", "adamw", "--no-compile"), 20),
        timed("family", bench("bench_family.py", "family"), 10),
        timed("train_compile", train("train-compile", "cnn transformer resnet18", "sgd adamw"), 60),
        timed("steps_compile_fsam", compiled("steps-compile-fsam", most, method="F-SAM"), 20),
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


# -- time --------------------------------------------------------------------------------------------------------------

Turn = list[Part]  # what runs side by side


def turns(chosen: Sequence[Part], cores: int) -> list[Turn]:
    """A part that runs alone is a turn; so are checks that follow each other, as many as there are cores for."""
    result: list[Turn] = []
    for part in chosen:
        last = result[-1] if result else []
        beside = last and not (part.alone or last[0].alone)
        if beside and sum(p.cores for p in last) + part.cores <= cores:
            last.append(part)
        else:
            result.append([part])
    return result


def share(left: float, to_come: Sequence[Turn]) -> float:
    """The seconds of the first of the turns ``to_come``, out of those that are left for all of them.

    Everyone gets its least, and of the rest a part by weight. Where there is less than that, the first are served, and the
    others have what those leave.
    """
    leasts, weights = ([max(getattr(p, name) for p in turn) for turn in to_come] for name in ("least", "weight"))
    served = max(1, sum(total <= left for total in itertools.accumulate(leasts)))
    extra = left - sum(leasts[:served])
    return left if extra < 0 else leasts[0] + extra * weights[0] / sum(weights[:served])


def plan(to_come: list[Turn], seconds: float | None, limit: float) -> list[tuple[str, str, str]]:
    """(parts, begin, seconds) of every turn, where each uses all that it has; ``seconds`` of a budget, or the limit."""
    rows, now = [], 0.0
    for i, turn in enumerate(to_come):
        own = limit if seconds is None else share(seconds - now, to_come[i:])
        begun = seconds is None or now < seconds - 1
        names = ", ".join(part.name for part in turn)
        rows.append((names, f"{now:.0f}", f"{own:.0f}") if begun else (names, "–", "what is left"))
        now += own
    return rows


def since_start() -> float:
    """Seconds since this process began, which torch's import took; 0 where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    return age if 0 < age < 60 else 0.0


# -- run ---------------------------------------------------------------------------------------------------------------


class Record:
    """The outcome of every part, on disk as soon as it is known."""

    def __init__(self, to_run: Sequence[Turn], facts: dict[str, object], notes: list[str], results: Path):
        self.outcomes = {part.name: Outcome() for turn in to_run for part in turn}
        self.facts, self.notes, self.results = facts, notes, results
        self.over = threading.Event()  # whoever sets it wants what there is
        self.lock = threading.Lock()
        results.mkdir(parents=True, exist_ok=True)
        for name in self.outcomes:  # an earlier run's is not ours
            self.log(name).unlink(missing_ok=True)

    def log(self, name: str) -> Path:
        return self.results / f"{name}.log"

    def put(self, part: Part, verdict: str, seconds: float = 0.0) -> None:
        with self.lock:
            self.outcomes[part.name] = Outcome(verdict, seconds)
            self.write()

    def write(self) -> None:
        table = Results(self.facts)
        for name, outcome in self.outcomes.items():
            says = in_a_line(self.log(name))
            table.add(part=name, verdict=outcome.verdict, seconds=outcome.seconds, says=says)
        table.write(self.results / "parts.csv")
        lines = [self.text()]
        for name in self.outcomes:
            for section in goals(self.log(name)):
                lines += ["", f"## {name}", "", "```", section, "```"]
        measure.replace(self.results / "summary.md", "\n".join(lines) + "\n")

    def text(self) -> str:
        """To be pasted: where, what became of each part, and what was measured."""
        title = "Rehearsal without a GPU: says nothing of one" if self.facts["device"] == "cpu" else "Results on a GPU"
        rows = [
            (name, o.verdict, f"{o.seconds:.0f} s" if o.seconds else "", in_a_line(self.log(name)))
            for name, o in self.outcomes.items()
        ]
        lines = [f"# {title}", "", ", ".join(f"{k} {v}" for k, v in self.facts.items())]
        lines += ["", *(f"* {note}" for note in self.notes)] if self.notes else []
        lines += ["", *gpu_tables.markdown(("part", "", "time", ""), rows)]
        # Another run may have left files here, of other code.
        same = {key: str(self.facts[key]) for key in ("machine", "commit")}
        rows = gpu_tables.of(gpu_tables.read(self.results.glob("*.csv")), **same)
        return "\n".join([*lines, *gpu_tables.text(rows)])


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").split("\n") if line.strip()]
    return lines[-1].split("\r")[-1][:100] if lines else ""


def stop(process: subprocess.Popen) -> None:
    """With all that it started."""
    for sign, seconds in zip((signal.SIGINT, signal.SIGTERM, signal.SIGKILL), GRACE, strict=True):
        try:
            os.killpg(process.pid, sign)
            process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def with_seconds(command: Sequence[str], seconds: float) -> list[str]:
    """A word "{0.7}" stands for that share of the seconds."""
    return [re.sub(r"^\{([\d.]+)\}$", lambda found: f"{float(found[1]) * seconds:.4g}", word) for word in command]


def run(part: Part, record: Record, limit: float, environment: dict[str, str]) -> None:
    log = record.log(part.name)
    start = reported = time.monotonic()
    verdict = "passed"
    print(f"{part.name}: begun, {limit:.0f} s", flush=True)
    with log.open("w") as file:
        record.put(part, "begun")
        for i, command in enumerate(part.commands):
            own = max(0.0, limit - (time.monotonic() - start)) / (len(part.commands) - i)
            command = with_seconds(command, own)
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
                    if record.over.wait(0.2):
                        verdict = "stopped"
                        break
                    if time.monotonic() - start > limit:
                        verdict = f"ran out of its {limit:.0f} s"
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
    if not verdict.startswith(("passed", "failed")) and re.search(r"\b[1-9]\d* (failed|errors?)\b", in_a_line(log)):
        verdict = f"failed, and {verdict}"
    seconds = time.monotonic() - start
    record.put(part, verdict, seconds)
    print(f"{part.name}: {verdict}, {seconds:.0f} s", flush=True)
    if verdict != "passed":
        tail = log.read_text(errors="replace").rstrip().split("\n")[-15:]
        print("\n".join(f"  | {line[:160]}" for line in tail), flush=True)


def run_all(
    to_run: Sequence[Turn], record: Record, seconds: Callable[[Sequence[Turn]], float], environment: dict[str, str]
) -> None:
    """One turn after the other; ``seconds`` says how many the first of those to come has."""
    for i, turn in enumerate(to_run):
        limit = seconds(to_run[i:])
        if limit < 1 or record.over.is_set():
            break
        with ThreadPoolExecutor(len(turn)) as pool:
            list(pool.map(lambda part, limit=limit: run(part, record, limit, environment), turn))


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
    r"^(\d+ calls of .*)$",
    r"^(msam_kernels: .*)$",
)


def read(log: Path) -> str:
    """Nothing, where there is none yet."""
    return log.read_text(errors="replace") if log.is_file() else ""


def in_a_line(log: Path) -> str:
    text = read(log)
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
    for output in read(log).split("\n$ "):
        start = max(output.find("== goals"), 0) or max(output.find("\n== norm + perturb"), 0)
        if start:
            sections.append(output[start:].strip())
    return sections


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--parts", nargs="*", default=[], help="default: all; `--parts list` names them")
    parser.add_argument("--limit", type=float, default=480, help="seconds for a part (480)")
    parser.add_argument("--budget", type=float, help="seconds for all parts together, instead of --limit")
    parser.add_argument("--plan", action="store_true", help="say how long each part may take, and run none")
    parser.add_argument("--cores", type=int, default=there, help="that checks may keep busy (all that are there)")
    parser.add_argument("--workers", type=int, help="test processes of one part, with pytest-xdist (4, or the cores)")
    parser.add_argument(
        "--prebuilt", type=Path, help="an extension to use instead of building one: a file, folder or wheel"
    )
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels; those that this Python lacks are used, in build/"
    )
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, what can be run there, in small")
    args = parser.parse_args(argv)
    if args.budget is not None and not args.budget >= 60:
        raise SystemExit(f"BUDGET must be at least 60 seconds, got {args.budget:g}")
    results, workers = args.results.resolve(), args.workers or min(4, args.cores)
    known = parts(results, workers, args.rehearse)
    if args.parts == ["list"]:
        print(" ".join(known))
        return 0
    names = [part.name for part in selected(args.parts, known) if not (args.prebuilt and part.name == "build")]
    if args.plan:
        end = None if args.budget is None else args.budget - SPARE - since_start()
        print_table(("parts", "begin", "seconds"), plan(turns([known[n] for n in names], args.cores), end, args.limit))
        return 0
    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit(
            f"a CUDA GPU is needed, and torch {torch.__version__} of {sys.executable} sees none (`nvidia-smi` tells whether "
            "one is there): name another Python with GPU_PYTHON, or rehearse on the CPU with ARGS=--rehearse"
        )
    notes = prebuilt.use(args.prebuilt, ROOT, on_gpu=not args.rehearse) if args.prebuilt else []
    extra = wheels(args.wheels.resolve(), ROOT / "build" / "wheels") if args.wheels else None
    path = [str(ROOT), *([extra] if extra else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    if extra:
        sys.path.append(extra)
        known = parts(results, workers, args.rehearse)  # pytest-xdist may be among them
    facts = {**measure.where(torch.device("cpu" if args.rehearse else "cuda")), "commit": measure.commit()}
    facts["date"] = measure.now()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    # The parts must not disagree because one of them changed a file.
    environment["MSAM_KERNELS_COMMIT"] = str(facts["commit"])
    to_run = turns([known[name] for name in names], args.cores)
    record = Record(to_run, facts, [*notes, *left_out()], results)
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: record.over.set())
    if args.budget is None:
        run_all(to_run, record, lambda to_come: args.limit, environment)
    else:
        end = time.monotonic() + args.budget - SPARE - since_start()
        run_all(to_run, record, lambda to_come: share(end - time.monotonic(), to_come), environment)
    record.write()
    print("\n" + record.text())
    print(f"\nsummary, logs and measurements: {results}")
    in_budget = args.budget is not None and not args.rehearse
    # Without an extension nothing else means anything.
    failures = (outcome.is_failure(in_budget and name != "build") for name, outcome in record.outcomes.items())
    return int(record.over.is_set() or any(failures))


if __name__ == "__main__":
    sys.exit(main())
