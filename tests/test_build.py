"""What the build decides and says, on machines that are made up: no compiler runs here."""

import json
import subprocess
import sys
from pathlib import Path

import lint_rules
import pytest
import torch

from build_tools import backend, check_kernels, instances, toolchain
from build_tools.toolchain import BuildError, Gpus, Toolkit
from flash_ext import extension

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = Gpus(present=False)
H200 = Gpus(present=True, capabilities=((9, 0),))
NVCC_13 = Toolkit(Path("/cuda-13.0"), "13.0")
NVCC_12 = Toolkit(Path("/cuda-12.8"), "12.8")


def choose(torch_cuda="13.0", gpus=H200, toolkits=(NVCC_13,), environ=None):
    return toolchain.choose_toolkit("2.11.0", torch_cuda, gpus, list(toolkits), environ or {})


# ---- which build ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [NO_GPU, H200], ids=["no GPU", "GPU"])
def test_cuda_build_where_nvcc_fits(gpus):
    assert choose(gpus=gpus) == NVCC_13


def test_the_fitting_one_of_several_toolkits_is_taken():
    assert choose(toolkits=[NVCC_12, NVCC_13]) == NVCC_13
    assert choose(torch_cuda="12.6", toolkits=[NVCC_13, NVCC_12]) == NVCC_12


def test_cpu_build_only_without_gpu_or_on_request():
    assert choose(torch_cuda=None, gpus=NO_GPU, toolkits=[]) is None
    assert choose(gpus=NO_GPU, toolkits=[]) is None
    assert choose(environ={"FLASH_EXT_CPU_ONLY": "1"}) is None
    assert choose(torch_cuda=None, toolkits=[], environ={"FLASH_EXT_CPU_ONLY": "1"}) is None


@pytest.mark.parametrize("gpus", [H200, Gpus(present=True)], ids=["GPU", "GPU that does not answer"])
def test_gpu_with_cpu_torch_is_an_error_with_the_command(gpus):
    with pytest.raises(BuildError, match="CPU-only build") as error:
        choose(torch_cuda=None, gpus=gpus)
    assert f"{sys.executable} -m pip install --force-reinstall torch" in str(error.value)
    assert "FLASH_EXT_CPU_ONLY=1" in str(error.value)


def test_gpu_without_nvcc_is_an_error_with_the_command():
    with pytest.raises(BuildError, match="no nvcc was found") as error:
        choose(toolkits=[])
    assert f'{sys.executable} -m pip install "nvidia-cuda-nvcc==13.0.*"' in str(error.value)


def test_no_nvcc_wheels_before_cuda_13():
    with pytest.raises(BuildError, match=r"Install the CUDA toolkit 12\.6 and set CUDA_HOME"):
        choose(torch_cuda="12.6", toolkits=[])


@pytest.mark.parametrize("gpus", [NO_GPU, H200], ids=["no GPU", "GPU"])
def test_nvcc_of_another_cuda_is_an_error_with_the_command(gpus):
    with pytest.raises(BuildError, match=r"needs nvcc 13\.x, got 12\.8 in /cuda-12\.8") as error:
        choose(gpus=gpus, toolkits=[NVCC_12])
    assert "pip install" in str(error.value)


def test_old_gpu():
    with pytest.raises(BuildError, match=r"compute capability 7\.5; the kernels need 8\.0"):
        choose(gpus=Gpus(present=True, capabilities=((7, 0), (7, 5))))


# ---- finding things -----------------------------------------------------------------------------------


def make_nvcc(home, release):
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    version = f"Cuda compilation tools, release {release}, V{release}.88"
    nvcc.write_text(f'#!/bin/sh\necho "{version}"\necho "#$ TOP={home}/bin/.."\n')
    nvcc.chmod(0o755)
    return home


def test_cuda_home_decides_alone(tmp_path):
    home = make_nvcc(tmp_path / "cuda", "12.9")
    assert toolchain.find_toolkits({"CUDA_HOME": str(home)}) == [Toolkit(home, "12.9")]
    with pytest.raises(BuildError, match=r"CUDA_HOME is .*nowhere"):
        toolchain.find_toolkits({"CUDA_HOME": str(tmp_path / "nowhere")})


def test_nvcc_on_path_may_be_a_script_elsewhere(tmp_path, monkeypatch):
    home = make_nvcc(tmp_path / "cuda", "13.1")
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    assert toolchain.find_toolkits({})[0] == Toolkit(home, "13.1")


def test_runtime_library_without_development_link(tmp_path):
    (tmp_path / "lib").mkdir()
    with pytest.raises(BuildError, match="pip install"):
        Toolkit(tmp_path, "13.0").runtime_library()
    library = tmp_path / "lib" / "libcudart.so.13"
    library.touch()
    assert Toolkit(tmp_path, "13.0").runtime_library() == library


def test_gpus_as_nvidia_smi_lists_them(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n8.6\\n9.0\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert toolchain.find_gpus() == Gpus(present=True, capabilities=((8, 6), (9, 0)))


def test_jobs():
    assert toolchain.default_jobs() >= 1


# ---- architectures and instances ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "named", "codes"),
    [
        (NO_GPU, "", ["sm_80", "sm_90a", "compute_80"]),
        (Gpus(present=True), "", ["sm_80", "sm_90a", "compute_80"]),
        (H200, "", ["sm_90a", "compute_80"]),
        (Gpus(True, ((7, 5), (8, 6))), "", ["sm_86", "compute_80"]),
        (H200, "8.0;9.0", ["sm_80", "sm_90a"]),
        (H200, "9.0a 8.6+PTX", ["sm_90a", "sm_86", "compute_86"]),
        (NO_GPU, "10.0a", ["sm_100a"]),
    ],
)
def test_architectures(gpus, named, codes):
    assert toolchain.architectures(gpus, {"TORCH_CUDA_ARCH_LIST": named}) == codes


@pytest.mark.parametrize("named", ["7.5", "Hopper", "8.0;sm_90"])
def test_architectures_that_cannot_be(named):
    with pytest.raises(BuildError, match=r"TORCH_CUDA_ARCH_LIST must hold 8\.0 or later"):
        toolchain.architectures(NO_GPU, {"TORCH_CUDA_ARCH_LIST": named})


def test_gencode_flags():
    flags = toolchain.gencode_flags(["sm_90a", "compute_80"])
    assert flags == ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_80,code=compute_80"]


def select(codes=("sm_80",), **environ):
    return instances.Selection.from_environment({f"FLASH_EXT_{name}": value for name, value in environ.items()}, codes)


def test_developer_selection():
    selection = select(HEAD_DIMS="128,64", DTYPES="bf16")
    macros = {"FLASH_EXT_ELEMENTS": "__nv_bfloat16", "FLASH_EXT_HEAD_DIMS": "64,128"}
    assert dict(selection.macros()) == macros
    assert len(selection.sources()) == 2 * len(instances.KERNELS)
    with pytest.raises(BuildError, match="FLASH_EXT_HEAD_DIMS may name 64, 128, 256, got '96'"):
        select(HEAD_DIMS="96")


def test_kernels_for_sm_90a():
    selection = select(["sm_80", "sm_90a"], HEAD_DIMS="128,64", DTYPES="bf16,fp32")
    own = ["backward_v3", "forward_v3", "general_backward_v3", "general_forward_v3"]
    assert selection.kernels() == [*instances.KERNELS, *own]
    macros = dict(selection.macros())
    assert macros["FLASH_EXT_ELEMENTS"] == "float,__nv_bfloat16"
    assert macros["FLASH_EXT_FORWARD_V3_ELEMENTS"] == macros["FLASH_EXT_BACKWARD_V3_ELEMENTS"] == "__nv_bfloat16"
    assert macros["FLASH_EXT_FORWARD_V3_HEAD_DIMS"] == "64,96,128"
    assert macros["FLASH_EXT_BACKWARD_V3_HEAD_DIMS"] == "64,128"
    assert macros["FLASH_EXT_GENERAL_FORWARD_V3_HEAD_DIMS"] == "64,128"
    assert macros["FLASH_EXT_GENERAL_BACKWARD_V3_HEAD_DIMS"] == "64,128"
    only_256 = dict(select(["sm_90a"], HEAD_DIMS="256").macros())
    assert not any(name.startswith("FLASH_EXT_GENERAL_") for name in only_256)
    names = [name for name in selection.sources() if "_v3" in name]
    expected = [("backward", 128), ("backward", 64), ("forward", 128), ("forward", 96), ("forward", 64)]
    expected += [(f"general_{way}", head_dim) for way in ("backward", "forward") for head_dim in (128, 64)]
    assert names == [f"{direction}_v3_bf16_hdim{head_dim}.cu" for direction, head_dim in expected]


@pytest.mark.parametrize(
    "selection",
    [select(), select(["sm_86", "compute_80"]), select(["sm_100a"]), select(["sm_90a"], DTYPES="fp32")],
    ids=["sm_80", "sm_86", "sm_100a", "fp32 alone"],
)
def test_builds_without_v3(selection):
    assert not any("v3" in kernel for kernel in selection.kernels())
    assert not any("V3" in name for name, _ in selection.macros())
    assert not any("v3" in name for name in selection.sources())


@pytest.mark.parametrize("codes", [["sm_80"], ["sm_90a"]], ids="".join)
def test_instances_name_headers_that_exist(codes):
    sources = select(codes).sources()
    own = 2 * (5 + 3 + 2 + 2) if codes == ["sm_90a"] else 0  # v3's forward, backward and the general ones
    assert len(sources) == 3 * 3 * len(instances.KERNELS) + own
    for text in sources.values():
        assert (ROOT / "csrc" / text.split('"')[1]).exists()


def test_unchanged_instances_keep_their_time(tmp_path):
    selection = instances.Selection(dtypes=("fp16",), head_dims=(64,))
    first = {path: path.stat().st_mtime_ns for path in instances.write_sources(selection, tmp_path)}
    second = {path: path.stat().st_mtime_ns for path in instances.write_sources(selection, tmp_path)}
    assert first == second


# ---- ptxas's log --------------------------------------------------------------------------------------

LOG = """\
ptxas info    : Compiling entry function 'attention' for 'sm_80'
ptxas info    : Function properties for attention
    {spilled} bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""


def test_spills_fail_the_kernel_check(monkeypatch):
    assert check_kernels.read_log("v2", LOG.format(spilled=0)) == (
        ["sm_80    168 registers     0 B spilled  attention"],
        [],
    )
    _, problems = check_kernels.read_log("v2", LOG.format(spilled=8))
    assert problems == ["attention spills 8 B on sm_80; accepted: 0"]
    frame_alone = LOG.format(spilled=0).replace("0 bytes stack frame", "24 bytes stack frame")
    assert check_kernels.read_log("v2", frame_alone)[1] == ["attention spills 24 B on sm_80; accepted: 0"]
    monkeypatch.setitem(check_kernels.ACCEPTED_SPILLS, ("v2", "sm_80"), check_kernels.Accepted(8, "1%"))
    assert check_kernels.read_log("v2", LOG.format(spilled=8))[1] == []


@pytest.mark.parametrize("code", ["C7508", "C7510", "C7519"])
def test_serialised_instructions_fail_the_kernel_check(code):
    warning = f"ptxas info : ({code}) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert check_kernels.read_log("v3", LOG.format(spilled=0) + warning)[1] == [warning]


# ---- import -------------------------------------------------------------------------------------------


def record(torch_version="2.11.0+cu130", torch_cuda="13.0", cuda="13.0"):
    return {"torch_version": torch_version, "torch_cuda_version": torch_cuda, "cuda_version": cuda}


@pytest.mark.parametrize(
    ("built", "running"),
    [
        (record(), ("2.11.0+cu130", "13.0")),
        (record(), ("2.11.1+cu132", "13.2")),
        (record("2.13.0+cpu", None, None), ("2.13.0+cu130", "13.0")),
    ],
)
def test_import_under_a_torch_that_fits(built, running):
    extension.check_torch_matches(built, *running)


@pytest.mark.parametrize(
    ("built", "running"),
    [
        (record(), ("2.12.0+cu130", "13.0")),
        (record(), ("2.11.0+cu128", "12.8")),
        (record(), ("2.11.0+cpu", None)),
        (record("2.13.0+cpu", None, None), ("2.11.0", "13.0")),
    ],
)
def test_import_under_another_torch_says_what_to_do(built, running):
    with pytest.raises(ImportError) as error:
        extension.check_torch_matches(built, *running)
    assert f"built with torch {built['torch_version']}" in str(error.value)
    assert f"torch {running[0]}" in str(error.value)
    assert f"{sys.executable} -m pip install --no-build-isolation --no-deps --force-reinstall ." in str(error.value)


def test_this_build_is_recorded():
    info = extension.build_info()
    assert info["torch_version"].split("+")[0] == torch.__version__.split("+")[0]
    has_v3 = "sm_90a" in info["architectures"] and {"fp16", "bf16"} & set(info["dtypes"])
    assert ("forward_v3" in info["kernels"]) == ("backward_v3" in info["kernels"]) == bool(has_v3)
    json.dumps(info)


# ---- pip ----------------------------------------------------------------------------------------------


def test_isolated_build_uses_the_torch_that_will_run():
    assert Path(backend._site_of_installed_torch()) == Path(torch.__file__).parents[1]
    assert not [need for need in backend.get_requires_for_build_wheel() if need.startswith("torch")]


def test_isolated_build_installs_torch_where_there_is_none(monkeypatch):
    monkeypatch.setattr(backend, "_site_of_installed_torch", lambda: "")
    assert backend.get_requires_for_build_wheel()[-1].startswith("torch>=")


def test_missing_torch_is_an_error_with_the_command(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode != 0
    assert f"error: flash_ext: torch is not installed for {sys.executable}" in build.stderr
    assert f"{sys.executable} -m pip install torch" in build.stderr


# ---- lint ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text", "rule"),
    [
        ("csrc/v2/kernel.cuh", '#include "v1/config.cuh"', "include-order"),
        ("csrc/ptx/math.cuh", '#include "sm80/mma.cuh"', "include-order"),
        ("csrc/v3/forward/kernel.cuh", '#include "v2/config.cuh"', "include-order"),
        ("csrc/v2/kernel.cuh", "#include <torch/library.h>", "torch-free"),
        ("csrc/operators.cpp", "  // launch(params, stream);", "dead-code"),
        ("flash_ext/interface.py", "# out = out.contiguous()", "dead-code"),
        ("README.md", "see /home" "/someone/notes", "machine-path"),
        ("tests/test_long.py", "\n" * 401, "file-length"),
    ],
)
def test_lint_rules_see_what_they_forbid(path, text, rule):
    (found,) = lint_rules.violations(Path(path), text)
    assert found.startswith(rule)


def test_lint_rules_leave_prose_alone():
    prose = "// A row that has seen no key yet has the maximum -inf;\n// S = Q K^T of a tile, by the warps."
    assert list(lint_rules.violations(Path("csrc/v2/kernel.cuh"), prose)) == []
