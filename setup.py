"""What pyproject.toml cannot hold: how the extension is built, and where python_ops/ is installed.

The environment variables of the build:

RESMOE_BUILD          auto (the default): CUDA kernels where nvcc is found; cpu: none; cuda: an error where they fail
TORCH_CUDA_ARCH_LIST  the GPUs to build for, as torch's own extensions read it: "8.0 9.0a+PTX"
CUDA_HOME, CUDA_PATH  the folder with bin/nvcc; else the one on PATH, else /usr/local/cuda
MAX_JOBS              how many files of C++, or GPUs' code, are compiled at once; as many as there are CPUs if not set
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# The files of one instruction set each, and their flags, as in CMakeLists.txt; csrc/cpu/isa.cpp chooses at run time.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vbmi2"]
ISA_FLAGS = {
    "csrc/cpu/kernels_avx2.cpp": AVX2,
    "csrc/cpu/kernels_avx512.cpp": AVX512,
    "csrc/cpu/kernels_avx512_bf16.cpp": AVX512_BF16,
    "csrc/cpu/kernels_amx.cpp": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
}
IS_X86 = platform.machine() in ("x86_64", "AMD64")
KERNELS_CPU = ["csrc/cpu/kernels_portable.cpp", *(ISA_FLAGS if IS_X86 else ())]

BUILDS = ("auto", "cpu", "cuda")
GPUS = ("80", "89", "90", "100")  # as in CMakeLists.txt; all later ones run the last one's PTX
OLDEST_GPU = 80  # the first with bfloat16 tensor cores and asynchronous copies
OLDEST_NVCC = (12, 0)  # the first that knows C++20
CUDA_OBJECTS = Path("build/cuda")  # not setuptools' own folder, which an editable install throws away


class Cuda(NamedTuple):
    """A toolkit, and what to build with it."""

    nvcc: str
    version: str
    gpus: list[str]  # "90a"
    ptx: list[str]  # those of them whose PTX is included too, for later GPUs
    left_out: list[str]  # that were asked for
    runtime: Path  # libcudart_static.a: the extension must load where no CUDA is installed

    def __str__(self) -> str:
        gpus = ", ".join(f"sm_{gpu}{' with PTX' * (gpu in self.ptx)}" for gpu in self.gpus)
        left_out = f", without {_names(self.left_out)}" if self.left_out else ""
        return f"{gpus}{left_out}; nvcc {self.version}"


def _names(gpus: Iterable[str]) -> str:
    return ", ".join(f"sm_{gpu}" for gpu in gpus)


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    paths = [*(os.path.join(home, "bin") for home in homes if home), None, "/usr/local/cuda/bin"]
    return next((nvcc for path in paths if (nvcc := shutil.which("nvcc", path=path))), None)


def parse_gpus(text: str) -> tuple[list[str], list[str]]:
    """Of TORCH_CUDA_ARCH_LIST: the GPUs, and those of them whose PTX is wanted too."""
    gpus: dict[str, None] = {}
    ptx: dict[str, None] = {}
    for item in re.split(r"[;,\s]+", text.strip("; ,\t\n")):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if match is None:
            raise SystemExit(
                f'resmoe_kernels: TORCH_CUDA_ARCH_LIST must be like "8.0;9.0a+PTX", got {item!r} in {text!r}'
            )
        gpus[match[1] + match[2]] = None
        if match[3]:
            ptx[match[1] + match[2]] = None
    return list(gpus), list(ptx)


def find_cuda(build: str) -> Cuda | str:
    """What to build CUDA kernels with, or why none are built."""
    if build == "cpu":
        return "RESMOE_BUILD is cpu"
    if not sys.platform.startswith("linux"):
        return "they are built on Linux only"
    nvcc = find_nvcc()
    if nvcc is None:
        return "nvcc was not found (in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)"

    def ask(*arguments: str) -> str:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr  # --dryrun writes to the latter

    release = re.search(r"release (\d+)\.(\d+)", ask("--version"))
    if release is None:
        return f"{nvcc} --version names no release"
    version = f"{release[1]}.{release[2]}"
    if (int(release[1]), int(release[2])) < OLDEST_NVCC:
        return f"nvcc {version} is older than {'.'.join(map(str, OLDEST_NVCC))}"

    known = re.findall(r"sm_(\d+)", ask("--list-gpu-code"))
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    wanted, ptx = parse_gpus(requested) if requested else (list(GPUS), [])
    gpus = [gpu for gpu in wanted if (sm := gpu.rstrip("af")) in known and int(sm) >= OLDEST_GPU]
    left_out = [gpu for gpu in wanted if gpu not in gpus] if requested else []
    if not gpus or (left_out and build == "cuda"):
        return (
            f"none for {_names(left_out or wanted)}, as they need sm_{OLDEST_GPU} or later and nvcc {version} "
            f"builds for {_names(known)}"
        )
    ptx = [gpu for gpu in ptx if gpu in gpus] if requested else gpus[-1:]

    folders = re.findall(r'"-L([^"]+)"', ask("--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull))
    runtime = next((f for f in (Path(folder, "libcudart_static.a") for folder in folders) if f.exists()), None)
    if runtime is None:
        return f"libcudart_static.a was not found where nvcc {version} looks for libraries"
    return Cuda(nvcc, version, gpus, ptx, left_out, runtime.resolve())


def jobs_at_once() -> int:
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not jobs.isdecimal() or jobs == "0":
        raise SystemExit(f"resmoe_kernels: MAX_JOBS must be a number of at least 1, got {jobs!r}")
    return int(jobs)


def compile_cuda(cuda: Cuda) -> list[str]:
    """The objects of csrc/cuda/*.cu, compiled where flags, source or headers differ from those of the last time."""
    flags = ["-std=c++20", "-O3", "-Icsrc", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    flags += [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in cuda.gpus]
    flags += [f"-gencode=arch=compute_{gpu},code=compute_{gpu}" for gpu in cuda.ptx]
    threads = str(min(len(cuda.gpus), jobs_at_once()))
    headers = [path.read_bytes() for path in sorted(Path("csrc/cuda").iterdir()) if path.suffix != ".cu"]
    CUDA_OBJECTS.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in sorted(Path("csrc/cuda").glob("*.cu")):
        parts = [repr((cuda, flags)).encode(), source.read_bytes(), *headers]
        object_file = CUDA_OBJECTS / f"{source.stem}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.o"
        if not object_file.exists():
            for stale in CUDA_OBJECTS.glob(f"{source.stem}-*.o"):
                stale.unlink()
            unfinished = object_file.with_suffix(".unfinished.o")
            command = [cuda.nvcc, *flags, "--threads", threads, "-c", str(source), "-o", str(unfinished)]
            print(shlex.join(command), flush=True)
            if subprocess.run(command, check=False).returncode:
                raise SystemExit(
                    f"resmoe_kernels: nvcc {cuda.version} failed on {source}, see its messages above; "
                    "RESMOE_BUILD=cpu builds without CUDA kernels"
                )
            unfinished.rename(object_file)
        objects.append(str(object_file))
    return objects


class BuildKernels(build_ext):
    """Adds what needs torch or nvcc only once a compiler is really about to run, so that an sdist needs neither."""

    def build_extensions(self) -> None:
        build = os.environ.get("RESMOE_BUILD") or "auto"
        if build not in BUILDS:
            raise SystemExit(f"resmoe_kernels: RESMOE_BUILD must be one of {', '.join(BUILDS)}, got {build!r}")
        try:
            import torch
        except ImportError:
            raise SystemExit(
                "resmoe_kernels: the C++ extension is built with the torch it will run with, and none can be "
                "imported here; install torch, then run pip with --no-build-isolation"
            ) from None
        cuda = find_cuda(build)
        if build == "cuda" and isinstance(cuda, str):
            raise SystemExit(f"resmoe_kernels: RESMOE_BUILD is cuda, but CUDA kernels cannot be built: {cuda}")
        cpu = ", ".join(Path(path).stem.removeprefix("kernels_") for path in KERNELS_CPU)
        built = f"CPU kernels ({cpu})"
        built += f" only: {cuda}" if isinstance(cuda, str) else f" and CUDA kernels ({cuda})"

        (extension,) = self.extensions
        root = Path(torch.__file__).parent
        extension.include_dirs.append(str(root / "include"))
        extension.library_dirs.append(str(root / "lib"))
        extension.define_macros.append(("RESMOE_BUILT", f'"{built}"'))
        if isinstance(cuda, Cuda):
            extension.define_macros.append(("RESMOE_CUDA", None))
            extension.extra_objects = [*compile_cuda(cuda), str(cuda.runtime)]
            extension.depends += extension.extra_objects
            extension.libraries += ["dl", "rt", "pthread"]
            # Another CUDA runtime, that of torch, must not stand in for ours (nvcc 13.0's is hidden without this).
            extension.extra_link_args.append(f"-Wl,--exclude-libs,{cuda.runtime.name}")
        extension.depends.append(self._noted(f"{built}\ntorch {torch.__version__}\n"))

        compile_one = self.compiler._compile  # setuptools knows no flags of single files

        def compile_with_flags(obj: str, src: str, ext: str, cc_args: Any, postargs: Any, pp_opts: Any) -> None:
            compile_one(obj, src, ext, cc_args, [*postargs, *ISA_FLAGS.get(src, [])], pp_opts)

        compile_all = self.compiler.compile  # one after another

        def compile_side_by_side(sources: list[str], **given: Any) -> list[str]:
            with ThreadPoolExecutor(jobs_at_once()) as pool:
                made = list(pool.map(lambda source: compile_all([source], **given), sources))
            return [object_file for objects in made for object_file in objects]

        self.compiler._compile, self.compiler.compile = compile_with_flags, compile_side_by_side
        super().build_extensions()
        print(f"resmoe_kernels: built {built}", flush=True)

    @staticmethod
    def _noted(text: str) -> str:
        """A file that is new when the text is: setuptools compares the times of files, and no flags."""
        note = CUDA_OBJECTS.with_name("built.txt")
        note.parent.mkdir(exist_ok=True)
        if not note.exists() or note.read_text() != text:
            note.write_text(text)
        return str(note)


def main() -> None:
    # No PyInit symbol: torch.ops.load_library loads it, after libtorch_cpu is there, so it needs no rpath either.
    kernels = Extension(
        "resmoe_kernels._C",
        sources=[
            "csrc/bindings.cpp",
            "csrc/bindings_cuda.cpp",
            "csrc/bindings_form.cpp",
            "csrc/cpu/assignment.cpp",
            "csrc/cpu/experts.cpp",
            "csrc/cpu/isa.cpp",
            "csrc/cpu/packed.cpp",
            "csrc/cpu/packed_codes.cpp",
            "csrc/cpu/packed_sparse.cpp",
            "csrc/cpu/payload.cpp",
            "csrc/cpu/routing.cpp",
            "csrc/cpu/sparse.cpp",
            *KERNELS_CPU,
        ],
        include_dirs=["csrc"],
        depends=["setup.py"]
        + [str(path) for ending in ("h", "inl") for path in sorted(Path("csrc").rglob(f"*.{ending}"))],
        # The stable ABI of torch 2.10: an extension built against any later torch also loads in 2.10 and after.
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=["-std=c++20", "-O3", "-fvisibility=hidden"],
        libraries=["torch_cpu"],
        language="c++",
        py_limited_api=True,  # names it _C.abi3.so: it uses nothing of Python, so one wheel serves every Python
    )
    ops = find_packages(include=["resmoe_kernels", "resmoe_kernels.*"])
    python_ops = find_packages(include=["python_ops", "python_ops.*"])
    setup(
        packages=[*ops, *(f"resmoe_kernels.{name}" for name in python_ops)],
        package_dir={"resmoe_kernels.python_ops": "python_ops"},
        package_data={"resmoe_kernels": ["py.typed", "tuned/*.json"]},
        ext_modules=[kernels],
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
