"""Builds flash_ext._C: the operators with g++, and one small nvcc translation unit per kernel instance
(build_tools/instances.py) wherever a GPU can be served (build_tools/toolchain.py).

    pip install --no-build-isolation .        into an environment that has torch
    python setup.py build_ext --inplace       the daily, incremental build (make build)

Environment: MAX_JOBS, TORCH_CUDA_ARCH_LIST, CUDA_HOME, FLASH_EXT_CPU_ONLY=1, and for developers
FLASH_EXT_HEAD_DIMS, FLASH_EXT_DTYPES.
"""

import json
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_tools import instances, toolchain  # noqa: E402

CSRC = Path("csrc")
CXX_FLAGS = ["-O3", "-g0", "-Wall", "-fvisibility=hidden"]


def build_command():
    """The build_ext command: torch's, or one that says that torch is missing."""
    try:
        import torch
    except ImportError:
        return TorchIsMissing
    from torch.utils import cpp_extension

    class BuildFlashExt(cpp_extension.BuildExtension):
        """Completes the extension with what only torch and this machine can tell, then builds it."""

        def run(self):
            try:
                self.configure(self.extensions[0])
            except toolchain.BuildError as error:
                raise SystemExit(f"\nerror: flash_ext: {error}\n") from None
            os.environ.setdefault("MAX_JOBS", str(toolchain.default_jobs()))
            super().run()
            record = Path(self.get_ext_fullpath("flash_ext._C")).with_suffix(".build.json")
            record.write_text(json.dumps(self.facts, indent=2) + "\n")

        def configure(self, extension):
            toolkit = toolchain.choose_toolkit(
                torch.__version__,
                torch.version.cuda,
                toolchain.find_gpus(),
                toolchain.find_toolkits(os.environ) if torch.version.cuda else [],
                os.environ,
            )
            facts = {
                "version": self.distribution.get_version(),
                "torch_version": torch.__version__,
                "torch_cuda_version": torch.version.cuda,
                "cuda_version": toolkit and toolkit.version,
                "architectures": [],
                "kernels": [],
                "dtypes": [],
                "head_dims": [],
            }
            extension.library_dirs += cpp_extension.library_paths()
            extension.include_dirs += [str(ROOT / CSRC), *cpp_extension.include_paths()]
            extension.libraries += ["c10", "torch_cpu"]
            # Compiled for OpenMP, not linked to it: torch brings the one runtime that both must share.
            compile_args = {"cxx": [*CXX_FLAGS, "-fopenmp"], "nvcc": []}
            sources = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]
            if toolkit is None:
                announce_cpu_only(torch)
                sources.remove(CSRC / "cuda_backend.cpp")
            else:
                sources.remove(CSRC / "cuda_backend_absent.cpp")
                selection = instances.Selection.from_environment(os.environ)
                codes = toolchain.architectures(toolchain.find_gpus(), os.environ)
                facts |= {
                    "architectures": codes,
                    "kernels": list(instances.KERNELS),
                    "dtypes": list(selection.dtypes),
                    "head_dims": list(selection.head_dims),
                }
                sources = [*instances.write_sources(selection, Path("build/instances")), *sources]
                cpp_extension.CUDA_HOME = str(toolkit.home)
                extension.include_dirs.append(str(toolkit.home / "include"))
                extension.libraries.append("c10_cuda")
                extension.extra_link_args.append(str(toolkit.runtime_library()))
                extension.define_macros += selection.macros()
                compile_args["nvcc"] = [*toolchain.NVCC_FLAGS, *toolchain.gencode_flags(codes)]
            extension.sources = [str(source) for source in sources]
            extension.extra_compile_args = compile_args
            self.facts = facts

    return BuildFlashExt


def announce_cpu_only(torch):
    line = "=" * 98
    print(
        f"{line}\nflash_ext: CPU-ONLY BUILD for torch {torch.__version__}. It will not use any GPU.\n{line}",
        file=sys.stderr,
        flush=True,
    )


class TorchIsMissing(build_ext):
    """Stands in for the real command where there is no torch."""

    def run(self):
        raise SystemExit(
            f"\nerror: flash_ext: torch is not installed for {sys.executable}. Run:\n"
            f"    {sys.executable} -m pip install torch\n"
            "and then this command again; or leave out --no-build-isolation.\n"
        )


setup(
    # The rest of the extension is known once torch is: see BuildFlashExt.configure.
    ext_modules=[Extension("flash_ext._C", sources=["csrc/bindings.cpp"], language="c++")],
    cmdclass={"build_ext": build_command()},
)
