"""Writes the recorded results into README.md, between comment markers such as

    <!-- begin:attention -->
    <!-- end:attention -->

so that no figure there is typed by hand. A marker may name another device's folder, as in
begin:demo:cpu. With --check nothing is written, and a README that differs is an error.
"""

import argparse
import re
import sys

from benchmarks import record
from benchmarks.cases import PASSES
from benchmarks.tables import LABELS, LADDER, format_bytes, format_ms, format_tflops, ladder_rows, speedups

DEFAULT_DEVICE = "nvidia-h200"
# Groups: the first marker, section, device, what is between, the last marker.
MARKER = re.compile(r"(<!-- begin:([a-z_]+)(?::([a-z0-9-]+))? -->\n)(.*?)(<!-- end:\2(?::[a-z0-9-]+)? -->)", re.DOTALL)


def markdown_table(header, rows):
    columns = zip(*rows, strict=True)
    aligned = ["---:" if all(map(_is_number, column)) else "---" for column in columns]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (header, aligned, *rows))


def _is_number(cell):
    return re.match(r"-$|[-\d]+[\d.,%]*( |x|$)", str(cell)) is not None


def source_line(results, command, extra=""):
    """What a table was measured on, and the command that makes it again."""
    where = results["gpu"] or results["cpu"]
    driver = f", driver {results['driver']}" if results["driver"] else ""
    commit = results["commit"][:10] + (" and uncommitted changes" if results["dirty"] else "")
    return f"{where}{driver}, torch {results['torch']}, commit {commit}, {results['date'][:10]}; `{command}`.{extra}"


def attention_section(results):
    """TFLOP/s at each sequence length, one table per pass and mask."""
    sections = []
    rows = results["rows"]
    names = [name for name in LABELS if any(row["impl"] == name for row in rows)]
    for pass_name in PASSES:
        for causal in (False, True):
            chosen = [row for row in rows if row["pass"] == pass_name and row["causal"] == causal]
            shapes = sorted({(row["head_dim"], row["seqlen"]) for row in chosen})
            if not shapes:
                continue
            at = {(row["head_dim"], row["seqlen"], row["impl"]): row for row in chosen}
            lines = [
                [head_dim, seqlen, *(_tflops_cell(at.get((head_dim, seqlen, name))) for name in names)]
                for head_dim, seqlen in shapes
            ]
            title = f"**{pass_name}{', causal' if causal else ''}** (TFLOP/s)"
            header = ["head_dim", "seqlen", *(LABELS[name] for name in names)]
            sections.append(f"{title}\n\n{markdown_table(header, lines)}")
    sections.append(ratio_section(results))
    sections.append(source_line(results, "make bench"))
    return "\n\n".join(sections)


def _tflops_cell(row):
    if row is None:
        return "-"
    wrong = "" if row.get("check", "passed") == "passed" else " (wrong result)"
    return format_tflops(row["tflops"]) + wrong


def ratio_section(results):
    columns = [(ours, pass_name) for pass_name in PASSES for ours in ("v2", "v3")]
    lines = []
    for other in LABELS:
        means = [results["ratios"].get(p, {}).get(f"flash_ext_{ours}/{other}") for ours, p in columns]
        if any(means):
            lines.append([LABELS[other], *map(_ratio_cell, means)])
    title = "**v2 and v3 over the others** (geometric mean, in brackets the worst shape)"
    return f"{title}\n\n{markdown_table(['', *(f'{ours}, {p}' for ours, p in columns)], lines)}"


def _ratio_cell(mean):
    return "-" if mean is None else f"{mean['ratio']:.2f} ({mean['worst']:.2f})"


def ratios_section(results):
    """The ratios alone, for a README that shows the plot instead of the tables."""
    ended = f" The run ended early: {results['ended_early']}." if results.get("ended_early") else ""
    return f"{ratio_section(results)}\n\n{source_line(results, 'make bench', ended)}"


def ladder_section(results):
    """TFLOP/s of each generation at each sequence length, and what it gained over the one before."""
    steps = (("v1", "v2"), ("v2", "v3"))
    at = {(row["causal"], row["seqlen"], row["impl"]): row for row in ladder_rows(results["rows"])}
    lines = []
    for causal, seqlen in sorted({key[:2] for key in at}):
        row = {name: at.get((causal, seqlen, name)) for name in LADDER}
        gains = [_gain_cell(row.get(f"flash_ext_{old}"), row.get(f"flash_ext_{new}")) for old, new in steps]
        lines.append([seqlen, "yes" if causal else "no", *map(_tflops_cell, row.values()), *gains])
    header = ["seqlen", "causal", *(LABELS[name] for name in LADDER), *(f"{new} over {old}" for old, new in steps)]
    return f"{markdown_table(header, lines)}\n\n{source_line(results, 'make bench')}"


def _gain_cell(old, new):
    return "-" if old is None or new is None else f"{old['ms'] / new['ms']:.2f}x"


def demo_section(results):
    """Time, and speed-up over naive, of each implementation on each of the demo's shapes."""
    shapes = {}
    for row in results["rows"]:
        heads = f"{row['heads']}/{row['heads_kv']}" if "heads_kv" in row else row["heads"]
        mask = " causal" if row["causal"] else ""
        label = f"{row['batch']}x{heads}x{row['seqlen']}x{row['head_dim']} {row['dtype']}{mask}"
        shapes.setdefault(label, []).append(row)
    names = [name for name in LABELS if any(row["impl"] == name for row in results["rows"])]
    sections = []
    for pass_name in PASSES:
        lines = []
        for label, rows in shapes.items():
            ratio = speedups(rows)
            times = {row["impl"]: row["ms"] for row in rows if row["pass"] == pass_name}
            cells = [_time_cell(times.get(name), ratio.get((pass_name, name))) for name in names]
            lines.append([label, *cells])
        header = ["batch x heads x seqlen x head_dim", *(LABELS[name] for name in names)]
        sections.append(f"**{pass_name}** (speed-up over naive)\n\n{markdown_table(header, lines)}")
    return "\n\n".join([*sections, source_line(results, "make demo")])


def _time_cell(ms, speedup):
    if ms is None:
        return "-"
    return format_ms(ms) + (f" ({speedup:.2f}x)" if speedup is not None else "")


def memory_section(results):
    lines = [
        [
            f"{row['batch']} x {row['seqlen']} {row['dtype']}",
            row["pass"],
            LABELS[row["impl"]],
            f"{row['saved']:.1%}",
        ]
        for row in results["savings"]
    ]
    short = markdown_table(["batch x seqlen", "pass", "", "saved"], lines)
    names = list(dict.fromkeys(row["impl"] for row in results["long"]))
    at = {(row["seqlen"], row["pass"], row["impl"]): row["extra_bytes"] for row in results["long"]}
    measured = {key[1:] for key, count in at.items() if count is not None}
    columns = [(pass_name, name) for pass_name in PASSES for name in names if (pass_name, name) in measured]
    lines = [
        [f"{seqlen // 1024}k", *(_bytes_cell(at.get((seqlen, *column))) for column in columns)]
        for seqlen in sorted({row["seqlen"] for row in results["long"]})
    ]
    header = ["seqlen", *(f"{LABELS[name]}, {pass_name}" for pass_name, name in columns)]
    note = " Backward is a forward and a backward together."
    return "\n\n".join(
        [short, markdown_table(header, lines), source_line(results, "python -m benchmarks.memory", note)]
    )


def _bytes_cell(count):
    return "-" if count is None else format_bytes(count)


def host_time_section(results):
    shapes = {}
    for row in results["rows"]:
        label = f"{row['batch']}x{row['heads']}x{row['seqlen']}x{row['head_dim']} {row['dtype']}"
        key = (label + (" causal" if row["causal"] else ""), "yes" if row["grad"] else "no")
        shapes.setdefault(key, {})[row["impl"]] = row["us"]
    names = list(dict.fromkeys(row["impl"] for row in results["rows"]))
    lines = [[*key, *(f"{times[name]:.1f} us" for name in names)] for key, times in shapes.items()]
    header = ["batch x heads x seqlen x head_dim", "gradients", *(LABELS[name] for name in names)]
    return f"{markdown_table(header, lines)}\n\n{source_line(results, 'python -m benchmarks.host_time')}"


def hbm_traffic_section(results):
    columns = ("read_bytes", "model_read_bytes", "write_bytes", "model_write_bytes")
    lines = [
        [row["seqlen"], LABELS[row["impl"]], *(_bytes_cell(row[column]) for column in columns)]
        for row in sorted(results["rows"], key=lambda row: row["seqlen"])
    ]
    table = markdown_table(["seqlen", "", "read", "model", "written", "model"], lines)
    reasons = "".join(f" {LABELS[name]}: {reason}." for name, reason in results["not_run"].items())
    return f"{table}\n\n{source_line(results, 'python -m benchmarks.hbm_traffic', reasons)}"


def claims_section(results):
    verdicts = {True: "met", False: "**missed**", None: "not run"}
    lines = [
        [row["row"], row["target"], row["measured"] or "-", verdicts[row["met"]], f"`{row['command']}`"]
        for row in results["rows"]
    ]
    return markdown_table(["what", "at least", "measured", "", "command"], lines)


def gpu_check_section(results):
    lines = []
    for name in ("tests", "memory", "repeatability"):
        result = results.get(name, {"status": "not run"})
        counts = ("tests", "failures", "errors", "skipped", "calls", "repeats")
        details = ", ".join(f"{result[key]} {key}" for key in counts if key in result)
        lines.append([name, result["status"], details or result.get("reason", "")])
    return f"{markdown_table(['', 'status', ''], lines)}\n\n{source_line(results, 'make gpu-check')}"


def train_check_section(results):
    lines = [
        [name, f"{results['final_losses'][name]:.4f}", f"{results['distances'].get(name, 0.0):.4f}"]
        for name in ("fp64", *results["distances"])
    ]
    table = markdown_table(["attention", "loss at the end", "farthest from fp64"], lines)
    verdict = "passed" if results["passed"] else "**failed**"
    noise = f" {results['steps']} steps; noise {results['noise']:.4f}, allowed {results['allowed']:.4f}: {verdict}."
    return f"{table}\n\n{source_line(results, 'make train-check', noise)}"


def build_section(results):
    lines = [[row["build"], row["jobs"], f"{row['seconds']:.0f} s"] for row in results["rows"]]
    memory = f" Largest process: {format_bytes(results['largest_process_bytes'])}."
    table = markdown_table(["build", "MAX_JOBS", "time"], lines)
    return f"{table}\n\n{source_line(results, 'python -m benchmarks.build_time', memory)}"


def features_section(results):
    """What general attention's arguments cost, and how they fare beside others."""
    kinds = [(head_dim, pass_name) for head_dim in (64, 128) for pass_name in PASSES]
    header = [f"{pass_name}, d={head_dim}" for head_dim, pass_name in kinds]

    times, costs = {}, {}
    for row in results["rows"]:
        times[row["contest"], row["head_dim"], row["pass"], row["impl"]] = row["ms"]
    for (contest, *kind, name), ms in times.items():
        plain = times.get((contest, *kind, PLAIN))
        if contest in ("scores", "masks") and plain is not None and "SDPA" not in name and "Flex" not in name:
            costs.setdefault(name, {})[tuple(kind)] = f"{ms / plain:.2f}"
    lines = [[name, *(cells.get(kind, "-") for kind in kinds)] for name, cells in costs.items() if name != PLAIN]
    cost_table = markdown_table(["argument", *header], lines)

    ratios = {}
    for line in results["promises"]:
        over = re.sub(r", .*", "", line["over"]) if line["over"] != PLAIN else PLAIN
        key = (line["contest"], line["ours"], over, line["pass"])
        cell = "not run" if line["ratio"] is None else f"{line['ratio']:.2f}"
        ratios.setdefault(key, {"at_least": line["at_least"]})[line["head_dim"]] = cell
    lines = [
        [_feature_name(contest, ours), over, pass_name, cells["at_least"], cells.get(64, "-"), cells.get(128, "-")]
        for (contest, ours, over, pass_name), cells in ratios.items()
    ]
    ratio_table = markdown_table(["what", "over", "pass", "aim", "d=64", "d=128"], lines)
    return "\n\n".join([cost_table, ratio_table, source_line(results, "python -m benchmarks.features")])


def _feature_name(contest, ours):
    return contest if ours in contest else f"{contest}: {ours}"


PLAIN = "v3, plain"  # the contender that costs are relative to

SECTIONS = {
    "attention": ("attention", attention_section),
    "ratios": ("attention", ratios_section),
    "ladder": ("attention", ladder_section),
    "demo": ("demo", demo_section),
    "memory": ("memory", memory_section),
    "host_time": ("host_time", host_time_section),
    "hbm_traffic": ("hbm_traffic", hbm_traffic_section),
    "claims": ("claims", claims_section),
    "gpu_check": ("gpu_check", gpu_check_section),
    "train_check": ("train_check", train_check_section),
    "build": ("build", build_section),
    "features": ("features", features_section),
}


def fill(text):
    """`text` with every marked section regenerated; one without a recorded result stays as it is."""

    def replace(match):
        begin, name, device, _, end = match.groups()
        if name not in SECTIONS:
            raise SystemExit(f"README.md: no section is called {name!r}; known: {', '.join(SECTIONS)}")
        file_name, section = SECTIONS[name]
        results = record.load_results(file_name, record.RESULTS / (device or DEFAULT_DEVICE))
        return match.group(0) if results is None else f"{begin}{section(results)}\n{end}"

    return MARKER.sub(replace, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if README.md is not up to date")
    options = parser.parse_args()
    readme = record.ROOT / "README.md"
    old = readme.read_text()
    new = fill(old)
    if options.check:
        if new != old:
            print("README.md differs from the recorded results: run python -m benchmarks.readme_tables")
        return int(new != old)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
