# SPDX-License-Identifier: Apache-2.0
"""Who may know whom, read from the sources; and what every file of the repository must, or must not, say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from msam_kernels import reference

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "msam_kernels"
CSRC = ROOT / "csrc"

# Module -> the modules of the package that it may import, at the top or inside a function. `_C` is the extension.
MAY_KNOW = {
    "__init__": {"methods", "compat", "flatness", "optimizer"},
    "__main__": {"__init__", "_C", "ops", "methods", "compat", "optimizer"},
    "_checks": set(),
    "_numbers": set(),
    "compat": {"methods", "optimizer"},
    "optimizer": {"_checks", "_numbers", "methods", "flat", "graphs", "masks", "ops"},
    "flatness": {"_checks", "methods", "flat", "optimizer"},
    "graphs": {"_checks"},
    "flat": {"masks", "ops"},
    "masks": set(),
    "methods": {"_checks", "_numbers", "reference"},
    "ops": {"_C", "reference", "triton_kernels"},
    "reference": set(),
    "triton_kernels": set(),
}
# What an installed package brings with it; the command line may look for more when asked to.
DEPENDENCIES = {"torch"}
OPTIONAL = {"triton_kernels": {"triton"}}  # imported only when it is there


def imports(source: str) -> tuple[set[str], set[str]]:
    """(modules of the package, top-level names of others) that a module imports anywhere in it."""
    own, others = set(), set()
    siblings = {*MAY_KNOW, "_C"}

    def found(module: str, names: list[str]) -> None:
        first, _, rest = module.partition(".")
        if first != "msam_kernels":
            others.add(first)
        elif rest:
            own.add(rest.split(".")[0])
        else:  # a name of the package itself, or a module out of it
            own.update(name if name in siblings else "__init__" for name in names)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found(alias.name, ["__init__"])
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["msam_kernels" if node.level else "", node.module or ""]))
            found(module, [alias.name for alias in node.names])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for argument in node.args[:1]:
                # What is not a literal cannot be read; only the command line may do that.
                name = argument.value if isinstance(argument, ast.Constant) else "?"
                found("msam_kernels" + name if name.startswith(".") else name, ["__init__"])
    return own, others


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from . import ops, __version__", {"ops", "__init__"}),
        ("from .flat import Flat", {"flat"}),
        ("def f():\n    from msam_kernels.optimizer import MicroBatchSAM", {"optimizer"}),
        ("import msam_kernels.reference as r", {"reference"}),
        ("if True:\n    from msam_kernels import _C", {"_C"}),
        ("import msam_kernels", {"__init__"}),
        ("x = importlib.import_module('._C', __package__)", {"_C"}),
        ("x = import_module('msam_kernels.flat')", {"flat"}),
        ("import torch", set()),
    ],
)
def test_the_reader_of_imports_finds(source, expected):
    assert imports(source)[0] == expected


def test_every_module_has_a_row_in_the_table():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(MAY_KNOW)


@pytest.mark.parametrize("module", MAY_KNOW)
def test_a_module_imports_only_whom_it_may_know(module):
    own, others = imports((PACKAGE / f"{module}.py").read_text())
    assert own <= MAY_KNOW[module]
    if module != "__main__":
        assert others <= DEPENDENCIES | OPTIONAL.get(module, set()) | sys.stdlib_module_names


def test_only_the_drop_in_flatness_the_public_names_and_the_command_line_know_the_optimizer():
    knowing = {m for m, known in MAY_KNOW.items() if "optimizer" in known}
    assert knowing <= {"__init__", "__main__", "compat", "flatness"}


def test_kernels_and_specification_do_not_know_each_other_or_parameter_groups():
    assert not MAY_KNOW["reference"] | MAY_KNOW["triton_kernels"]
    sources = [
        PACKAGE / "reference.py",
        PACKAGE / "triton_kernels.py",
        PACKAGE / "ops.py",
        *CSRC.rglob("*.h"),
        *CSRC.rglob("*.cpp"),
    ]
    assert [p.name for p in sources if "param_group" in p.read_text()] == []


def included(path: Path) -> set[str]:
    """Every header that a C++ file includes, through those of this repository."""
    names = set()
    for quoted, angled in re.findall(r'^\s*#\s*include\s+(?:"([^"]+)"|<([^>]+)>)', path.read_text(), re.MULTILINE):
        names.add(quoted or angled)
        if quoted and (path.parent / quoted).exists():
            names |= included(path.parent / quoted)
    return names


# What a GPU build, or another framework's binding, compiles as well.
@pytest.mark.parametrize(
    "name",
    [
        *(
            "update_math.h",
            "segments.h",
            "cpu/storage.h",
            "cpu/loops.h",
            "cpu/unit.h",
            "cpu/kernels.h",
            "cpu/kernels.cpp",
        ),
        *(path.relative_to(CSRC).as_posix() for path in sorted((CSRC / "cpu" / "units").iterdir())),
    ],
)
def test_kernels_include_neither_torch_nor_python(name):
    torch_headers = re.compile(r"(torch|ATen|c10|pybind11|Python)\b")
    assert [header for header in included(CSRC / name) if torch_headers.match(header)] == []


def test_the_reader_of_includes_finds_torch_where_it_is():
    assert "ATen/core/Tensor.h" in included(CSRC / "cpu" / "operators.cpp")
    assert "cstdint" in included(CSRC / "cpu" / "kernels.h")  # through segments.h
    assert "kernels.h" in included(CSRC / "cpu" / "units" / "avx2_half.cpp")  # through avx2.h and unit.h


# ---- every file ------------------------------------------------------------------------------------------------------


def repository_files() -> list[Path]:
    """What git has or would take; without git, what is there beside builds and caches."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        done = None
    if done is not None and done.returncode == 0 and (ROOT / ".git").exists():
        return [p for name in done.stdout.split("\0") if name and (p := ROOT / name).is_file()]
    built = {"build", "dist", "__pycache__"}
    out = []
    for folder, folders, names in os.walk(ROOT):
        inside = Path(folder)
        folders[:] = [f for f in folders if f not in built and (not f.startswith(".") or f == ".ci")]
        out += [inside / name for name in names]
    return out


def texts() -> dict[str, str]:
    out = {}
    for path in repository_files():
        try:
            out[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture or a binary
            continue
    return out


def test_every_source_file_begins_with_its_licence():
    line = re.compile(r"(#!.*\n)?(#|//) SPDX-License-Identifier: Apache-2\.0\n")
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh", ".sh"}
    sources = {name: text for name, text in texts().items() if Path(name).suffix in suffixes or text.startswith("#!")}
    assert "msam_kernels/ops.py" in sources
    assert "csrc/update_math.h" in sources
    assert [name for name, text in sources.items() if not line.match(text)] == []
    assert [name for name, text in sources.items() if len(re.findall(line.pattern[9:], text)) > 1] == []


# Written in two parts, or this file would be found.
PRIVATE = {
    "a path of one machine": r"(?<![\w.~/$})-])/(?:wor" + r"k|home|root|Users|mnt|tmp)/\w",
    "a folder that does not come with it": r"(?:^|[\s`'\"(]|\.\./)sha" + r"red/",
}


@pytest.mark.parametrize("what", PRIVATE)
def test_no_file_names(what):
    pattern = re.compile(PRIVATE[what], re.MULTILINE)
    found = {name: m.group() for name, text in texts().items() if (m := pattern.search(text))}
    assert found == {}


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("a path of one machine", "see /wor" + "k/main"),
        ("a path of one machine", "`/hom" + "e/me`"),
        ("a folder that does not come with it", "../sha" + "red/notes"),
    ],
)
def test_the_search_finds(what, text):
    assert re.search(PRIVATE[what], text)


def test_every_page_that_is_named_comes_with_it():
    pages = {Path(name).name for name in texts()}
    named = {name: set(re.findall(r"\b[A-Z]{2,}\.md\b", text)) for name, text in texts().items()}
    assert "CONTRIBUTING.md" in named["README.md"]
    assert {name: gone for name, found in named.items() if (gone := found - pages)} == {}


def test_triton_and_cpp_agree_on_how_many_vectors_a_descent_combines():
    more = re.search(r"kMore = (\d+);", (CSRC / "segments.h").read_text()).group(1)
    lists = re.search(r"^LISTS = (\d+)", (PACKAGE / "triton_kernels.py").read_text(), re.MULTILINE).group(1)
    assert int(lists) == 1 + int(more)


def test_python_and_cpp_agree_on_the_columns_of_hyper():
    header = (CSRC / "update_math.h").read_text()

    def columns(name: str) -> list[str]:
        body = re.search(rf"enum {name} \{{([^}}]+)\}}", header).group(1)
        return [entry.split("=")[0].strip() for entry in body.split(",")]

    def plain(name: str) -> str:
        return re.sub(r"^k(Sgd|Adam)?", "", name).lower()

    for name, mirrored in (("SgdColumn", reference.SGD_COLUMNS), ("AdamColumn", reference.ADAM_COLUMNS)):
        names = [*columns("HyperColumn"), *columns(name)[:-1]]
        assert [plain(n) for n in names] == [m.replace("_", "") for m in mirrored]
    triton = re.findall(r"call\.hyper\(hyper, (\d+)\)", (PACKAGE / "triton_kernels.py").read_text())
    perturb, sgd, adam = map(int, triton)
    assert (perturb, sgd, adam) == (1, len(reference.SGD_COLUMNS), len(reference.ADAM_COLUMNS))
