# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: clocks, contestants in turns, memory and launches of a step, facts, tables, CSV files, runs."""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import datetime
import gc
import io
import math
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # The profiler reports its own start and stop.

Say = Callable[[str], None]  # what is going on, for whoever watches


def silent(text: str) -> None:
    """Nobody watches."""


# -- time --------------------------------------------------------------------------------------------------------------


class Call:
    """What is timed: ``run()``, or what a subclass does."""

    #: At most so many calls can be prepared at a time.
    most = 500
    #: Seconds of the host since ``prepare`` that do not count.
    excluded = 0.0

    def __init__(self, run: Callable[[], object]):
        self.run = run

    def prepare(self, count: int) -> None:
        """Before the time of ``count`` calls begins."""

    def __call__(self) -> None:
        self.run()


class Clock:
    """Seconds per call of a block of calls. On a GPU the block ends when the device has finished it."""

    def __init__(self, device: torch.device):
        self.device = device

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __call__(self, call: Call, count: int = 1) -> float:
        call.prepare(count)
        self.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        self.synchronize()
        return (time.perf_counter() - start - call.excluded) / count

    def host(self, call: Call, seconds: float = 0.3) -> float:
        """Until a call returns, with nothing queued before it: the median."""
        times: list[float] = []
        end = time.monotonic() + seconds
        while len(times) < 5 or (len(times) < 200 and time.monotonic() < end):
            call.prepare(1)
            self.synchronize()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start - call.excluded)
        self.synchronize()
        return statistics.median(times)


class EventClock(Clock):
    """For single kernels on a GPU: device time of each call, with what the previous one left in L2 flushed out."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)

    def before(self) -> None:
        self.flush.zero_()

    def __call__(self, call: Call, count: int = 1) -> float:
        call.prepare(count)
        events = []
        for _ in range(count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.before()
            start.record()
            call()
            end.record()
            events.append((start, end))
        self.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


@dataclass
class Timing:
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        if len(self.seconds) < 3:
            return max(self.seconds) - min(self.seconds)
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low

    def as_row(self) -> dict[str, float]:
        """As it stands in a table of results."""
        return {"ms": self.median * 1e3, "iqr_ms": self.iqr * 1e3, "rounds": len(self.seconds)}


@dataclass(frozen=True)
class Effort:
    """How long to measure: ``seconds`` for a case, within ``rounds``."""

    seconds: float
    rounds: tuple[int, int]
    block: float = 0.02


def interleave(calls: dict[str, Call], effort: Effort, clock: Clock, *, say: Say = silent) -> dict[str, Timing]:
    """Time all ``calls`` in rounds of shuffled order, in blocks of at least ``effort.block`` seconds."""
    counts, once, cost = {}, {}, {}
    with no_collector():
        for name, call in calls.items():
            for _ in range(2):
                start = time.perf_counter()
                once[name] = clock(call)
                cost[name] = time.perf_counter() - start  # with what the clock does besides
                if once[name] >= 10 * effort.block:
                    break  # The first call may have had to set something up; of one this long, that is a small part.
            counts[name] = max(1, min(call.most, math.ceil(effort.block / cost[name])))
        low, high = effort.rounds
        rounds = max(low, min(high, int(effort.seconds / sum(cost[name] * counts[name] for name in calls))))
        # What takes long has been timed once already.
        timings = {name: Timing([once[name]] if once[name] >= 10 * effort.block else []) for name in calls}
        shuffle, order = random.Random(0), list(calls)
        for i in range(rounds):
            say(f"round {i + 1}/{rounds}")
            gc.collect()
            shuffle.shuffle(order)
            for name in order:
                if len(timings[name].seconds) >= rounds:
                    continue
                if counts[name] > 1:
                    clock(calls[name])  # The blocks of others left the caches and the interpreter to them.
                timings[name].seconds.append(clock(calls[name], counts[name]))
    return timings


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """The cycle collector runs between blocks, not within one contestant's."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises ``TimeoutError`` within the block where it takes longer; in the main thread of POSIX systems only."""
    if math.isinf(seconds):
        yield
        return

    error = TimeoutError(f"did not end within {seconds:g} s")
    over = False

    def stop(*_: object) -> None:
        nonlocal over
        over = True
        raise error

    before = signal.signal(signal.SIGALRM, stop)
    # Again and again, for the case that something catches it.
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    except Exception:
        if over:  # whatever became of it on its way
            raise error from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # somebody else's, such as a test's


def keep_freed_memory() -> None:
    """What this process frees it gets again, instead of giving it back to the system: the noise of that is not ours."""
    with contextlib.suppress(OSError, AttributeError):  # glibc has it
        mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


# -- memory, launches --------------------------------------------------------------------------------------------------


def extra_memory(call: Call) -> int:
    """Bytes that a call holds at its peak beyond what was held before; -1 where torch does not tell.

    What was there before, such as gradients made ahead, may be freed meanwhile; it does not make room.
    """
    call.prepare(1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    try:
        events = sorted(_allocations(profile.profiler.kineto_results.experimental_event_tree()))
    except AttributeError:
        return -1
    held: dict[int, int] = {}
    now = most = 0
    for _, address, size in events:
        if size > 0:
            held[address] = size
            now += size
        else:
            now -= held.pop(address, 0)
        most = max(most, now)
    return most


def _allocations(nodes: Sequence) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes) of allocations, and of what is freed with negative bytes."""
    for node in nodes:
        if node.tag == torch._C._profiler._EventType.Allocation:
            yield node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size
        yield from _allocations(node.children)


@dataclass(frozen=True)
class Work:
    """What a GPU did in one call."""

    launches: float
    seconds: float


LAUNCH = re.compile(r"cu(da)?(Launch(Cooperative)?Kernel|GraphLaunch|Memcpy\w*Async|Memset\w*Async)")


def device_work(call: Call, device: torch.device, calls: int = 2) -> Work | None:
    """Launches by the host and time of the kernels, per call; None where the profiler sees nothing."""
    if device.type != "cuda":
        return None
    call.prepare(calls)
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize(device)
    events = profile.events()
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    if not kernels:
        return None
    # A graph is one launch of many kernels.
    launches = sum(e.device_type == torch.autograd.DeviceType.CPU and bool(LAUNCH.match(e.name)) for e in events)
    seconds = sum(e.time_range.elapsed_us() for e in kernels) / 1e6
    return Work((launches or len(kernels)) / calls, seconds / calls)


def copy_bandwidth(device: torch.device, numel: int = 1 << 29) -> float:
    """Bytes per second of ``copy_``, read and written, at a size that no cache holds."""
    source = torch.empty(numel, device=device).uniform_()
    target = torch.empty_like(source)
    clock, call = EventClock(device), Call(lambda: target.copy_(source))
    seconds = Timing([clock(call, 5) for _ in range(7)]).median
    return 2 * source.nbytes / seconds


# -- where -------------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor() or platform.machine()


def commit(checkout: Path | None = None) -> str:
    """Of ``checkout``, or of this one, which ``MSAM_KERNELS_COMMIT`` names where it came without its history."""

    def git(*args):
        folder = checkout or Path(__file__).parent
        return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    if checkout is None and (named := os.environ.get("MSAM_KERNELS_COMMIT")):
        return named
    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


class Others:
    """How much of the processors' time went to other processes since this was made; a busy machine measures nothing."""

    def __init__(self):
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            jiffies = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        user, nice, system, _, _, irq, softirq, steal = (n / os.sysconf("SC_CLK_TCK") for n in jiffies)
        own = os.times()
        mine = own.user + own.system + own.children_user + own.children_system
        return time.monotonic(), user + nice + system + irq + softirq + steal, mine

    def share(self) -> float:
        now = self._now()
        if self.start is None or now is None:
            return math.nan
        elapsed, busy, mine = (b - a for a, b in zip(self.start, now, strict=True))
        return max(0.0, busy - mine) / (elapsed * os.cpu_count())


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def where(device: torch.device) -> dict[str, object]:
    """What numbers depend on, besides the code."""
    facts = {"machine": machine(device), "device": str(device), "threads": torch.get_num_threads()}
    facts |= {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda, "driver": driver(), "triton": installed("triton")}
    return facts


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


# -- print and write ---------------------------------------------------------------------------------------------------


def number(x: float | None, digits: int = 3) -> str:
    """Three significant digits, never scientific: 0.0312, 1.23, 45.6, 789."""
    if x is None or not math.isfinite(x):
        return "–"
    if x == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{x:.{min(decimals, 4)}f}"


def size(numel: int) -> str:
    return f"{numel / 1e6:.1f}M" if numel >= 1e6 else f"{numel / 1e3:.0f}k"


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> tuple[list[str], list[int]]:
    """Lines of a table whose first column is text and whose others are numbers, and the widths of its columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *rest in (header, *rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(rest, widths[1:], strict=True))]
        lines.append(indent + "  ".join(cells))
    return lines, widths


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    (head, *body), widths = table_lines(header, rows, "  ")
    print("\n".join([head, "  " + "  ".join("-" * n for n in widths), *body]))


class Results:
    """Rows as they go to the CSV, one per measurement."""

    def __init__(self, facts: dict[str, object]):
        self.facts = facts
        self.rows: list[dict] = []
        self.notes: list[str] = []
        self.others = Others()

    def add(self, **row) -> dict:
        self.rows.append(row)
        return row

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def select(self, **wanted) -> list[dict]:
        return [row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())]

    def write(self, path: Path) -> None:
        keys = dict.fromkeys([*(key for row in self.rows for key in row), *self.facts])
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(keys))
        writer.writeheader()
        for row in self.rows:
            rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({**rounded, **self.facts})
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, text.getvalue())


def replace(path: Path, text: str) -> None:
    """Write the file at once: whoever is stopped meanwhile leaves the one before."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, newline="")
    unfinished.replace(path)


class Progress:
    """How far a benchmark is: one line on a terminal that is written over, elsewhere a line every ``every`` seconds."""

    def __init__(self, total: int, what: str, every: float = 20.0):
        self.total, self.what, self.every = total, what, every
        self.done, self.begun = 0, time.monotonic()
        self.said = self.begun
        self.terminal = sys.stderr.isatty()

    def say(self, text: str) -> None:
        line = f"{self.done}/{self.total} {self.what}, {time.monotonic() - self.begun:.0f} s: {text}"
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:<{width}}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.said > self.every:
            self.said = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    def update(self) -> None:
        self.done += 1

    def clear(self) -> None:
        """Before anything else is printed."""
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# -- run ---------------------------------------------------------------------------------------------------------------


Job = tuple[str, Callable[[Say], object]]


class Failed(Exception):
    """A case that cannot be measured, for a reason that the message gives."""


def parser(doc: str, *, seconds: float, rounds: int, unit: str = "case") -> argparse.ArgumentParser:
    """With the options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=rounds, help="at most so many")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help=f"time per {unit}; at least five rounds are taken"
    )
    parser.add_argument(
        "--busy", type=int, default=0, help="beside so many processes, each of which wants a core for itself"
    )
    parser.add_argument("--limit", type=float, default=math.inf, help="begin nothing more after so many seconds")
    parser.add_argument(
        "--peer-seconds", type=float, default=120, help="leave a peer out whose first steps take longer"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--backend", default="auto", help="of msam_kernels: auto, cuda, triton, cpu or reference")
    parser.add_argument("--csv", type=Path)
    return parser


def effort(args: argparse.Namespace) -> Effort:
    return Effort(args.seconds, (min(5, args.rounds), args.rounds))


def begin(args: argparse.Namespace, title: str, kind: type[Results] = Results, **facts: object) -> Results:
    """Set torch up, and say what is measured where."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    neighbours = {"busy_neighbours": args.busy} if args.busy else {}
    results = kind({**where(args.device), **neighbours, **facts, "commit": commit(), "date": now()})
    own = results.facts
    print(f"{title}, {own['date'][:10]}, commit {own['commit']}")
    print(f"{own['machine']}; {own['device']}, {own['threads']} threads")
    print(", ".join(f"{k} {v}" for k, v in own.items() if k not in ("machine", "device", "threads", "commit", "date")))
    return results


@contextlib.contextmanager
def busy_neighbours(count: int) -> Iterator[None]:
    """So many processes that do nothing but keep a core busy, the last ones first where cores can be chosen."""
    program = "import os, sys; core = int(sys.argv[1])\nif hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {core})\n"
    program += "parent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"
    cores = sorted(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
    chosen = [str(cores[-1 - i % len(cores)]) for i in range(count)]
    processes = [subprocess.Popen([sys.executable, "-c", program, core]) for core in chosen]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(jobs: Generator[Job, None, None], total: int, results: Results, args: argparse.Namespace) -> list[str]:
    """Run every (name, job) as it comes, write the CSV after each, and return the names of those that failed.

    Who interrupts it gets what there is: the case at hand counts as failed, and those to come are left out.
    """
    progress, end, failed, name = Progress(total, "cases"), time.monotonic() + args.limit, [], "the first case"
    try:
        with busy_neighbours(args.busy):
            for name, job in jobs:
                if time.monotonic() > end:
                    results.note(f"{name} and all that follows is left out, the time limit was reached.")
                    break
                try:
                    job(lambda text, name=name: progress.say(f"{name}: {text}"))
                except Failed as error:
                    progress.clear()
                    print(f"\n{error}", flush=True)
                    failed.append(name)
                gc.collect()
                progress.update()
                progress.clear()
                if args.csv:  # whatever may come
                    results.write(args.csv)
    except KeyboardInterrupt:
        progress.clear()
        results.note(f"Interrupted in {name}; all that follows is left out.")
        failed.append(name)
    jobs.close()
    return failed


def conclude(results: Results, args: argparse.Namespace, failed: Sequence[str] = ()) -> int:
    """The notes, with one on a machine that was busy, and the file; the exit status."""
    share = results.facts["others_cpu_share"] = round(results.others.share(), 3)
    if share > 0.05 and not args.busy:
        results.note(
            f"Other processes took {share:.0%} of the processors meanwhile: threads that wait for each other then wait for "
            "those too. Do not quote these numbers; run again on an idle machine."
        )
    if results.notes:
        print("\n" + "\n".join(results.notes))
    if args.csv:
        results.write(args.csv)
        print(f"\nmeasurements: {args.csv}")
    if failed:
        print("\nnot timed, for the reasons above: " + "; ".join(failed))
    return int(bool(failed))
