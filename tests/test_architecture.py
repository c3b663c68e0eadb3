# SPDX-License-Identifier: Apache-2.0
"""Who may know whom, read from the sources; and what every file of the repository must, or must not, say."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from msam_kernels.backends import reference

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "msam_kernels"
CSRC = ROOT / "csrc"

# Module -> the modules of the package that it may import. `_C` and `_stable` are extensions.
MAY_KNOW = {
    "__init__": {"compat", "flatness", "methods", "optimizer"},
    "__main__": {"__init__", "backends"},
    "compat": {"_torch", "methods", "optimizer"},
    "capture": {"_checks", "_torch", "batches", "between", "methods", "optimizer", "rules"},
    "flatness": {"_checks", "_torch", "batches", "buffers", "flat", "gradients", "methods", "optimizer"},
    "integrations": set(),
    "integrations.lightning": {"batches", "optimizer"},
    "integrations.transformers": {"batches", "checkpoint", "optimizer"},
    "optimizer": {
        *(
            "_checks",
            "_torch",
            "batches",
            "between",
            "buffers",
            "checkpoint",
            "compiled",
            "gradients",
            "methods",
            "mistakes",
            "parallel",
            "precision",
            "ranks",
            "rules",
            "step",
        )
    },
    "between": {"_checks", "_torch", "gradients", "rules", "step", "store"},
    "checkpoint": {"_torch", "flat", "precision", "rules", "sharded", "step", "store"},
    "step": {
        *("_torch", "batches", "buffers", "gradients", "masks", "methods", "mistakes", "parallel", "precision"),
        *("ranks", "rules", "sharded", "store", "units", "flat"),
    },
    "units": {"_torch", "backends.reference", "flat", "methods", "store"},
    "ranks": {"batches", "flat", "gradients", "methods", "sharded", "store"},
    "parallel": {"_checks", "_torch", "batches", "compiled", "gradients", "store"},
    "compiled": {"_torch"},
    "masks": {"flat", "methods"},
    "store": {"_torch", "backends", "flat", "gradients", "methods", "precision", "rules", "sharded"},
    "flat": {"_torch", "backends", "backends.checks", "backends.reference", "gradients", "precision", "sharded"},
    "gradients": {"_torch", "backends", "backends.checks", "sharded"},
    "sharded": {"_torch"},
    "rules": {"_checks", "_torch", "backends.reference", "gradients", "methods"},
    "precision": {"_checks", "mistakes"},
    "methods": {"_checks", "backends.reference"},
    "batches": {"_torch"},
    "buffers": {"_torch", "backends.checks", "gradients"},
    "_torch": set(),
    "_checks": set(),
    "mistakes": set(),
    "backends": {"_C", "backends.checks", "backends.reference", "backends.stable", "backends.triton_kernels"},
    "backends.stable": {"_stable", "backends.checks", "backends.reference"},
    "backends.triton_kernels": {"backends.checks"},
    "backends.reference": {"backends.checks"},
    "backends.checks": {"_torch"},
    "_C": set(),
    "_stable": set(),
}
# What stands above a module, and is imported by a function of it when that is called: `opt.capture` returns what records its
# steps.
LATER = {"optimizer": {"capture"}}
MODULES = [module for module in MAY_KNOW if module not in ("_C", "_stable")]
# What an installed package brings with it; the command line may look for more when asked to.
DEPENDENCIES = {"torch"}
OPTIONAL = {
    "backends.triton_kernels": {"triton"},
    "integrations.lightning": {"lightning"},
    "integrations.transformers": {"transformers"},
}  # imported only when it is there


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[1:] and parts[-1] == "__init__" else parts)


def source_of(module: str) -> str:
    path = PACKAGE.joinpath(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def runs_later(tree: ast.Module) -> set[ast.AST]:
    """What does not run when the module is imported: functions, and what is for type checkers."""
    parts: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            parts += node.body
    return {inner for part in parts for inner in ast.walk(part)}


def imports(source: str, package: str = "msam_kernels") -> tuple[set[str], set[str], set[str]]:
    """(modules of the package that a module of ``package`` imports, those that only functions import, names of others)."""
    now, later, others = set(), set(), set()
    tree = ast.parse(source)
    postponed = runs_later(tree)

    def found(node: ast.AST, module: str, names: list[str]) -> None:
        own = later if node in postponed else now
        first, _, inside = module.partition(".")
        if first != "msam_kernels":
            others.add(first)
            return
        for name in names or ["__init__"]:  # a module, or a name in one
            whole = ".".join(filter(None, (inside, name)))
            own.add(whole if whole in MAY_KNOW else inside or "__init__")

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found(node, alias.name, [])
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            found(node, module, [alias.name for alias in node.names])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for argument in node.args[:1]:
                # What is not a literal cannot be read; only the command line may do that.
                name = argument.value if isinstance(argument, ast.Constant) else "?"
                found(node, package + name if name.startswith(".") else name, [])
    return now, later - now, others


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from . import backends, __version__", {"backends", "__init__"}),
        ("from .flat import Flat", {"flat"}),
        ("def f():\n    from msam_kernels.optimizer import MicroBatchSAM", {"optimizer"}),
        ("if TYPE_CHECKING:\n    from .capture import CapturedStep", {"capture"}),
        ("import msam_kernels.backends.reference as r", {"backends.reference"}),
        ("from .backends import reference, get_backend", {"backends", "backends.reference"}),
        ("if True:\n    from msam_kernels import _C", {"_C"}),
        ("import msam_kernels", {"__init__"}),
        ("x = importlib.import_module('._C', __package__)", {"_C"}),
        ("x = import_module('msam_kernels.flat')", {"flat"}),
        ("import torch", set()),
    ],
)
def test_the_reader_of_imports_finds(source, expected):
    now, later, _ = imports(source)
    assert now | later == expected
    assert later == (expected if source.startswith(("def", "if TYPE")) else set())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from . import reference", {"backends.reference"}),
        ("from .reference import EPS", {"backends.reference"}),
        ("from .. import flat", {"flat"}),
        ("from ..methods import SAM", {"methods"}),
        ("x = import_module('.triton_kernels', __package__)", {"backends.triton_kernels"}),
    ],
)
def test_the_reader_of_imports_finds_from_inside_a_subpackage(source, expected):
    assert imports(source, "msam_kernels.backends")[0] == expected


def test_every_module_has_a_row_in_the_table():
    assert {module_of(path) for path in PACKAGE.rglob("*.py")} == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_whom_it_may_know(module):
    inside = next((name for name in ("backends", "integrations") if module.startswith(name)), None)
    package = "msam_kernels" if inside is None else f"msam_kernels.{inside}"
    now, later, others = imports(source_of(module), package)
    assert now <= MAY_KNOW[module]
    assert later <= MAY_KNOW[module] | LATER.get(module, set())
    if module != "__main__":
        assert others <= DEPENDENCIES | OPTIONAL.get(module, set()) | sys.stdlib_module_names


def test_knowledge_goes_one_way():
    TopologicalSorter(MAY_KNOW).prepare()  # refuses circles


def test_only_what_stands_above_the_optimizer_knows_it():
    assert {m for m, known in MAY_KNOW.items() if "optimizer" in known} == {
        *("__init__", "compat", "capture", "flatness", "integrations.lightning", "integrations.transformers")
    }


def test_kernels_and_specification_do_not_know_each_other_or_parameter_groups():
    assert MAY_KNOW["backends.reference"] | MAY_KNOW["backends.triton_kernels"] == {"backends.checks"}
    sources = [*(PACKAGE / "backends").glob("*.py"), *(p for p in CSRC.rglob("*.*") if p.is_file())]
    assert [p.name for p in sources if "param_group" in p.read_text()] == []


# ---- private names ---------------------------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return re.fullmatch(r"_\w*[^\W_]\w*", name) is not None and not name.endswith("__")


def defined(tree: ast.Module) -> set[str]:
    """Names that a module gives to what is its own: variables, functions, classes, and attributes of ``self``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign_private_names(source: str) -> list[str]:
    """Names that begin with an underscore, and that the module uses although they belong to another one.

    Which class an object is of cannot be read: those of ``self`` are the module's own where it defines them, those of any
    other object are not. A string counts as well, as ``getattr`` takes it, unless the module defines a name like it.
    """
    tree = ast.parse(source)
    own, found = defined(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (is_self(node.value) and node.attr in own):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if is_private(node.value) and node.value not in own:
                found.append(node.value)
        elif isinstance(node, ast.Import):
            found += [part for alias in node.names for part in alias.name.split(".") if is_private(part)]
        elif isinstance(node, ast.ImportFrom):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            # A module of the package is its own to know: who may is in the table.
            found += [part for part in parts if is_private(part) and not (node.level and part in MAY_KNOW)]
    return found


@pytest.mark.parametrize("module", [module for module in MODULES if module != "_torch"])
def test_a_private_name_is_used_only_in_the_module_that_defines_it(module):
    assert foreign_private_names(source_of(module)) == []


@pytest.mark.parametrize(
    "source",
    [
        "def f(opt):\n    return opt._step",
        "def f(self, opt):\n    self._step = opt._step",  # a name like it is no excuse
        "def f(opt):\n    opt._step = None",
        "class A(B):\n    def f(self):\n        return self._of_b()",
        "class A:\n    def __eq__(self, other):\n        return self.a._b == 1",
        "x = getattr(opt, '_step', None)",
        "x = vars(opt)['_step']",
        "x = torch._C._storage_Use_Count",
        "from .flat import _alias",
        "def f():\n    from .flat import _alias as alias",
        "from torch.utils._pytree import tree_map",
        "from torch.optim.optimizer import _global_optimizer_pre_hooks",
        "import torch._dynamo",
        "from torch import _dynamo",
    ],
)
def test_the_search_for_private_names_finds(source):
    assert foreign_private_names(source)


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    def __init__(self):\n        self._a = 1\n    def f(self):\n        return self._a, self._b()\n"
        "    def _b(self):\n        return type(self).__name__",
        "class A:\n    _a: int = 1\n    @classmethod\n    def f(cls):\n        return cls._a",
        "_a = 1\nb = _a",
        "from ._torch import is_shared",
        "from . import _torch, _C",
        "from __future__ import annotations",
        "for _ in range(3):\n    '_'.join('ab')",
        "def _kernel():\n    return 'a_kernel'.removesuffix('_kernel')",
    ],
)
def test_the_search_for_private_names_leaves_alone(source):
    assert foreign_private_names(source) == []


# ---- annotations -----------------------------------------------------------------------------------------------------

# Names that parameters have where an object of ours is handed over.
OF_OURS = {
    *("backend", "buffers", "descent", "engine", "evaluations", "flat", "flats", "graph", "memories", "memory"),
    *("method", "opt", "plan", "radii", "ranks", "recorder", "rule", "sparse", "split", "step", "store", "tables"),
    *("vector", "vectors"),
}


def arguments(function: ast.FunctionDef) -> list[ast.arg]:
    a = function.args
    extra = [arg for arg in (a.vararg, a.kwarg) if arg is not None]
    return [*a.posonlyargs, *a.args, *a.kwonlyargs, *extra]


def anything_for_a_class_of_ours(source: str) -> list[str]:
    """Parameters and attributes with such a name, of which the annotation says ``Any`` or is ``object``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        pairs = []
        if isinstance(node, ast.FunctionDef):
            pairs = [(arg.arg, arg.annotation) for arg in arguments(node)]
        elif isinstance(node, ast.AnnAssign):
            pairs = [(ast.unparse(node.target).split(".")[-1], node.annotation)]
        for name, annotation in pairs:
            if name.strip("_") in OF_OURS and annotation is not None:
                words = {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}
                if "Any" in words or ast.unparse(annotation) == "object":
                    found.append(f"{name}: {ast.unparse(annotation)}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_any_stands_for_a_class_of_ours(module):
    assert anything_for_a_class_of_ours(source_of(module)) == []


@pytest.mark.parametrize(
    "source",
    [
        "def f(opt: Any) -> None: ...",
        "def f(a: int, *, flats: Sequence[Any]) -> None: ...",
        "def f(step: Any | None = None) -> None: ...",
        "class A:\n    engine: object",
        "def f(self):\n    self._store: Any = None",
    ],
)
def test_the_search_for_any_finds(source):
    assert anything_for_a_class_of_ours(source)


def is_compiled_by_triton(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(d) or ast.unparse(d) == "_kernel" for d in function.decorator_list)


def test_what_triton_does_not_compile_is_annotated():
    """Mypy is told to leave out this module's functions without annotations, since Triton's language has other types."""
    lacking = []
    for function in ast.walk(ast.parse(source_of("backends.triton_kernels"))):
        if isinstance(function, ast.FunctionDef) and not is_compiled_by_triton(function):
            bare = [arg.arg for arg in arguments(function) if arg.annotation is None and arg.arg not in ("self", "cls")]
            no_result = function.returns is None and function.name != "__init__"
            lacking += [f"{function.name}({', '.join(bare)})"] if bare or no_result else []
    assert lacking == []


def test_installed_packages_say_that_they_have_types():
    assert (PACKAGE / "py.typed").is_file()


# ---- C++ -------------------------------------------------------------------------------------------------------------


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


# Python mirrors what these headers number.
MATH = CSRC / "update_math.h"


def enumerators(name: str) -> dict[str, int]:
    """Those of an enum of update_math.h, by name: each is one more than the one before, unless it says otherwise."""
    body = re.search(rf"enum {name}(?: : \w+)? \{{([^}}]+)\}}", MATH.read_text()).group(1)
    values, following = {}, 0
    for entry in body.split(","):
        key, _, value = (part.strip() for part in entry.partition("="))
        values[key] = int(value) if value else following
        following = values[key] + 1
    return values


def constant(name: str) -> int:
    return int(re.search(rf"constexpr int {name} = (\d+);", MATH.read_text()).group(1))


def test_python_and_cpp_agree_on_status_and_rules():
    status = {"kUntouched": reference.UNTOUCHED, "kSaved": reference.SAVED, "kPerturbed": reference.PERTURBED}
    assert enumerators("Status") == status
    assert enumerators("Rule") == {"kSgd": reference.SGD, "kAdam": reference.ADAM}


@pytest.mark.parametrize(
    ("name", "mirrored"), [("SgdColumn", reference.SGD_COLUMNS), ("AdamColumn", reference.ADAM_COLUMNS)]
)
def test_python_and_cpp_agree_on_the_columns_of_settings(name, mirrored):
    *columns, count = enumerators(name).items()
    assert [(re.sub(r"^k(Sgd|Adam)?", "", key).lower(), value) for key, value in columns] == [
        (column.replace("_", ""), i) for i, column in enumerate(mirrored)
    ]
    assert count[1] == len(mirrored)


def test_python_and_cpp_agree_on_the_columns_of_a_coefficient():
    assert constant("kCoefficientColumns") == len(reference.COEFFICIENT)
    named = re.search(r"kCoefficientColumns = .*: (.*)$", MATH.read_text(), re.MULTILINE).group(1)
    assert tuple(named.split(", ")) == reference.COEFFICIENT


def test_python_and_cpp_agree_on_the_columns_of_radii():
    assert constant("kRadiusColumns") == len(reference.RADIUS)
    named = re.search(r"kRadiusColumns = .*: (.*)$", MATH.read_text(), re.MULTILINE).group(1)
    assert tuple(named.split(", ")) == reference.RADIUS


def test_triton_agrees():
    pytest.importorskip("triton")
    triton = importlib.import_module("msam_kernels.backends.triton_kernels")

    def values(*names: str) -> list[int]:
        return [getattr(value, "value", value) for value in (getattr(triton, name) for name in names)]

    mirrored = ("UNTOUCHED", "SAVED", "PERTURBED", "SGD", "ADAM")
    assert values(*mirrored) == [getattr(reference, name) for name in mirrored]
    assert values("COEFFICIENT_COLUMNS", "RADIUS_COLUMNS") == [len(reference.COEFFICIENT), len(reference.RADIUS)]
    limits = [constant(name) for name in ("kTerms", "kVectors", "kSums", "kRows")]
    assert values("TERMS", "VECTORS", "SUM_TENSORS", "SUM_ROWS") == limits
    columns = {reference.SGD: len(reference.SGD_COLUMNS), reference.ADAM: len(reference.ADAM_COLUMNS)}
    assert {rule: count for rule, (count, _) in triton.RULES.items()} == columns
    assert max(len(states) for _, states in triton.RULES.values()) == constant("kStates")


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
    assert "msam_kernels/backends/reference.py" in sources
    assert "csrc/update_math.h" in sources
    assert [name for name, text in sources.items() if not line.match(text)] == []
    assert [name for name, text in sources.items() if len(re.findall(line.pattern[9:], text)) > 1] == []


def test_no_kernel_for_the_cpu_reads_numbers_of_one_type_as_those_of_another():
    # A cast lets the compiler assume that they are apart; memcpy and the types of vectors do not.
    cast = re.compile(r"reinterpret_cast<\s*(?:const\s+)?(?:float|double|(?:u?int|long|unsigned)\w*)(?:\s+const)?\s*\*")
    assert cast.search("reinterpret_cast<const double*>(p)")
    sources = {name: text for name, text in texts().items() if name.startswith("csrc/cpu/")}
    assert "csrc/cpu/loops.h" in sources
    assert {name: m.group() for name, text in sources.items() if (m := cast.search(text))} == {}


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
