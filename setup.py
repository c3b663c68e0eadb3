# SPDX-License-Identifier: Apache-2.0
"""Builds ``msam_kernels._C`` against the torch that is installed. Without a compiler the package is pure Python.

MSAM_KERNELS_CPP=0 leaves the C++ kernels out; MSAM_KERNELS_CPP=1 makes it an error if they cannot be built.

Where torch is 2.10 or later, ``msam_kernels._stable`` is built along with it: the CPU's operators against torch's stable ABI
and Python's, which serve where ``_C`` does not load. MSAM_KERNELS_STABLE=0 leaves it out; MSAM_KERNELS_STABLE=1 builds it
alone, and a wheel is then for every Python from 3.10 and every torch from 2.10 on.

The CUDA kernels are built along with them where torch has CUDA, nvcc is there, and so is a GPU. MSAM_KERNELS_CUDA=0 leaves
them out; FORCE_CUDA=1 builds them without a GPU, and makes it an error if they cannot be built. TORCH_CUDA_ARCH_LIST says
for which GPUs; unset, it is those that are there (a build is for the torch and the machine it was made on), and without
any the whole range from compute capability 8.0 to 12.0 that both torch and nvcc know.
"""

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TORCH_AT_LEAST = (2, 6)
STABLE_TORCH_AT_LEAST = (2, 10)
STABLE_PYTHON_AT_LEAST = (3, 10)
CUDA_AT_LEAST = (12, 1)  # kernel parameters of more than 4 KiB
# No contraction, as on the CPU, and nothing that --use_fast_math would bring.
NVCC_FLAGS = ("-O3", "-std=c++17", "--fmad=false", "-lineinfo")
# What the files of csrc/cpu/units are compiled with on x86, by the instruction set that their names begin with.
INSTRUCTION_SETS = {
    "avx2": ("-mavx2", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c", "-mprefer-vector-width=512"),
}
COMPILER_REMEDY = (
    "install a C++17 compiler (Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select "
    "--install) and build again with `pip install --no-build-isolation -e .`"
)

# pip's isolated builds run in the environment that they install into, but see nothing of it. Its torch is the one to meet.
sys.path += [path for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")) if path not in sys.path]
try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise SystemExit(
        "msam_kernels: torch is missing, and the extension is built against the torch that is there: run `pip install "
        "torch==2.13.0` (or the build of torch that your machine needs), then `pip install --no-build-isolation .`. Where it "
        "is there, your tool builds in an environment of its own: tell it not to"
    ) from None
if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < TORCH_AT_LEAST:
    least = "{}.{}".format(*TORCH_AT_LEAST)
    raise SystemExit(
        f"msam_kernels: torch is {torch.__version__}, and {least} or later is needed: `pip install -U torch`"
    )

from torch.utils import cpp_extension  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402


def version_now():
    """That of the package with the commit that it is built from, which an archive of the sources has noted.

    So an installer sees that there is something new. setuptools-scm would do it too, but builds use the packages of the
    environment that they are for, and it would have to be there.
    """
    literal = re.search(r'^__version__ = "(.+)"$', (ROOT / "msam_kernels" / "__init__.py").read_text(), re.MULTILINE)[1]
    noted = ROOT / "PKG-INFO"
    if noted.is_file():
        return re.search("^Version: (.+)$", noted.read_text(encoding="utf-8"), re.MULTILINE)[1]
    if not (ROOT / ".git").exists():
        return literal

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()

    try:
        if f"v{literal}" in git("tag", "--points-at", "HEAD"):
            return literal
        return f"{literal}.dev{git('rev-list', '--count', 'HEAD')[0]}+g{git('rev-parse', '--short=9', 'HEAD')[0]}"
    except (OSError, subprocess.CalledProcessError):  # no git, or the clone is somebody else's
        return literal


class BuildPython(build_py):
    """What is built knows its version."""

    def run(self):
        super().run()
        built = Path(self.build_lib, "msam_kernels", "__init__.py")
        if not self.editable_mode and built.is_file():
            text = re.sub('^__version__ = ".+"$', f'__version__ = "{VERSION}"', built.read_text(), flags=re.MULTILINE)
            built.write_text(text)


VERSION = version_now()
STABLE = "msam_kernels._stable"
FROM = "every torch from {}.{} and Python from {}.{} on".format(*STABLE_TORCH_AT_LEAST, *STABLE_PYTHON_AT_LEAST)


def is_torchless(source):
    """Whether a file of csrc/cpu has loops, or chooses among them."""
    return source.startswith("csrc/cpu/") and source != "csrc/cpu/operators.cpp"


class Build(BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        # Ninja sees headers and flags change; setuptools would only look at its own list of files.
        self.force = True

    def run(self):
        """What an earlier build for another choice left there would be used, or packed."""
        super().run()
        if self.inplace and not self.extensions:
            return  # it stays in use, as is told
        folder = ROOT if self.inplace else Path(self.build_lib)
        stale = {"msam_kernels._C", STABLE} - {extension.name for extension in self.extensions}
        if self.inplace:  # another environment may run on what this one could not have built
            stale &= {{"0": STABLE, "1": "msam_kernels._C"}.get(os.environ.get("MSAM_KERNELS_STABLE", ""), "")}
        for name in stale:
            for suffix in EXTENSION_SUFFIXES:
                folder.joinpath(*name.split(".")).with_suffix(suffix).unlink(missing_ok=True)

    def build_extensions(self):
        """Gives each file the flags of its instruction set, where torch has one list for all C++ files.

        They join the command where it is made: without ninja that is _compile of setuptools' compiler, which torch wraps,
        and with it the file that torch writes for ninja. A file that does not get them stops with an error of its own.
        """
        compile_one, write = self.compiler._compile, cpp_extension._maybe_write
        flags_of = flags_by_file(shlex.split(os.environ["CXX"]))

        def compile_with_flags(obj, src, ext, cc_args, flags, pp_opts):
            compile_one(obj, src, ext, cc_args, [*flags, *flags_of(src)], pp_opts)

        def with_flags(build):
            flags = flags_of(build[1])
            return f"{build[0]}\n  post_cflags = $post_cflags {' '.join(flags)}" if flags else build[0]

        def write_with_flags(path, text):
            write(path, re.sub(r"^build .*: compile (.*)", with_flags, text, flags=re.MULTILINE))

        self.compiler._compile, cpp_extension._maybe_write = compile_with_flags, write_with_flags
        self.parallel = None  # one extension after the other: the second links what was compiled for the first
        super().build_extensions()

    def build_extension(self, extension):
        """A folder of its own for the objects of ``_stable``; those that know no torch are ``_C``'s, where that is built."""
        if extension.name == STABLE and extension is not self.extensions[0]:
            shared = [source for source in self.extensions[0].sources if is_torchless(source)]
            extension.extra_objects = self.compiler.object_filenames(shared, output_dir=self.build_temp)
            extension.sources = [source for source in extension.sources if not is_torchless(source)]
        folder = self.build_temp
        self.build_temp += "-stable" if extension.name == STABLE else ""
        super().build_extension(extension)
        self.build_temp = folder


def put_ninja_on_path():
    """An environment that is not activated has its ninja where torch does not look."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        return
    os.environ["PATH"] = os.pathsep.join([BIN_DIR, os.environ.get("PATH", os.defpath)])


def find_compiler():
    """The C++ compiler as a list of words and None, or None and what is missing."""
    asked = os.environ.get("CXX")
    if os.name == "nt":
        return None, "they need gcc or clang, and torch's extensions on Windows are built with MSVC"
    names = [asked] if asked else ["c++", "g++", "clang++"]
    name = next((n for n in names if shutil.which(shlex.split(n)[0])), None)
    if name is None:
        return None, f"the compiler CXX={asked} is not there" if asked else "no C++ compiler was found"
    compiler = shlex.split(name)
    include = sysconfig.get_paths()["include"]
    probe = subprocess.run(
        [*compiler, "-std=c++17", "-fsyntax-only", f"-I{include}", "-x", "c++", "-"],
        input="#include <Python.h>\n#include <optional>\nstd::optional<int> x;\n",
        capture_output=True,
        text=True,
    )
    if probe.returncode == 0:
        # One compiler for objects and for linking, whatever Python itself was built with.
        os.environ["CXX"] = name
        return compiler, None
    if not (Path(include) / "Python.h").is_file():
        return None, f"Python.h is not in {include} (Debian and Ubuntu: apt install python3-dev)"
    complaint = next((line for line in probe.stderr.splitlines() if "error" in line), probe.stderr.strip())
    return None, f"{name} does not compile a C++17 program ({complaint})"


def is_clang(compiler):
    return "clang" in subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout


def flags_by_file(compiler):
    """A function from a C++ file to the flags that it has beyond those of all."""
    flags = INSTRUCTION_SETS
    if sys.platform == "darwin":  # where one command may compile for both architectures, or for the other one alone
        flags = {isa: [word for f in own for word in ("-Xarch_x86_64", f)] for isa, own in flags.items()}
        flags = {isa: [*own, "-Wno-unused-command-line-argument"] for isa, own in flags.items()}
    else:
        probe = subprocess.run([*compiler, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True)
        if "__x86_64__" not in probe.stdout:
            flags = {}

    def flags_of(file):
        path = Path(file)
        return flags.get(path.name.split("_")[0], []) if path.parent.name == "units" else []

    return flags_of


def openmp_flags(compiler):
    """Flags of the compile step. Nothing is linked: the calls bind to the OpenMP runtime that torch brought.

    So there is one thread pool and ``torch.set_num_threads`` counts. Linking with -fopenmp would map a second runtime
    wherever torch ships its own under another name. A compiler whose calls torch's runtime does not know (clang beside
    libgomp) builds single-threaded kernels, which give the same bits.
    """
    if sys.platform == "darwin":
        return []  # Apple's clang has no OpenMP
    entry = "__kmpc_fork_call" if is_clang(compiler) else "GOMP_parallel"
    runtime = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return ["-fopenmp"] if hasattr(runtime, entry) else []


def version(text):
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def find_cuda():
    """(nvcc, None), or (None, why the CUDA kernels are left out)."""
    if os.environ.get("MSAM_KERNELS_CUDA") == "0":
        return None, "MSAM_KERNELS_CUDA=0"
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} has no CUDA (https://pytorch.org has builds that do)"
    # Where torch looks.
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    remedy = (
        f"install the CUDA toolkit {torch.version.cuda} and put its bin folder on PATH, or name its folder in CUDA_HOME"
    )
    if not Path(nvcc).is_file():
        return None, f"there is no {nvcc}: {remedy}" if home else f"nvcc was not found: {remedy}"
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", output)
    if release is None:
        return None, f"{nvcc} --version names no release: {remedy}"
    if version(release[1])[0] != version(torch.version.cuda)[0]:
        return None, f"{nvcc} is of CUDA {release[1]}, and torch was built with CUDA {torch.version.cuda}: {remedy}"
    if version(release[1]) < CUDA_AT_LEAST:
        return None, f"{nvcc} is of CUDA {release[1]}, and {'.'.join(map(str, CUDA_AT_LEAST))} or later is needed"
    # The nvcc on PATH may be a link or a script outside of its toolkit, where torch would look for headers.
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
    if top:
        cpp_extension.CUDA_HOME = str(Path(top[1].strip()).resolve())
    if not torch.cuda.device_count() and os.environ.get("FORCE_CUDA") != "1":
        return None, "torch sees no GPU (FORCE_CUDA=1 builds them all the same)"
    return nvcc, None


def name_architectures(nvcc):
    """TORCH_CUDA_ARCH_LIST, if it is not set already."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked and asked != "native":
        return asked
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = {(int(a), int(b)) for a, b in re.findall(r"compute_(\d+)(\d)$", known, re.MULTILINE)}
    there = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if there:
        # A GPU that is newer than nvcc takes the PTX of the last one before it.
        wanted = {max((k for k in known if k <= gpu), default=gpu) for gpu in there}
    else:
        torch_has = {(int(a), int(b)) for a, b in re.findall(r"sm_(\d+)(\d)\b", torch._C._cuda_getArchFlags() or "")}
        wanted = {a for a in known & torch_has if (8, 0) <= a <= (12, 0)} or {(8, 0)}
    names = ";".join(f"{a}.{b}" for a, b in sorted(wanted)) + "+PTX"
    os.environ["TORCH_CUDA_ARCH_LIST"] = names
    return names


def stable_extension(sources, flags, macros):
    """Of the files that know no torch, and csrc/stable."""
    major, minor = STABLE_TORCH_AT_LEAST
    macros = [*macros, ("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000")]
    macros.append(("MSAM_PYTHON", "0x{:02x}{:02x}0000".format(*STABLE_PYTHON_AT_LEAST)))
    sources = [source for source in sources if is_torchless(source) or source.startswith("csrc/stable/")]
    return CppExtension(STABLE, sources=sources, define_macros=macros, extra_compile_args=flags, py_limited_api=True)


def extensions():
    """What is built, and one line that says so."""
    wish = os.environ.get("MSAM_KERNELS_CPP", "")
    stable = os.environ.get("MSAM_KERNELS_STABLE", "")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        if stable == "1":
            raise SystemExit(
                "msam_kernels: MSAM_KERNELS_STABLE=1 needs Python's limited API, which this Python without a GIL has not: "
                "build with an ordinary one, or unset it"
            )
        stable = "0"
    if stable == "1" and version(torch.__version__) < STABLE_TORCH_AT_LEAST:
        raise SystemExit(
            f"msam_kernels: MSAM_KERNELS_STABLE=1 needs torch {'.'.join(map(str, STABLE_TORCH_AT_LEAST))} or later to build "
            f"with, and this is {torch.__version__}: `pip install -U torch`, or unset it"
        )
    compiler, missing = (None, "MSAM_KERNELS_CPP=0") if wish == "0" else find_compiler()
    if missing:
        if wish == "1" or (wish != "0" and (os.environ.get("CXX") or stable == "1")):
            raise SystemExit(f"msam_kernels: the C++ kernels cannot be built: {missing}; {COMPILER_REMEDY}")
        remedy = "unset it and build again" if wish == "0" else COMPILER_REMEDY
        line = f"pure Python (backend 'reference'), without the C++ kernels: {missing}; to get them, {remedy}"
        stale = sorted(p.name for name in ("_C.*", "_stable.*") for p in (ROOT / "msam_kernels").glob(name))
        return [], line + (f" (an earlier build is still in use: {', '.join(stale)})" if stale else "")
    nvcc, no_cuda = (None, "MSAM_KERNELS_STABLE=1") if stable == "1" else find_cuda()
    if no_cuda and os.environ.get("FORCE_CUDA") == "1" and os.environ.get("MSAM_KERNELS_CUDA") != "0":
        raise SystemExit(f"msam_kernels: FORCE_CUDA=1, but the CUDA kernels cannot be built: {no_cuda}")
    openmp = openmp_flags(compiler)
    # No -march: kernels.cpp picks the instruction set at run time. No contraction: the same bits everywhere. Neither
    # errno nor traps: they change no result, and loops with them stay scalar.
    strict = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    # Torch's headers use a little of C++20. Compilers tell how they pass wide vectors, which only inlined functions do here.
    # gcc takes arrays that are filled on every path for uninitialized.
    warn = ["-Wall", "-Wno-c++20-extensions", "-Wno-psabi"]
    if not is_clang(compiler):
        warn.append("-Wno-maybe-uninitialized")
    flags = {"cxx": ["-O3", "-std=c++17", *strict, "-fvisibility=hidden", "-g0", *warn, *openmp]}
    macros = [("MSAM_TORCH_VERSION", f'"{torch.__version__}"')]
    # Relative, as setuptools demands; sorted, so that builds repeat.
    sources = sorted(
        p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.c*") if p.suffix in (".cpp", ".cu")
    )
    built = []
    if stable != "0" and version(torch.__version__) >= STABLE_TORCH_AT_LEAST:
        built = [stable_extension(sources, {"cxx": flags["cxx"]}, macros)]
    sources = [s for s in sources if "csrc/stable/" not in s]
    if nvcc:
        architectures = name_architectures(nvcc)
        macros.append(("MSAM_CUDA", f'"{torch.version.cuda} for {architectures}"'))
        # One source and several targets: nvcc compiles for them side by side.
        flags["nvcc"] = [*NVCC_FLAGS, f"--threads={min(4, os.cpu_count() or 1)}"]
        cuda = f"CUDA kernels with {nvcc} for {architectures}"
    else:
        sources = [s for s in sources if "csrc/cuda/" not in s]
        cuda = f"without the CUDA kernels: {no_cuda}"
    line = f"C++ kernels built with {shlex.join(compiler)} for"
    if stable == "1":
        return built, f"{line} {FROM}; {cuda}"
    kind = CUDAExtension if nvcc else CppExtension
    built.insert(0, kind("msam_kernels._C", sources=sources, define_macros=macros, extra_compile_args=flags))
    threads = "threads of torch's OpenMP" if openmp else "single-threaded: no OpenMP that torch shares"
    also = f"; and for {FROM}" if built[1:] else ""
    return built, f"{line} torch {torch.__version__}, {threads}; {cuda}{also}"


put_ninja_on_path()
ext_modules, summary = extensions()
# What a wheel's name and metadata say of it.
alone = [extension.name for extension in ext_modules] == [STABLE]
limited = {"py_limited_api": "cp{}{}".format(*STABLE_PYTHON_AT_LEAST)} if alone else {}
needed = STABLE_TORCH_AT_LEAST if alone else TORCH_AT_LEAST
distribution = setup(
    ext_modules=ext_modules,
    version=VERSION,
    install_requires=["torch>={}.{}".format(*needed)],
    cmdclass={"build_ext": Build, "build_py": BuildPython},
    options={"bdist_wheel": limited},
    # Here because pyproject.toml's two ways of saying it each fail with some setuptools.
    license="Apache-2.0",
)
if distribution.have_run.keys() & {"build", "build_ext", "editable_wheel"}:
    print(f"msam_kernels: {summary}")
