# SPDX-License-Identifier: Apache-2.0
"""``python -m msam_kernels info | bench | demo | rho``."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, backends

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
SCRIPTS = {
    "bench": Path("benchmarks", "bench_step.py"),
    "demo": Path("examples", "demo.py"),
    "rho": Path("examples", "rho.py"),
}


#: What people train with, by the names that they are installed by.
FRAMEWORKS = (
    "accelerate", "bitsandbytes", "deepspeed", "lightning", "numpy", "peft", "pytorch-lightning", "pytorch_optimizer",
    "safetensors", "timm", "torchao", "transformers", "triton",
)  # fmt: skip


def info() -> None:
    """Print what a bug report needs: versions, devices, frameworks, backends; for one that is missing, how to get it."""
    print(f"msam_kernels {__version__} in {PACKAGE}{_commit()}")
    told = ((name, getattr(torch.version, name.lower(), None)) for name in ("CUDA", "HIP", "XPU"))
    kinds = [f"{name} {version}" for name, version in told if version]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {', '.join(kinds) or 'no CUDA'}")
    print(f"Python {platform.python_version()}, {platform.platform()}")
    print(f"processor: {torch.backends.cpu.get_cpu_capability()} as torch sees it")
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        print(f"GPU {i}: {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}")
    found = [f"{name} {version}" for name in FRAMEWORKS if (version := _installed(name))]
    print(f"frameworks: {', '.join(found) or 'none'}")
    asked = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(("MSAM_", "TRITON_"))]
    if asked:
        print(f"environment: {', '.join(asked)}")
    elsewhere = _installed_elsewhere()
    if elsewhere:
        print(
            f"Python imports the clone in {ROOT}, as that is the current folder or on PYTHONPATH, and not what was installed "
            f"in {elsewhere}: run from another folder, or build the clone with `pip install --no-build-isolation -e .`"
        )
    print("backends, fastest first:")
    for name, missing in backends.available_backends().items():
        if missing:
            print(f"  {name}: not available: {missing}")
        else:
            print(f"  {name}: available{_facts(name)}")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _installed_elsewhere() -> Path | None:
    """Where the package was installed, if this one is a clone and not that."""
    if not (ROOT / "setup.py").is_file():
        return None
    places = (Path(str(d.locate_file("msam_kernels"))).resolve() for d in metadata.distributions(name="msam_kernels"))
    return next((place for place in places if place != PACKAGE and (place / "__init__.py").is_file()), None)


def _commit() -> str:
    """That of the clone, where there is one."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return f", commit {told.stdout.strip()}" if told.returncode == 0 else ""


def _facts(backend: str) -> str:
    if backend != "cpu":
        return ""
    facts = backends.extension.build_info() if backends.extension else {}
    told = "".join(f"; {key.replace('_', ' ')}: {value}" for key, value in facts.items())
    if backends.missing_extension:
        told += f"; through torch's stable ABI, as the faster _C does not load ({backends.missing_extension})"
    return told


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
