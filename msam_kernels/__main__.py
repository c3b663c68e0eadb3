# SPDX-License-Identifier: Apache-2.0
"""``python -m msam_kernels info | bench | demo | rho``."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import __version__, backends

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "bench": Path("benchmarks", "bench_step.py"),
    "demo": Path("examples", "demo.py"),
    "rho": Path("examples", "rho.py"),
}


def info() -> None:
    """Print versions and backends; for a backend that is missing, how to get it."""
    print(f"msam_kernels {__version__} in {Path(__file__).resolve().parent}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"Python {platform.python_version()}, {platform.platform()}")
    print("backends, fastest first:")
    for name, missing in backends.available_backends().items():
        if missing:
            print(f"  {name}: not available: {missing}")
        else:
            print(f"  {name}: available{_facts(name)}")


def _facts(backend: str) -> str:
    if backend != "cpu":
        return ""
    facts = backends.extension.build_info() if backends.extension else {}
    return "".join(f"; {key.replace('_', ' ')}: {value}" for key, value in facts.items())


def run_script(command: str, argv: list[str]) -> int | None:
    """Run a script of the source checkout that this package is imported from."""
    script = ROOT / SCRIPTS[command]
    if not script.is_file():
        sys.exit(
            f"`python -m msam_kernels {command}` runs {SCRIPTS[command].as_posix()} of a source checkout, and {ROOT} is "
            "none: clone the repository and run it there"
        )
    # As for a script: it finds its neighbours, and reads its name and arguments.
    sys.path.insert(0, str(script.parent))
    sys.argv = [f"python -m msam_kernels {command}", *argv]
    status: int | None = importlib.import_module(script.stem).main(argv)
    return status


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command line ``argv``; the exit status is returned."""
    parser = argparse.ArgumentParser(prog="python -m msam_kernels", description="Sharpness-aware training, fused.")
    parser.add_argument("--version", action="version", version=f"msam_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | bench | demo | rho")
    commands.add_parser("info", help="versions, backends, and how to get those that are missing")
    commands.add_parser("bench", help="time the optimizer step against plain PyTorch (bench --help: its options)")
    commands.add_parser("demo", help="train on real data and draw the result (demo --help: its options)")
    commands.add_parser(
        "rho", help="which rho is worth trying on that data, and which was best (rho --help: its options)"
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in SCRIPTS:
        return run_script(argv[0], argv[1:])  # whose options, --help among them, are the script's own
    parser.parse_args(argv)
    info()
    return None


if __name__ == "__main__":
    sys.exit(main())
