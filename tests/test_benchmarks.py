"""The measuring instruments: a wrong baseline is found, a failing one is recorded, and records are read back."""

# ruff: noqa: E402

import argparse
import dataclasses
import itertools
import math

import pytest
import torch

for package in ("rich", "matplotlib"):
    pytest.importorskip(package, reason=f"needs {package}, as the benchmarks do")

from benchmarks import baselines, bench_attention, claims, io_model, readme_tables, record, tables
from benchmarks.baselines import BASELINES, GRADIENT_CHECK_SEQLEN, check_forward
from benchmarks.cases import PASSES, AttentionCase, attention_flops
from benchmarks.comparison import compare
from benchmarks.gpu_check import read_junit, repeated_cases
from benchmarks.hbm_traffic import parse_counters, split_calls
from benchmarks.record import split_rows
from benchmarks.timing import Contender, Plan, time_contenders

CPU = torch.device("cpu")
QUICK = Plan(rounds=3, slot_ms=0.1)
ON_CPU = [name for name, baseline in BASELINES.items() if "cpu" in baseline.devices]


def test_flops_follow_the_papers_convention():
    case = AttentionCase(2, 3, 128, 64)
    assert attention_flops(case, "forward") == 4 * 2 * 3 * 128 * 128 * 64
    assert attention_flops(case, "backward") == 2.5 * attention_flops(case, "forward")
    assert attention_flops(case.with_(causal=True), "forward") == attention_flops(case, "forward") / 2


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_kv", [None, 2])
def test_every_baseline_passes_its_check(name, causal, heads_kv):
    case = AttentionCase(1, 4, 100, 32, "fp32", causal, heads_kv, layout="bshd")
    rows = compare(case, [name], ("forward", "backward"), CPU, QUICK)
    assert [row["check"] for row in rows if not BASELINES[name].refusal(case, row["pass"], CPU)] == ["passed"] * (
        1 if BASELINES[name].shares_backward_of else 2
    )


@pytest.mark.parametrize("row", [0, 3, -1])
def test_one_wrong_row_fails_the_check(row):
    def wrong(q, k, v, causal):
        out = baselines.naive(q, k, v, causal)
        out[:, :, row] += 0.1
        return out

    case = AttentionCase(2, 2, 300, 32, "fp16", causal=True)
    q, k, v, _ = case.make_inputs(CPU)
    assert check_forward(BASELINES["naive"], case, q, k, v) is None
    assert "off by" in check_forward(dataclasses.replace(BASELINES["naive"], run=wrong), case, q, k, v)


def test_a_failing_implementation_becomes_a_row(monkeypatch):
    def broken(q, k, v, causal):
        raise RuntimeError("no kernel here\nmore text")

    monkeypatch.setitem(BASELINES, "sdpa", dataclasses.replace(BASELINES["sdpa"], run=broken))
    rows = compare(AttentionCase(1, 1, 16, 16, "fp32"), ["naive", "sdpa"], ("forward",), CPU, QUICK)
    timed, failed = split_rows(rows)
    assert [row["impl"] for row in timed] == ["naive"]
    assert timed[0]["ms"] > 0
    assert "error" not in timed[0]
    assert failed[0]["error"] == "RuntimeError: no kernel here"


def test_quadratic_baselines_are_refused_before_they_run_out_of_memory():
    huge = AttentionCase(1, 1024, 1 << 17, 64)
    assert "GiB" in BASELINES["naive"].refusal(huge, "forward", CPU)
    assert BASELINES["flash_ext_v2"].refusal(huge, "forward", CPU) is None
    assert baselines.small_problem(huge).seqlen == GRADIENT_CHECK_SEQLEN


def test_contenders_are_timed_per_call():
    runs = []
    timings = time_contenders({"x": Contender(lambda: runs.append(1), calls=4)}, CPU, QUICK)
    assert timings["x"].rounds == QUICK.rounds
    assert 0 < timings["x"].ms < 1


COUNTERS = """==PROF== Connected
"ID","Process ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum"
"","","","byte","byte"
"0","7","spin_kernel(long)","64","0"
"1","7","forward_kernel","1,000","20"
"2","7","spin_kernel(long)","64","0"
"3","7","reduce_kernel","536,870,912","300"
"4","7","spin_kernel(long)","64","0"
"5","7","forward_kernel","2,000","40"
"6","7","spin_kernel(long)","64","0"
"7","7","reduce_kernel","536,870,912","0"
"""


def test_traffic_of_a_call_holds_what_is_written_back_after_it():
    assert split_calls(parse_counters(COUNTERS)) == [(1000, 320), (2000, 40)]
    assert parse_counters("==ERROR== no permission") == []


def test_io_models_keep_their_order():
    case = AttentionCase(1, 1, 8192, 64, "fp16")
    least = sum(io_model.compulsory_bytes(case))
    v2, v1 = sum(io_model.q_outer_bytes(case, 128)), sum(io_model.v1_bytes(case, 128))
    assert least < v2 < v1 < sum(io_model.naive_bytes(case))
    one_tile = io_model.q_outer_bytes(case, case.seqlen)
    assert math.isclose(sum(one_tile), least, rel_tol=0.02)


def test_junit_report_is_counted(tmp_path):
    report = tmp_path / "junit.xml"
    report.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1" time="2.5">'
        '<testcase classname="a" name="x"/><testcase classname="a" name="y"><failure/></testcase>'
        '<testcase classname="a" name="z"><skipped message="needs 2 GPUs"/></testcase>'
        "</testsuite></testsuites>"
    )
    counts, failed = read_junit(report)
    assert counts["tests"] == 3
    assert counts["skip_reasons"] == {"needs 2 GPUs": 1}
    assert failed == ["a::y"]


def test_v3_is_for_hopper(monkeypatch):
    case, device = AttentionCase(1, 1, 128, 64), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert BASELINES["flash_ext_v3"].refusal(case, "forward", device) == "needs compute capability 9.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for pass_name in PASSES:
        assert BASELINES["flash_ext_v3"].refusal(case, pass_name, device) is None
    assert "fp32" not in BASELINES["flash_ext_v3"].dtypes
    assert BASELINES["flash_ext_v1"].refusal(case, "backward", device) == "shares the backward of flash_ext_v2"


def test_repeated_cases():
    assert {algorithm for algorithm, _ in repeated_cases(True)} == {"v2", "v3"}
    assert {algorithm for algorithm, _ in repeated_cases(False)} == {"v2"}


def recorded_grid(folder, speeds):
    """An attention.json in which each implementation has one speed; one without a speed was not timed."""
    options = argparse.Namespace(
        tokens=bench_attention.TOKENS, dtype="bf16", causal="both",
        head_dim=bench_attention.HEAD_DIMS, seqlen=bench_attention.SEQLENS,
    )  # fmt: skip
    timed, failed = [], []
    for case, pass_name in itertools.product(bench_attention.grid_cases(options), PASSES):
        for name, speed in speeds.items():
            row = {"pass": pass_name, **case.record(), "impl": name}
            if speed is None:
                failed.append(row | {"error": "too slow"})
            else:
                timed.append(row | {"ms": 1 / speed, "tflops": 100 * speed, "check": "passed"})
    ratios = bench_attention.ratios(timed)
    payload = {"gpu": "NVIDIA H200", "commit": "abc", "rows": timed, "not_timed": failed, "ratios": ratios}
    record.write_results("attention", CPU, payload, folder)


def claims_on_v3(folder, pass_name):
    """Those that follow from the grid."""
    rows = [row for row in claims.claims(folder) if row["row"].startswith(f"v3 {pass_name}")]
    return [row for row in rows if row["command"].endswith("bench_attention")]


@pytest.mark.parametrize("pass_name", PASSES)
def test_claims_on_v3(tmp_path, pass_name):
    assert {row["measured"] for row in claims_on_v3(tmp_path, pass_name)} == {None}
    recorded_grid(tmp_path, {"sdpa_cudnn": 1.0, "flash_ext_v3": 1.1})
    measured = [float(row["measured"]) for row in claims_on_v3(tmp_path, pass_name)]
    cells = claims.PEERS[pass_name]
    peers = [row["best_over_cudnn"] for row in cells]

    def mean(rows):
        return math.exp(sum(math.log(1.1 / row["best_over_cudnn"]) for row in rows) / len(rows))

    short = [row for row in cells if row["seqlen"] <= 1024]
    wide = [row for row in cells if row["head_dim"] == 256]
    ends = [1.1 / max(peers), sum(peer <= 1.1 for peer in peers)]
    if pass_name == "forward":
        expected = [1.1, 1.1, mean(cells), *ends]  # the first at 512 and 1k
    else:
        expected = [1.1, mean(cells), mean(short), mean(wide), *ends]
    assert measured == pytest.approx(expected, abs=0.006)
    recorded_grid(tmp_path, {"sdpa_cudnn": 1.0})
    assert {row["measured"] for row in claims_on_v3(tmp_path, pass_name)} == {None}


def claims_on_v2(folder, command):
    return [
        row["measured"]
        for row in claims.claims(folder)
        if row["row"].startswith("v2") and "SDPA" in row["row"] and row["command"].endswith(command)
    ]


def test_claims_on_v2(tmp_path):
    assert claims_on_v2(tmp_path, "bench_attention") == [None] * 4
    recorded_grid(tmp_path, {"sdpa_flash": 1.0, "flash_ext_v2": 1.2})
    assert claims_on_v2(tmp_path, "bench_attention") == ["1.20"] * 4


def test_claims_on_few_tiles(tmp_path):
    """Over the best backend of SDPA, at the worst of the shapes; all of them or none."""
    assert claims_on_v2(tmp_path, "small_shapes") == [None] * 6
    speeds = {"sdpa_flash": 1.0, "sdpa_cudnn": 2.0, "flash_ext_v2": 3.0}
    rows = [
        {"pass": "forward", **AttentionCase(*shape, "bf16").record(), "impl": name, "ms": 1 / speed}
        for shape in ((1, 1, 256, 64), (2, 1, 512, 64), (4, 1, 1024, 64))
        for name, speed in speeds.items()
    ]
    record.write_results("small_shapes", CPU, {"gpu": "NVIDIA H200", "rows": rows}, tmp_path)
    assert claims_on_v2(tmp_path, "small_shapes") == ["1.50", *[None] * 5]


def recorded_layers(folder, speeds, gpu="NVIDIA H200"):
    """A small_shapes.json of one layer of a model, without and with grouped queries; `speeds` as recorded_grid's."""
    rows = [
        {"pass": pass_name, **case.record(), "impl": name, "ms": 1 / speed, "tflops": 100 * speed}
        for case in (AttentionCase(4, 32, 4096, 128, "bf16", True, heads_kv) for heads_kv in (None, 8))
        for pass_name in PASSES
        for name, speed in speeds.items()
    ]
    record.write_results("small_shapes", CPU, {"gpu": gpu, "rows": rows}, folder)


def claims_on_steps(folder):
    return [row["measured"] for row in claims.claims(folder) if row["row"].startswith("v3 forward and backward")]


def test_claims_on_one_training_step(tmp_path):
    assert claims_on_steps(tmp_path) == [None, None]
    recorded_layers(tmp_path, {"sdpa_cudnn": 1.0, "flash_ext_v3": 1.5})
    cell = {"head_dim": 128, "causal": True, "seqlen": 4096}
    peers = [row for p in PASSES for row in claims.PEERS[p] if cell.items() <= row.items()]
    expected = 1.5 * sum(1 / row["best_over_cudnn"] for row in peers) / 2
    assert list(map(float, claims_on_steps(tmp_path))) == pytest.approx([expected] * 2, abs=0.006)
    recorded_layers(tmp_path, {"sdpa_cudnn": 1.0, "flash_ext_v3": 1.5}, gpu="another")
    assert claims_on_steps(tmp_path) == [None, None]


def test_peers_cover_the_grid_and_say_what_they_are():
    wanted = {(d, causal, n) for d in (64, 128, 256) for causal in (False, True) for n in bench_attention.SEQLENS}
    for pass_name in PASSES:
        peers = claims.PEERS[pass_name]
        assert {(row["head_dim"], row["causal"], row["seqlen"]) for row in peers} == wanted
        assert all(row["best_over_cudnn"] >= 1 for row in peers)
    for name in ("FlashAttention-3", "FlashAttention-4", "measured separately, by us"):
        assert name in claims.PEERS["what"]


def test_ladder_is_taken_from_the_grid(tmp_path):
    recorded_grid(tmp_path, dict(zip(tables.LADDER, (0.5, None, 2.0, 4.0, 2.0, 3.5), strict=True)))
    results = record.load_results("attention", tmp_path)
    line = readme_tables.ladder_section(results).splitlines()[2]
    assert line == "| 512 | no | 50.0 | - | 200 | 400 | 200 | 350 | - | 2.00x |"
    assert "commit abc" in readme_tables.ladder_section(results)
    bench_attention.plot(results["rows"], tmp_path / "attention.json", "a GPU", 16384, tables.console())
    assert (tmp_path / "attention.png").exists()
    assert (tmp_path / "attention_ladder.png").exists()


def test_readme_sections_come_from_the_records(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    rows = [{"row": "speed", "target": "1.0", "measured": "2.0", "met": True, "command": "c"}]
    record.write_results("claims", CPU, {"rows": rows}, tmp_path / "cpu")
    kept = "<!-- begin:demo:cpu -->\nold\n<!-- end:demo:cpu -->\n"
    text = "a\n<!-- begin:claims:cpu -->\nold\n<!-- end:claims:cpu -->\n" + kept
    new = readme_tables.fill(text)
    assert "| speed | 1.0 | 2.0 | met | `c` |" in new
    assert new.endswith(kept)
    assert readme_tables.fill(new) == new
