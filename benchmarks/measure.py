# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: clocks, contestants in turns, memory and launches of a step, facts, tables and CSV files."""

from __future__ import annotations

import contextlib
import csv
import datetime
import gc
import itertools
import math
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

# -- time --------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds per call of a block of calls. On a GPU the block ends when the device has finished it."""

    def __init__(self, device: torch.device):
        self.device = device

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __call__(self, call: Callable[[], object], count: int) -> float:
        self.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        self.synchronize()
        return (time.perf_counter() - start) / count


class EventClock(Clock):
    """For single kernels on a GPU: device time of each call, with what the previous one left in L2 flushed out."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)

    def before(self) -> None:
        self.flush.zero_()

    def __call__(self, call: Callable[[], object], count: int) -> float:
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


@dataclass(frozen=True)
class Effort:
    """How long to measure: ``seconds`` for a case, within ``rounds``."""

    seconds: float
    rounds: tuple[int, int]
    block: float = 0.02


def interleave(
    calls: dict[str, Callable[[], object]],
    effort: Effort,
    clock: Clock,
    *,
    between: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Timing]:
    """Time all ``calls`` in rounds of shuffled order, in blocks of at least ``effort.block`` seconds."""
    counts, once, cost = {}, {}, {}
    for name, call in calls.items():
        between()
        start = time.perf_counter()
        once[name] = clock(call, 1)
        if once[name] < 10 * effort.block:
            # The first call may have had to set something up.
            start = time.perf_counter()
            once[name] = clock(call, 1)
        # With what the clock does besides.
        cost[name] = time.perf_counter() - start
        counts[name] = max(1, min(500, math.ceil(effort.block / cost[name])))
    low, high = effort.rounds
    rounds = max(low, min(high, int(effort.seconds / sum(cost[name] * counts[name] for name in calls))))
    # What takes long has been timed once already.
    timings = {name: Timing([once[name]] if once[name] >= 10 * effort.block else []) for name in calls}
    shuffle, order = random.Random(0), list(calls)
    for i in range(rounds):
        say(f"round {i + 1}/{rounds}")
        shuffle.shuffle(order)
        for name in order:
            if len(timings[name].seconds) >= rounds:
                continue
            between()
            if counts[name] > 1:
                # The blocks of others left the caches and the interpreter to them.
                calls[name]()
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


# -- memory, launches --------------------------------------------------------------------------------------------------


def extra_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that ``run`` holds at its peak beyond what was held before; -1 where torch does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    try:
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    except AttributeError:
        return -1
    return max(itertools.accumulate(changes), default=0)


@dataclass(frozen=True)
class Work:
    """What a GPU did in one call."""

    launches: float
    seconds: float


LAUNCH = re.compile(r"cu(da)?(Launch(Cooperative)?Kernel|GraphLaunch|Memcpy\w*Async|Memset\w*Async)")


def device_work(run: Callable[[], object], device: torch.device, calls: int = 2) -> Work | None:
    """Launches by the host and time of the kernels, per call; None where the profiler sees nothing."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize(device)
    events = profile.events()
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    if not kernels:
        return None
    # A graph is one launch of many kernels.
    launches = sum(e.device_type == torch.autograd.DeviceType.CPU and bool(LAUNCH.match(e.name)) for e in events)
    seconds = sum(e.time_range.elapsed_us() for e in kernels) / 1e6
    return Work((launches or len(kernels)) / calls, seconds / calls)


def host_seconds(run: Callable[[], object], clock: Clock, seconds: float = 0.3) -> float:
    """Until ``run`` returns, with nothing queued before it: the median."""
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 5 or (len(times) < 200 and time.monotonic() < end):
        clock.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    clock.synchronize()
    return statistics.median(times)


def copy_bandwidth(device: torch.device, numel: int = 1 << 29) -> float:
    """Bytes per second of ``copy_``, read and written, at a size that no cache holds."""
    source = torch.empty(numel, device=device).uniform_()
    target = torch.empty_like(source)
    clock = EventClock(device)
    seconds = Timing([clock(lambda: target.copy_(source), 5) for _ in range(7)]).median
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


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for first, *rest in (header, ["-" * n for n in widths], *rows):
        print("  " + "  ".join([first.ljust(widths[0]), *(c.rjust(n) for c, n in zip(rest, widths[1:], strict=True))]))


class Results:
    """Rows as they go to the CSV, one per measurement."""

    def __init__(self, facts: dict[str, object]):
        self.facts = facts
        self.rows: list[dict] = []
        self.notes: list[str] = []

    def add(self, **row) -> dict:
        self.rows.append(row)
        return row

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def select(self, **wanted) -> list[dict]:
        return [row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())]

    def write(self, path: Path) -> None:
        keys = list(dict.fromkeys(key for row in self.rows for key in row))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*keys, *self.facts])
            writer.writeheader()
            for row in self.rows:
                rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
                writer.writerow({**rounded, **self.facts})


def conclude(results: Results, others: Others, csv: Path | None) -> None:
    """The notes, with one on a machine that was busy, and the file."""
    share = results.facts["others_cpu_share"] = round(others.share(), 3)
    if share > 0.05:
        results.note(
            f"Other processes took {share:.0%} of the processors meanwhile: threads that wait for each other then wait for "
            "those too. Do not quote these numbers; run again on an idle machine."
        )
    if results.notes:
        print("\n" + "\n".join(results.notes))
    if csv:
        results.write(csv)
        print(f"\nmeasurements: {csv}")


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


class TimeLimit:
    """For benchmarks that must end: ``over`` tells when to begin nothing more."""

    def __init__(self, seconds: float | None):
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end
