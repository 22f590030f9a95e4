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
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_tools import instances, toolchain  # noqa: E402

CSRC = Path("csrc")
# Compiled for OpenMP, but not linked to it: torch brings the one runtime that both must share.
CXX_FLAGS = ["-O3", "-g0", "-Wall", "-fvisibility=hidden", "-fopenmp"]


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
            # ninja lies beside python, also where the environment was not activated.
            os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
            os.environ.setdefault("MAX_JOBS", str(toolchain.default_jobs()))
            try:
                facts = self.configure(self.extensions[0])
            except toolchain.BuildError as error:
                raise SystemExit(f"\nerror: flash_ext: {error}\n") from None
            super().run()
            record = Path(self.get_ext_fullpath("flash_ext._C")).with_suffix(".build.json")
            record.write_text(json.dumps(facts, indent=2) + "\n")

        def configure(self, extension):
            """Fill in sources and flags; return the facts that build_info() reports."""
            if not cpp_extension.is_ninja_available():
                raise toolchain.BuildError(f"ninja is missing. Run:\n    {sys.executable} -m pip install ninja")
            gpus = toolchain.find_gpus()
            toolkits = toolchain.find_toolkits(os.environ) if torch.version.cuda else []
            toolkit = toolchain.choose_toolkit(torch.__version__, torch.version.cuda, gpus, toolkits, os.environ)
            extension.sources = [str(source) for source in (*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp"))]
            extension.include_dirs += [str(ROOT / CSRC), *cpp_extension.include_paths()]
            extension.library_dirs += cpp_extension.library_paths()
            extension.libraries += ["c10", "torch_cpu"]
            extension.extra_compile_args = {"cxx": CXX_FLAGS, "nvcc": []}
            facts = {
                "version": self.distribution.get_version(),
                "torch_version": torch.__version__,
                "torch_cuda_version": torch.version.cuda,
                "cuda_version": None,
                "architectures": [],
                "kernels": [],
                "dtypes": [],
                "head_dims": [],
            }
            if toolkit is None:
                extension.sources.remove("csrc/cuda_backend.cpp")
                announce_cpu_only(torch.__version__)
                return facts
            extension.sources.remove("csrc/cuda_backend_absent.cpp")
            return facts | self.configure_cuda(extension, toolkit, toolchain.architectures(gpus, os.environ))

        def configure_cuda(self, extension, toolkit, codes):
            selection = instances.Selection.from_environment(os.environ, codes)
            units = instances.write_sources(selection, Path("build/instances"))
            extension.sources = [*(str(unit) for unit in units), *extension.sources]
            # For the dispatcher alone: nvcc would split such a macro at its commas.
            macros = [f"-D{name}={value}" for name, value in selection.macros()]
            extension.extra_compile_args["cxx"] = [*CXX_FLAGS, *macros]
            extension.include_dirs.append(str(toolkit.home / "include"))
            extension.libraries.append("c10_cuda")
            extension.extra_link_args.append(str(toolkit.runtime_library()))
            extension.extra_compile_args["nvcc"] = [*toolchain.NVCC_FLAGS, *toolchain.gencode_flags(codes)]
            cpp_extension.CUDA_HOME = str(toolkit.home)
            return {
                "cuda_version": toolkit.version,
                "architectures": codes,
                "kernels": selection.kernels(),
                "dtypes": list(selection.dtypes),
                "head_dims": list(selection.head_dims),
            }

    return BuildFlashExt


def announce_cpu_only(torch_version):
    line = "=" * 98
    print(
        f"{line}\nflash_ext: CPU-ONLY BUILD for torch {torch_version}. It will not use any GPU.\n{line}",
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
