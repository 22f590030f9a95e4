"""The Python environment that `make` runs in, from this project's own requirements.

    python3 -m build_tools.environment create .venv torch    everything, in a new .venv
    python -m build_tools.environment check test dev         say what an environment of yours lacks
    python -m build_tools.environment nvcc                   pip's nvcc, where there is none at all
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from build_tools import toolchain

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("test", "bench", "dev")
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
NVCC_WITHOUT_TORCH = "13.0"  # where torch does not decide


def requirements(*extras):
    """What builds the package, and what the named extras of pyproject.toml ask for."""
    from setuptools.config.pyprojecttoml import read_configuration

    project = read_configuration(ROOT / "pyproject.toml", expand=False)
    listed = list(project["build-system"]["requires"])
    for extra in extras:
        listed += project["project"]["optional-dependencies"][extra]
    return listed


def pip_install(python, *arguments):
    subprocess.run([python, "-m", "pip", "install", *arguments], check=True)


def install_nvcc(cuda_version):
    """pip's nvcc into the running environment, unless there is one already."""
    if not toolchain.find_toolkits(os.environ):
        pip_install(sys.executable, *toolchain.nvcc_wheels(cuda_version))


def create(folder, torch):
    """Make the environment `folder` with torch (any arguments for pip install) and all requirements."""
    python = Path(folder).absolute() / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    if torch == "torch" and not toolchain.find_gpus().present:
        torch += f" --extra-index-url {CPU_TORCH_INDEX}"  # the CUDA build is several GB
    pip_install(python, "setuptools>=77", *torch.split())
    subprocess.run([python, "-m", "build_tools.environment", "complete"], cwd=ROOT, check=True)


def complete():
    """The rest of `create`, inside the new environment."""
    import torch

    pip_install(sys.executable, *requirements(*EXTRAS))
    if torch.version.cuda and toolchain.find_gpus().present:
        install_nvcc(torch.version.cuda)


def check(*extras):
    """Exit with the command that installs what this environment lacks."""
    missing = []
    for requirement in requirements(*extras):
        name = requirement.partition(">")[0].partition("=")[0]
        if name == "ninja" and shutil.which("ninja"):
            continue  # a program, wherever it comes from
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f'"{requirement}"')
    if missing:
        raise SystemExit(
            f"\nerror: {sys.executable} has torch but lacks what this needs. Run:\n"
            f"    {sys.executable} -m pip install {' '.join(missing)}\n"
            "or leave out PYTHON=, and make uses a .venv of its own.\n"
        )


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "nvcc":
        install_nvcc(NVCC_WITHOUT_TORCH)
    else:
        {"create": create, "complete": complete, "check": check}[command](*arguments)
