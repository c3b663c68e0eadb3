# SPDX-License-Identifier: Apache-2.0
"""Tables and a picture of what was measured on a GPU, from the CSV files that the benchmarks wrote there.

    python benchmarks/gpu_tables.py                                                  # of benchmarks/results/h200-*.csv
    python benchmarks/gpu_tables.py --plot benchmarks/results/h200.png               # and the picture in the README
    python benchmarks/gpu_tables.py build/gpu/*.csv --plot build/gpu/gpu.png         # of a run of `make gpu`

Kernels: the share of the bandwidth that ``copy_`` of 2 GiB reaches in the same run. "plain": the best of some plain kernels
that read and write as many streams, where a sweep over those is among the files. Steps: others' time over ours, SAM by
``step(closure)``. Training: samples per second over the best eager peer.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, str]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]

# What is shown, and which streams it reads and writes; names as the benchmarks have them.
KERNELS = {
    "norm": None,
    "perturb, first": "R2 W2 in place",
    "perturb, later": "R2 W1 in place",
    "ascend": None,
    "restore + sgd": "R3 W2 in place",
    "restore + adamw": "R4 W3 in place",
}
# As they were called at 9e8c072.
FORMER = {"inner_products": "norm", "perturb first": "perturb, first", "perturb later": "perturb, later"}
FORMER |= {"sam": "SAM", "fsam": "F-SAM"}
OURS, PASSES, CAPTURED = "ours", "ours (passes loop)", "ours, captured"
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


IDENTITY = ("shape", "model", "dtype", "pattern", "rank", "policy", "numel", "method", "base", "micro_batches")


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of all files, with today's names; of a measurement that is there twice the later.

    A step has "over_ours", the ratio to ours of the same file: times of two runs may not be compared.
    """
    rows: dict[tuple, Row] = {}
    for path in sorted(paths):
        with path.open(newline="") as file:
            here = [row for row in csv.DictReader(file) if row.get("kind") in ("kernel", "step", "train", "plain")]
        for row in here:
            for key in ("contestant", "method"):
                if key in row:
                    row[key] = FORMER.get(row[key], row[key])
        ours = {case_of(row): float(row["ms"]) for row in of(here, kind="step", contestant=OURS)}
        for row in here:
            if row["kind"] == "step" and case_of(row) in ours:
                row["over_ours"] = repr(float(row["ms"]) / ours[case_of(row)])
            identity = row["kind"], row.get("backend"), row.get("contestant"), *case_of(row)
            rows[identity] = max(rows.get(identity, row), row, key=lambda r: r.get("date", ""))
    return list(rows.values())


def case_of(row: Row) -> tuple[str | None, ...]:
    return tuple(row.get(key) for key in IDENTITY)


def size(numel: str) -> str:
    return f"{int(numel) / 1e6:.1f}M" if int(numel) >= 1e6 else f"{int(numel) / 1e3:.0f}k"


def of(rows: Sequence[Row], **wanted: str) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def number(row: Row | None, key: str) -> float | None:
    return float(row[key]) if row and row.get(key) else None


def distinct(rows: Iterable[Row], *keys: str) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


# -- what is shown -----------------------------------------------------------------------------------------------------

Series = dict[str, list[float | None]]


def kernels(rows: Sequence[Row]) -> tuple[list[str], Series]:
    """Kernels, and their shares of copy_ by what they ran on."""
    rows = [row for row in of(rows, kind="kernel") if row["contestant"] in KERNELS] + of(rows, kind="plain")
    names = [name for name in KERNELS if of(rows, contestant=name)]
    columns = distinct(of(rows, kind="kernel"), "backend", "dtype", "numel")
    columns.sort(key=lambda column: (column[0] != "cuda", column[0], column[1] != "float32", int(column[2])))
    series: Series = {}
    for backend, dtype, numel in columns:
        here = {row["contestant"]: row for row in of(rows, kind="kernel", backend=backend, dtype=dtype, numel=numel)}
        label = f"{size(numel)} {DTYPES[dtype]}" + ("" if backend == "cuda" else f", {backend}")
        series[label] = [number(here.get(name), "share_of_copy") for name in names]
        if backend == "cuda" and dtype == "float32":
            near = [
                row for row in of(rows, kind="plain", rank="best 1") if abs(int(row["numel"]) / int(numel) - 1) < 0.01
            ]
            best = {row["pattern"]: row for row in near}
            values = [number(best.get(KERNELS[name] or ""), "gb_per_s") for name in names]
            copy = number(next(iter(here.values())), "copy_gb_per_s")
            if copy and any(values):
                series[f"{size(numel)} plain kernel"] = [value and value / copy for value in values]
    return names, series


def step_label(row: Row) -> str:
    details = [row["method"], *([row["base"]] if row["base"] != "sgd" else [])]
    details += [DTYPES[row["dtype"]]] if row["dtype"] != "float32" else []
    return f"{row['shape']}, {size(row['numel'])}: {', '.join(details)}, m = {row['micro_batches']}"


def steps(rows: Sequence[Row]) -> tuple[list[Row], Series]:
    """Our rows, one for each case, and everybody's time over ours."""

    def order(row: Row) -> tuple:
        usual = row["dtype"] != "float32", row["method"] != "SAM", row["base"] != "sgd"
        return int(row["numel"]), *usual, int(row["micro_batches"])

    rows = of(rows, kind="step")
    ours = sorted(of(rows, contestant=OURS), key=order)
    over_ours = {(step_label(row), row["contestant"]): number(row, "over_ours") for row in rows}
    series: Series = {name: [] for (name,) in distinct(rows, "contestant") if name != OURS}
    for row in ours:
        for name, values in series.items():
            values.append(over_ours.get((step_label(row), name)))
    return ours, series


def training(rows: Sequence[Row]) -> tuple[list[str], Series]:
    """Cases, and everybody's samples per second over those of the best eager peer."""
    rows = of(rows, kind="train")
    keys = ("model", "base", "micro_batches")
    cases = sorted(distinct(rows, *keys), key=lambda case: (case[1] != "sgd",))
    series: Series = {name: [] for (name,) in distinct(rows, "contestant")}
    for case in cases:
        here = {row["contestant"]: row for row in of(rows, **dict(zip(keys, case, strict=True)))}
        for name, values in series.items():
            values.append(number(here.get(name), "over_eager_peers"))
    return [f"{model}, {base}, m = {count}" for model, base, count in cases], series


def text(rows: Sequence[Row]) -> list[str]:
    """Tables in Markdown of what there is."""
    lines: list[str] = []

    def percent(value: float | None) -> str:
        return f"{value:.0%}" if value else "–"

    def times(value: float | None) -> str:
        return f"{value:#.3g}".rstrip(".") + "x" if value else "–"

    names, series = kernels(rows)
    if names:
        body = [(name, *(percent(values[i]) for values in series.values())) for i, name in enumerate(names)]
        lines += ["", *markdown(("share of `copy_`", *series), body)]
    ours, series = steps(rows)
    if ours:
        body = []
        for i, row in enumerate(ours):
            ms, host, launches = (number(row, key) for key in ("ms", "host_us", "launches"))
            costs = (f"{host:.0f} µs" if host else "–", f"{launches:.3g}" if launches else "–")
            body.append((step_label(row), f"{ms:#.3g} ms", *(times(values[i]) for values in series.values()), *costs))
        lines += ["", *markdown(("step", "ours", *series, "our host time", "launches"), body)]
    labels, series = training(rows)
    if labels:
        body = [(label, *(times(values[i]) for values in series.values())) for i, label in enumerate(labels)]
        lines += ["", *markdown(("training, samples/s", *series), body)]
    return lines


# -- picture -----------------------------------------------------------------------------------------------------------

CAP = 8.0  # times; one that is far off must not flatten the others


def bars(axis, labels: Sequence[str], series: Series, colors: Sequence[str], cap: float, form: str) -> None:
    """A group of bars for each label, one in it for each of the series."""
    width = 0.86 / max(1, len(series))
    for i, ((name, values), color) in enumerate(zip(series.items(), colors, strict=True)):
        at = [j + (i - (len(series) - 1) / 2) * width for j, value in enumerate(values) if value]
        values = [value for value in values if value]
        axis.bar(at, [min(value, cap) for value in values], width * 0.94, color=color, label=name)
        for x, value in zip(at, values, strict=True):
            words = " " + form.format(value) + (" ↑" if value > cap else "")
            axis.text(x, min(value, cap), words, rotation=90, ha="center", va="bottom", fontsize=6.5)
    axis.set_xticks(range(len(labels)), [label.replace(": ", ":\n") for label in labels], fontsize=8)
    axis.margins(x=0.01, y=0.18)
    axis.axhline(1, color="black", linewidth=0.7, linestyle="--", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, ncol=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def plot(rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dark, light, grey = "#1b7f3b", "#7cc494", "#c8c8c8"
    known = {OURS: light, PASSES: light, CAPTURED: dark, "loop": "#b0563a", "foreach": "#d98b5f"}
    known |= {"foreach+fused": "#e8c39e", "compile": "#5b7db1", "pytorch_optimizer": "#9c7fb5"}
    palette = iter(("#1b7f3b", "#4da56c", "#9fd3ae", "#cfe8d6", "#2f5f9e", "#6f97c9", "#aec5e3", "#d3e0f0"))
    names, shares = kernels(rows)
    ours, ratios = steps(rows)
    models, rates = training(rows)
    panels = [
        ("kernels: share of the bandwidth of copy_", names, shares, 1.2, "{:.0%}"),
        ("whole step: times our time, lower is better", [step_label(row) for row in ours], ratios, CAP, "{:.1f}"),
        ("training: samples/s over the best eager peer, higher is better", models, rates, math.inf, "{:.2f}"),
    ]
    panels = [panel for panel in panels if panel[1]]
    figure, axes = plt.subplots(len(panels), 1, figsize=(12, 3.7 * len(panels) + 0.6), squeeze=False)
    for axis, (title, labels, series, cap, form) in zip(axes[:, 0], panels, strict=True):
        of_kernels = labels is names
        colors = [
            (grey if name.endswith("plain kernel") else next(palette, "grey"))
            if of_kernels
            else known.get(name, "grey")
            for name in series
        ]
        bars(axis, labels, series, colors, cap, form)
        axis.set_ylabel(title.replace(": ", ":\n").replace(", ", ",\n"), fontsize=8)
    figure.suptitle(provenance(rows), fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def provenance(rows: Sequence[Row]) -> str:
    """Machine, versions, commits and days."""
    facts = []
    for key, word in (("machine", ""), ("torch", "torch "), ("driver", "driver "), ("commit", "commit "), ("date", "")):
        values = sorted({row[key][:10] if key == "date" else row[key] for row in rows if row.get(key)})
        facts += [word + ", ".join(values)] if values else []
    return "; ".join(facts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("tables", nargs="*", type=Path, help="CSV files (those of benchmarks/results/h200-*)")
    parser.add_argument("--plot", type=Path, help="where the picture goes")
    args = parser.parse_args(argv)
    rows = read(args.tables or RESULTS.glob("h200-*.csv"))
    if not rows:
        raise SystemExit("no measurements of kernels, steps or training in these files")
    print("\n".join([provenance(rows), *text(rows)]))
    if args.plot:
        plot(rows, args.plot)
        print(f"\npicture: {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
