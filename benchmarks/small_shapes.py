"""v1, v2 and v3 against naive attention (on a CPU: against torch's SDPA) where the promises are made.

One head of 1024 tokens, where a launch costs as much as the work; v1 with enough heads to fill the GPU;
few tiles; fp16 and grouped queries with v3, and its deterministic gradients; and fp32, where naive attention
is a chain of cuBLAS calls.
GPU time by graph replay, inputs rotated through more memory than the L2 cache holds.
"""

import argparse
import sys

from benchmarks import baselines, record, tables
from benchmarks.cases import AttentionCase
from benchmarks.comparison import compare
from benchmarks.timing import Plan

FORWARD, BOTH = ("forward",), ("forward", "backward")
GENERATIONS = ("naive", "flash_ext_v1", "flash_ext_v2", "flash_ext_v3")


def groups(device):
    """Map a group to (implementations, passes, cases); the first implementation is the base of ratios."""
    if device.type == "cpu":
        cases = [AttentionCase(1, 8, 2048, 64, "fp32", causal) for causal in (False, True)]
        return {"cpu": (("sdpa", "flash_ext_v1", "flash_ext_v2"), BOTH, cases)}
    return {
        "one_head": (
            GENERATIONS,
            FORWARD,
            [AttentionCase(4, 1, 1024, 64, dtype) for dtype in ("fp16", "bf16", "fp32")],
        ),
        "full_gpu": (
            GENERATIONS,
            FORWARD,
            [
                AttentionCase(batch, heads, seqlen, 64, dtype)
                for dtype in ("fp16", "bf16")
                for batch, heads in ((11, 12), (16, 16))
                for seqlen in (1024, 2048, 4096)
            ],
        ),
        "few_tiles": (
            ("sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "flash_ext_v2", "flash_ext_v3"),
            BOTH,
            [AttentionCase(*shape, "bf16") for shape in FEW_TILES],
        ),
        "hopper": (
            ("sdpa_cudnn", "flash_ext_v3"),
            BOTH,
            [
                *(AttentionCase(*shape, dtype, True) for shape in SAME_WORK for dtype in ("bf16", "fp16")),
                AttentionCase(4, 32, 4096, 128, "bf16", True, heads_kv=8),
            ],
        ),
        "deterministic": (
            ("flash_ext_v3", "flash_ext_v3_deterministic"),
            ("backward",),
            [AttentionCase(2, 16, 8192, 128, "bf16", causal) for causal in (False, True)],
        ),
        "flash": (
            ("sdpa_flash", "flash_ext_v2"),
            BOTH,
            [
                *(AttentionCase(*shape, dtype, True) for shape in SAME_WORK for dtype in ("bf16", "fp16")),
                *(AttentionCase(4, 32, 4096, 128, "bf16", True, heads_kv) for heads_kv in (8, 1)),
            ],
        ),
        "fp32": (
            ("naive", "flash_ext_v2"),
            BOTH,
            [AttentionCase(*shape, "fp32") for shape in FP32_SHAPES],
        ),
        "fp32_long": (
            ("sdpa_efficient", "flash_ext_v2"),
            BOTH,
            [AttentionCase(*shape, "fp32") for shape in SAME_WORK[:2]],
        ),
    }


# Few sequences, so that most multiprocessors have nothing to do.
FEW_TILES = (
    (1, 1, 256, 64),
    (2, 1, 512, 64),
    (1, 8, 512, 64),
    (4, 1, 1024, 64),
    (1, 1, 4096, 64),
    (1, 8, 1024, 128),
    (1, 1, 4096, 128),
)
# 16k tokens, hidden size 4096.
SAME_WORK = ((4, 64, 4096, 64), (4, 32, 4096, 128), (4, 16, 4096, 256))
FP32_SHAPES = (
    (2, 1, 512, 64),
    (4, 1, 1024, 64),
    (2, 16, 512, 64),
    (2, 16, 2048, 64),
    (2, 16, 512, 128),
    (2, 8, 2048, 128),
    (1, 8, 2048, 256),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    record.add_output_option(parser)
    options = parser.parse_args()
    device, screen = record.default_device(), tables.console()
    baselines.use_full_fp32()
    plan = Plan(rounds=options.rounds, slot_ms=5.0, limit_ms=5000.0, max_seconds=20)

    rows, ratios = [], []
    for group, (names, passes, cases) in groups(device).items():
        screen.print(f"\n[bold]{group}[/]: speed over {tables.LABELS[names[0]]}")
        for case in cases:
            case_rows = compare(case, names, passes, device, plan)
            rows += case_rows
            for (pass_name, name), ratio in tables.speedups(case_rows, over=names[0]).items():
                if name != names[0]:
                    line = {"group": group, "pass": pass_name, **case.record(), "impl": name}
                    ratios.append(line | {"over": names[0], "ratio": ratio})
                    screen.print(
                        f"  {case.label():<28}{pass_name:<10}{tables.LABELS[name]:<14}{ratio:6.2f}x",
                        highlight=False,
                    )
    for line in tables.notes(rows):
        screen.print(f"  {line}", style="dim", markup=False)
    timed, failed = record.split_rows(rows)
    payload = {"ratios": ratios, "rows": timed, "not_timed": failed}
    path = record.write_results("small_shapes", device, payload, options.output_dir)
    screen.print(f"\nresults: {path}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
