# SPDX-License-Identifier: Apache-2.0
"""An extension that was built elsewhere: whether it fits the Python, the torch and the GPU that are here.

    python benchmarks/prebuilt.py build/gpu-build/python3.12-torch-2.11.0/result

That writes, in the Python that built it, ``built.json`` beside it, which says of which sources it is, and the line for ``make
gpu``. ``use`` takes such a folder, the file alone, or a wheel; what it was built for, the extension says itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
NOTES = "built.json"
# Torch first: the extension links to it, and finds its libraries loaded.
LOAD = """
import importlib.machinery, importlib.util, json, sys, torch
loader = importlib.machinery.ExtensionFileLoader("msam_kernels._C", sys.argv[1])
module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
loader.exec_module(module)
print(json.dumps(module.build_info()))
"""


class Misfit(SystemExit):
    """Says what does not fit, and what to do."""

    def __init__(self, path: Path, what: str):
        python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        torch_here = torch.__version__.split("+")[0]
        archs = sorted({"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())})
        arch = ";".join(archs) or "9.0"
        super().__init__(
            f"{path} {what}: build one that fits, on a machine with nvcc, by `make gpu-build PYTHON={python} "
            f"TORCH={torch_here} ARCH='{arch}'`, or leave GPU_PREBUILT out to build it here"
        )


def sources(root: Path = ROOT) -> str:
    """A fingerprint of what the extension is built from."""
    files = [root / "setup.py", *(p for p in (root / "csrc").rglob("*") if p.is_file())]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def find(path: Path) -> Path:
    """The extension for this Python in a folder, or ``path`` itself.

    Raises:
        Misfit: there is none.
    """
    if not path.exists():
        raise Misfit(path, "does not exist")
    found = sorted(path.rglob("_C*.so")) if path.is_dir() else [path]
    if not found:
        raise Misfit(path, "has no extension in it, no _C.*.so")
    for file in found:
        if file.name.startswith("_C.") and any(file.name == f"_C{suffix}" for suffix in EXTENSION_SUFFIXES):
            return file
    names = ", ".join(file.name for file in found)
    raise Misfit(path, f"is for another Python ({names}), and {sys.executable} takes _C{EXTENSION_SUFFIXES[0]}")


def unpacked(wheel: Path, target: Path) -> Path:
    """The extensions of a wheel, in the folder ``target``."""
    shutil.rmtree(target, ignore_errors=True)
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target, [n for n in archive.namelist() if re.search(r"(^|/)_C[^/]*\.so$", n)])
    except zipfile.BadZipFile as error:
        raise Misfit(wheel, f"is no wheel ({error})") from None
    return target


def info(file: Path) -> dict[str, str]:
    """What ``build_info`` says, in a process of its own: what is loaded stays, and may end the process.

    Raises:
        Misfit: it cannot be loaded.
    """
    done = subprocess.run([sys.executable, "-c", LOAD, str(file)], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise Misfit(file, f"cannot be loaded with torch {torch.__version__} ({said[:200]})")
    return json.loads(done.stdout.splitlines()[-1])


def serves(targets: str, capability: tuple[int, int]) -> bool:
    """Whether what was built for ``targets``, e.g. "8.0;9.0+PTX", runs on a GPU of that compute capability."""
    for target in re.split(r"[; ]+", targets.strip()):
        named = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", target)
        if named is None:
            return True  # torch knows names for some, too; whoever used one may know
        major, minor, only, ptx = named.groups()
        built = int(major), int(minor)
        if built == capability or (not only and built[0] == capability[0] and built <= capability):
            return True
        if ptx and not only and built <= capability:
            return True
    return False


def check(path: Path, built: dict[str, str], capability: tuple[int, int] | None) -> None:
    """``built`` is what the extension at ``path`` says of itself; ``capability`` that of the GPU, None without one.

    Raises:
        Misfit: its torch, CUDA or GPU is another.
    """

    def public(version: str) -> str:
        return version.split("+")[0]

    if public(built["built_with_torch"]) != public(torch.__version__):
        raise Misfit(path, f"is for torch {built['built_with_torch']}, and here is {torch.__version__}")
    if capability is None:
        return
    if built["cuda"] == "none":
        raise Misfit(path, "has no CUDA kernels")
    cuda, targets = built["cuda"].split(" for ")
    if torch.version.cuda is None or cuda.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise Misfit(path, f"is for CUDA {cuda}, and torch here for {torch.version.cuda or 'none'}")
    if not serves(targets, capability):
        raise Misfit(path, f"is for compute capability {targets}, and the GPU here has {'{}.{}'.format(*capability)}")


def use(path: Path, root: Path, *, on_gpu: bool) -> list[str]:
    """Put the extension at ``path`` into the package of the checkout ``root``, if it fits; what is to be said of it.

    Raises:
        Misfit: it does not fit; nothing was changed.
    """
    folder = unpacked(path, root / "build" / "prebuilt") if path.suffix == ".whl" and path.is_file() else path
    file = find(folder)
    notes, known = file.parent / NOTES, "unknown sources"
    if notes.is_file():
        if json.loads(notes.read_text())["sources"] != sources(root):
            raise Misfit(path, "was built from other sources than this checkout has")
        known = "these sources"
    built = info(file)
    check(path, built, torch.cuda.get_device_capability() if on_gpu else None)
    target = root / "msam_kernels" / file.name
    if not (target.exists() and target.samefile(file)):
        # Another file, not other contents: who has the one before loaded keeps it.
        unfinished = target.with_name(target.name + ".unfinished")
        shutil.copyfile(file, unfinished)
        os.replace(unfinished, target)
    return [f"extension: {path}, of {known}, for torch {built['built_with_torch']}, CUDA {built['cuda']}"]


def main(argv: list[str]) -> int:
    (folder,) = map(Path, argv)
    file = find(folder)
    built = info(file)
    notes = {"sources": sources(), "torch": built["built_with_torch"], "cuda": built["cuda"]}
    (file.parent / NOTES).write_text(json.dumps(notes, indent=2) + "\n")
    print(f"{file.name}, {file.stat().st_size / 1e6:.0f} MB, for torch {notes['torch']}, CUDA {notes['cuda']}")
    print(f"on the machine with the GPU:\n  make gpu GPU_PREBUILT={folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
