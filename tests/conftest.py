"""What every test gets: the devices of this machine, a printed seed, and skips that name missing hardware."""

import zlib

import pytest
import torch
from calls import missing_for, serves

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
MISSING = "needs "  # every skip for lack of hardware starts with this


def pytest_addoption(parser):
    parser.addoption("--fuzz-cases", type=int, default=1000, help="random cases per device (test_fuzz*.py)")


def pytest_configure(config):
    # The tensors are tiny: a second thread costs more than it saves, above all beside other programs.
    # Tests of threading ask for more.
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "gpus(count): runs on a machine with at least so many NVIDIA GPUs")
    config.addinivalue_line("markers", "gpu_memory(gib): needs so much free memory on the GPU")
    config.addinivalue_line("markers", "hopper: runs where v3 does")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)
    if "fuzz_seed" in metafunc.fixturenames:
        metafunc.parametrize("fuzz_seed", range(metafunc.config.getoption("fuzz_cases")))


def parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def pytest_collection_modifyitems(items):
    """What an algorithm does not take is no test, rather than thousands of skipped ones."""
    items[:] = [item for item in items if serves(**parameters(item))]


def pytest_runtest_setup(item):
    if marker := item.get_closest_marker("gpus"):
        (count,) = marker.args
        if torch.cuda.device_count() < count:
            pytest.skip(f"{MISSING}{count} NVIDIA GPU{'s' if count > 1 else ''}")
    if marker := item.get_closest_marker("gpu_memory"):
        (gib,) = marker.args
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < gib * 2**30:
            pytest.skip(f"{MISSING}{gib} GiB of free GPU memory")
    algorithm = "v3" if item.get_closest_marker("hopper") else parameters(item).get("algorithm")
    if missing := missing_for(algorithm):
        pytest.skip(MISSING + missing)


@pytest.fixture(autouse=True)
def torch_seed(request):
    """Each test draws the same numbers whether it runs alone or with others. Shown when a test fails. Not called
    `seed`: a parameter of that name would take this fixture's place."""
    value = zlib.crc32(request.node.name.encode())
    print(f"torch.manual_seed({value})")
    torch.manual_seed(value)
    return value


def pytest_report_header():
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"torch {torch.__version__}, GPUs: {', '.join(gpus) or 'none'}"


def pytest_terminal_summary(terminalreporter):
    """How much was not run, and what it would have taken."""
    counts = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if reason.startswith(MISSING):
            counts[reason] = counts.get(reason, 0) + 1
    for reason, count in sorted(counts.items()):
        terminalreporter.write_line(f"not run: {count} tests ({reason})")
