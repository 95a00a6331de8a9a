"""Builds the native code. What is built is decided here, and said in one line.

``resdense_ext._C``         the CPU operators, their schemas and ``build_info()``; needs a C++20 compiler
``resdense_ext/_cuda.so``   the CUDA operators, a plain shared library; needs nvcc, but neither a GPU nor a CUDA torch

Environment: RESDENSE_SKIP_EXT=1 leaves all native code out, RESDENSE_SKIP_CUDA=1 the CUDA library; RESDENSE_FORCE_EXT=1
builds on platforms that are not verified, RESDENSE_FORCE_CUDA=1 fails where nvcc is missing instead of leaving CUDA
out; TORCH_CUDA_ARCH_LIST chooses the architectures, CXX and CUDA_HOME the compilers, MAX_JOBS how many run at once.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as PlainBuildExt
from setuptools.command.build_py import build_py

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = cpp_extension = None

ROOT = Path(__file__).resolve().parent
TARGET_TORCH = (2, 11)
DEFAULT_ARCHS = ["80", "90", "100"]
LEAST_ARCH = 80  # whose instructions the kernels use
ARCH_NAMES = {"Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0;12.0"}
CUDA = "resdense_ext._cuda"

# The stable ABI of the oldest torch that is supported: nothing newer compiles, so one build serves every later torch.
TORCH_TARGET = f"-DTORCH_TARGET_VERSION=0x{TARGET_TORCH[0]:02x}{TARGET_TORCH[1]:02x}000000000000"


class BuildError(SystemExit):
    def __init__(self, message: str) -> None:
        super().__init__(f"resdense_ext: {message}")


def flag(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "no", "off", "false")


def relative(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


@dataclass
class Plan:
    """What to build. A reason is why the thing is left out, and empty where it is not."""

    no_cpu: str = ""
    no_cuda: str = ""
    compiler: str = ""
    nvcc: str = ""
    nvcc_version: str = ""
    archs: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.no_cpu:
            return f"resdense_ext: builds no native code ({self.no_cpu}); a pure-Python install on the reference backend"
        cuda = f"; skips the CUDA library ({self.no_cuda})"
        if not self.no_cuda:
            archs = ", ".join(f"sm_{arch}" for arch in self.archs).replace("+PTX", " and its PTX")
            cuda = f" and the CUDA library (nvcc {self.nvcc_version}: {archs})"
        return f"resdense_ext: builds the CPU library ({self.compiler}){cuda}"


def compiler_problem(compiler: str) -> str:
    """Why this compiler cannot build the extension; empty where it can."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        for header, what in (("concepts", "does not compile C++20"), ("Python.h", "finds no Python.h (python3-dev)")):
            source.write_text(f"#include <{header}>\nint main() {{ return 0; }}\n")
            command = [*compiler.split(), "-std=c++20", "-fsyntax-only", f"-I{sysconfig.get_path('include')}", str(source)]
            if subprocess.run(command, capture_output=True).returncode:
                return f"{compiler} {what}"
    return ""


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (found := shutil.which("nvcc", path=os.path.join(home, "bin"))):
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_archs(nvcc: str) -> list[str]:
    """Such as ["80", "90", "100+PTX"]; those that are too old for the kernels are left out."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not wanted:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        archs = [arch for arch in DEFAULT_ARCHS if f"compute_{arch}" in known]
        return archs[:-1] + [archs[-1] + "+PTX"] if archs else []
    for name, numbers in ARCH_NAMES.items():
        wanted = re.sub(rf"\b{name}\b", numbers, wanted, flags=re.IGNORECASE)
    archs = []
    for arch in re.split(r"[\s;,]+", wanted.strip("; ,")):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if not match:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 10.0+PTX, got {arch!r}")
        if int(match[1] + match[2]) >= LEAST_ARCH:
            archs.append("".join(part or "" for part in match.groups()))
    return list(dict.fromkeys(archs))


@cache
def plan() -> Plan:
    result = Plan()
    if flag("RESDENSE_SKIP_EXT"):
        result.no_cpu = "RESDENSE_SKIP_EXT is set"
        return result
    forced = flag("RESDENSE_FORCE_EXT")
    machine = platform.machine().lower()
    if not forced and (sys.platform != "linux" or machine not in ("x86_64", "amd64")):
        result.no_cpu = f"{platform.system()} on {machine} is not verified; RESDENSE_FORCE_EXT=1 builds all the same"
        return result
    if sys.platform == "win32":
        result.compiler = "MSVC, C++20"
    else:
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        found = next((name for name in names if shutil.which(name.split()[0])), None)
        problem = compiler_problem(found) if found else f"no C++ compiler: {', '.join(names)} not found"
        if problem:
            if forced:
                raise BuildError(f"RESDENSE_FORCE_EXT is set, but {problem}")
            result.no_cpu = problem
            return result
        os.environ["CXX"] = found
        result.compiler = f"{found}, C++20"

    forced = flag("RESDENSE_FORCE_CUDA")
    nvcc = find_nvcc()
    if nvcc:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        match = re.search(r"release (\d+)\.(\d+)", text)
        version = tuple(map(int, match.groups())) if match else (0, 0)
        result.nvcc, result.nvcc_version = nvcc, ".".join(map(str, version))
    if flag("RESDENSE_SKIP_CUDA") and not forced:
        result.no_cuda = "RESDENSE_SKIP_CUDA is set"
    elif sys.platform != "linux":
        result.no_cuda = "only on Linux"
    elif not nvcc:
        result.no_cuda = "no nvcc found"
    elif version < (12, 0):
        result.no_cuda = f"nvcc {result.nvcc_version} does not compile C++20, which takes 12.0"
    elif torch is not None and torch.version.hip and not forced:
        result.no_cuda = "this torch is for ROCm"
    else:
        result.archs = cuda_archs(nvcc)
        if not result.archs:
            known = f"nvcc {result.nvcc_version} knows none of sm_{', sm_'.join(DEFAULT_ARCHS)}"
            wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
            result.no_cuda = f"TORCH_CUDA_ARCH_LIST names none from sm_{LEAST_ARCH} on: {wanted}" if wanted else known
    if forced and result.no_cuda:
        raise BuildError(f"RESDENSE_FORCE_CUDA is set, but the CUDA library cannot be built: {result.no_cuda}")
    return result


def require_torch() -> None:
    if torch is None:
        raise BuildError(
            "torch is not installed where the extension is built. Install torch first, then build with "
            "--no-build-isolation (or set RESDENSE_SKIP_EXT=1 for an install without native code)."
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < TARGET_TORCH:
        raise BuildError(f"torch: expected 2.11 or later, got {torch.__version__}")


@cache
def announce() -> None:
    print(plan(), flush=True)


def run_compiler(command: list[str], log: Path | None = None) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if log:
        log.write_text(result.stderr)
    if result.returncode:
        raise BuildError(
            f"this command failed:\n{' '.join(command)}\n{result.stdout}{result.stderr}\n"
            "(RESDENSE_SKIP_CUDA=1 builds without the CUDA library)"
        )


class BuildPy(build_py):
    def run(self) -> None:
        announce()
        super().run()


class BuildExt(cpp_extension.BuildExtension if cpp_extension else PlainBuildExt):
    def run(self) -> None:
        announce()
        if self.extensions:
            require_torch()
            super().run()

    def build_extensions(self) -> None:
        include = [str(ROOT / "csrc"), *cpp_extension.include_paths()]
        definitions = [
            TORCH_TARGET,
            f"-DRESDENSE_VERSION={self.distribution.get_version()}",
            f"-DRESDENSE_CUDA_ARCHS={','.join(plan().archs)}",
        ]
        for extension in self.extensions:
            extension.include_dirs = include
            if extension.name == CUDA:
                continue
            extension.library_dirs = cpp_extension.library_paths()
            extension.libraries = ["torch_cpu"]
            if sys.platform == "win32":
                extension.extra_compile_args = ["/O2", "/std:c++20", *definitions]
            else:
                extension.extra_compile_args = [
                    "-O3",
                    "-g0",
                    "-std=c++20",
                    "-Wno-psabi",  # vector types are passed between inlined functions only
                    "-fvisibility=hidden",
                    "-fvisibility-inlines-hidden",
                    # No path of the machine that builds ends up in the library.
                    f"-ffile-prefix-map={ROOT}/=",
                    *(f"-ffile-prefix-map={path}/=" for path in cpp_extension.include_paths()),
                    *definitions,
                ]
        super().build_extensions()

    def get_ext_filename(self, name: str) -> str:
        if name == CUDA or CUDA.endswith("." + name):
            return os.path.join(*name.split(".")) + ".so"
        return super().get_ext_filename(name)

    def build_extension(self, extension: Extension) -> None:
        if extension.name == CUDA:
            self.build_cuda(extension)
        else:
            super().build_extension(extension)

    def build_cuda(self, extension: Extension) -> None:
        """By nvcc alone: torch's own rules take a torch that is built with CUDA, which compiling does not need."""
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = Path(self.build_temp, "cuda").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        gencode = []
        for arch in plan().archs:
            number = arch.removesuffix("+PTX")
            gencode.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if arch.endswith("+PTX"):
                gencode.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        flags = ["-std=c++20", "-O3", "-DUSE_CUDA", TORCH_TARGET, "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", "--expt-relaxed-constexpr"]
        flags += [*gencode, *(f"-I{path}" for path in extension.include_dirs)]

        headers = [ROOT / path for path in relative("csrc/common/*.h") + relative("csrc/cuda/*.*h")]
        newest = max(path.stat().st_mtime for path in [*headers, Path(__file__)])
        command_file = folder / "command.txt"
        command_text = " ".join([plan().nvcc, plan().nvcc_version, torch.__version__, *flags])
        same_command = command_file.exists() and command_file.read_text() == command_text

        objects, stale = [], []
        for source in relative("csrc/cuda/*.cu"):
            built = folder / (Path(source).stem + ".o")
            objects.append(str(built))
            if not (same_command and built.exists() and built.stat().st_mtime > max(newest, (ROOT / source).stat().st_mtime)):
                stale.append((source, built))
        if not stale and target.exists() and all(target.stat().st_mtime > os.stat(o).st_mtime for o in objects):
            return

        # Relative paths: the file names in the library's messages are then the same wherever it is built.
        def build(job: tuple[str, Path]) -> None:
            source, built = job
            run_compiler([plan().nvcc, *flags, "-c", source, "-o", str(built)], log=built.with_suffix(".ptxas.txt"))

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(build, stale))
        command_file.write_text(command_text)

        libraries = cpp_extension.library_paths()
        if not any(Path(path, "libtorch_cuda.so").exists() for path in libraries):
            # A stand-in with the right name: the loader finds the real one, which a CUDA torch has in memory already.
            stub = folder / "libtorch_cuda.so"
            run_compiler([os.environ["CXX"], "-shared", "-fPIC", "-xc++", os.devnull, "-Wl,-soname,libtorch_cuda.so", "-o", str(stub)])
            libraries = [*libraries, str(folder)]
        link = [f"-L{path}" for path in libraries] + ["-Xlinker=--no-as-needed", "-ltorch_cpu", "-ltorch_cuda"]
        run_compiler([plan().nvcc, "-shared", "-nodlink", "-cudart=static", *objects, *link, "-o", str(target)])


def extensions() -> list[Extension]:
    if plan().no_cpu:
        return []
    found = [
        Extension(
            "resdense_ext._C",
            ["csrc/bindings.cpp", *(path for part in ("cpu", "convolution", "program") for path in relative(f"csrc/{part}/*.cpp"))],
            depends=relative("csrc/**/*.h"),
            language="c++",
        )
    ]
    if not plan().no_cuda:
        found.append(Extension(CUDA, [], depends=relative("csrc/cuda/*")))
    return found


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt, "build_py": BuildPy})
