"""What pyproject.toml cannot hold: how the C++ extension is built, and where python_ops/ is installed."""

import platform
from pathlib import Path
from typing import Any

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


class BuildKernels(build_ext):
    """Adds what needs torch only once a compiler is really about to run, so that an sdist needs no torch."""

    def build_extensions(self) -> None:
        try:
            import torch
        except ImportError:
            raise SystemExit(
                "resmoe_kernels: the C++ extension is built with the torch it will run with, and none can be "
                "imported here; install torch, then run pip with --no-build-isolation"
            ) from None
        root = Path(torch.__file__).parent
        for extension in self.extensions:
            extension.include_dirs.append(str(root / "include"))
            extension.library_dirs.append(str(root / "lib"))

        compile_one = self.compiler._compile  # setuptools knows no flags of single files

        def compile_with_flags(obj: str, src: str, ext: str, cc_args: Any, postargs: Any, pp_opts: Any) -> None:
            compile_one(obj, src, ext, cc_args, [*postargs, *ISA_FLAGS.get(src, [])], pp_opts)

        self.compiler._compile = compile_with_flags
        super().build_extensions()


# No PyInit symbol: torch.ops.load_library loads it, after libtorch_cpu is there, so it needs no rpath either.
kernels = Extension(
    "resmoe_kernels._C",
    sources=[
        "csrc/bindings.cpp",
        "csrc/cpu/experts.cpp",
        "csrc/cpu/isa.cpp",
        "csrc/cpu/kernels_portable.cpp",
        "csrc/cpu/packed.cpp",
        "csrc/cpu/packed_sparse.cpp",
        "csrc/cpu/routing.cpp",
        "csrc/cpu/sparse.cpp",
        *(ISA_FLAGS if IS_X86 else ()),
    ],
    include_dirs=["csrc"],
    depends=[str(path) for ending in ("h", "inl") for path in sorted(Path("csrc").rglob(f"*.{ending}"))],
    # The stable ABI of torch 2.10: an extension built against any later torch also loads in 2.10 and after.
    define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
    extra_compile_args=["-std=c++20", "-O3", "-fvisibility=hidden"],
    libraries=["torch_cpu"],
    language="c++",
    py_limited_api=True,  # names it _C.abi3.so: it uses nothing of Python, so one wheel serves every Python
)

python_ops = find_packages(include=["python_ops", "python_ops.*"])

setup(
    packages=["resmoe_kernels", *(f"resmoe_kernels.{name}" for name in python_ops)],
    package_dir={"resmoe_kernels.python_ops": "python_ops"},
    package_data={"resmoe_kernels": ["py.typed", "tuned/*.json"]},
    ext_modules=[kernels],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
