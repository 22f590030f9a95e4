"""The training check: that it runs, that what it trains on is what it says, and that its verdict can be no."""

# ruff: noqa: E402

import math
import sys

import pytest
import torch

for package in ("rich", "matplotlib"):
    pytest.importorskip(package, reason=f"needs {package}, as the benchmarks do")

from benchmarks import readme_tables, record, train_check

STEPS = 60


def made_up_curves(ours=0.0):
    """Curves from 3 to about 1 nat, repetitions 0.01 apart; flash_ext's is `ours` away from the baseline's."""
    falling = [1 + 2 * math.exp(-step / 8) for step in range(STEPS)]

    def shifted(by):
        return [loss + by for loss in falling]

    nudged = {f"fp64, nudged {i}": shifted(by) for i, by in enumerate((0.0, 0.01), start=1)}
    return {"flash_ext": shifted(ours), "fp64": falling, **nudged, "SDPA": shifted(0.005)}


def test_verdict():
    verdict = train_check.judge(made_up_curves(ours=0.015))
    assert verdict["passed"]
    assert verdict["noise"] == pytest.approx(0.01)
    assert verdict["distances"] == pytest.approx({"flash_ext": 0.015, "SDPA": 0.005})
    assert not train_check.judge(made_up_curves(ours=0.025))["passed"]
    assert not train_check.judge(made_up_curves(ours=math.nan))["passed"]


def test_a_model_that_does_not_learn_proves_nothing():
    curves = {name: [3.0] * STEPS for name in made_up_curves()}
    assert not train_check.judge(curves)["passed"]


def test_lines_say_what_was_bound():
    bound = {}
    for line in train_check.make_text(20000, seed=1).splitlines()[:-1]:
        kind, *words = line.split()
        if kind == "let":
            bound[words[0]] = words[1]
        elif kind == "get":
            assert words[1] == bound[words[0]]
        else:
            assert int(words[0]) + int(words[1]) == int(words[2])


def test_batches_are_the_same_every_time():
    (vocabulary, first), (_, second) = (train_check.make_batches(3, 2, 50) for _ in range(2))
    assert first.shape == (3, 2, 51)
    assert torch.equal(first, second)
    assert first.max() < vocabulary


def test_a_short_run(tmp_path, monkeypatch):
    """A few steps: recorded, drawn, and nearer to the baseline than any planted error would be."""
    arguments = ["--steps", "6", "--batch", "2", "--seqlen", "64", "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_check", *arguments])
    assert train_check.main() == 1  # six steps teach nothing
    results = record.load_results("train_check", tmp_path)
    assert (tmp_path / "train_check.png").exists()
    assert {len(losses) for losses in results["curves"].values()} == {6}
    assert results["distances"]["flash_ext"] < 1e-2
    assert "| flash_ext |" in readme_tables.train_check_section(results)
