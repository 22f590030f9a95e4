"""The measuring instruments: a wrong baseline is found, a failing one is recorded, and records are read back."""

# ruff: noqa: E402

import dataclasses
import math

import pytest
import torch

for package in ("rich", "matplotlib"):
    pytest.importorskip(package, reason=f"needs {package}, as the benchmarks do")

from benchmarks import baselines, io_model, readme_tables, record
from benchmarks.baselines import BASELINES, GRADIENT_CHECK_SEQLEN, check_forward
from benchmarks.cases import AttentionCase, attention_flops
from benchmarks.comparison import compare
from benchmarks.gpu_check import read_junit
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
    v2, v1 = sum(io_model.v2_bytes(case, 128)), sum(io_model.v1_bytes(case, 128))
    assert least < v2 < v1 < sum(io_model.naive_bytes(case))
    one_tile = io_model.v2_bytes(case, case.seqlen)
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
