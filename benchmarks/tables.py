"""Terminal tables of the results, at most 100 columns wide."""

import math

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

WIDTH = 100
LABELS = {
    "naive": "naive",
    "sdpa": "SDPA",
    "sdpa_flash": "SDPA flash",
    "sdpa_cudnn": "SDPA cuDNN",
    "sdpa_efficient": "SDPA efficient",
    "sdpa_math": "SDPA math",
    "flash_ext_v1": "flash_ext v1",
    "flash_ext_v2": "flash_ext v2",
    "flash_ext_v3": "flash_ext v3",
    "flash_ext_v3_deterministic": "flash_ext v3, deterministic",
}
STYLES = {"flash_ext_v1": "bold", "flash_ext_v2": "bold", "flash_ext_v3": "bold green", "naive": "dim"}


# What each generation bought, on the grid's middle head_dim.
LADDER = ("naive", "flash_ext_v1", "flash_ext_v2", "flash_ext_v3", "sdpa_flash", "sdpa_cudnn")
LADDER_HEAD_DIM = 128

# Of the grid: each generation beside the one that torch has of it.
RATIOS = (("flash_ext_v2", "sdpa_flash"), ("flash_ext_v3", "sdpa_cudnn"))


def ladder_rows(rows):
    """The forward rows of the grid that show the generations side by side."""
    chosen = [row for row in rows if (row["pass"], row["head_dim"]) == ("forward", LADDER_HEAD_DIM)]
    return [row for name in LADDER for row in chosen if row["impl"] == name]


def console():
    """A terminal narrower than the tables wraps them; one that is not a terminal gets their full width."""
    screen = Console()
    return screen if screen.is_terminal else Console(width=WIDTH)


def progress_bar(screen):
    return Progress(
        TextColumn("{task.description:<36}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=screen,
    )


def format_ms(ms):
    if ms is None:
        return "-"
    return f"{1e3 * ms:.1f} us" if ms < 1 else f"{ms:.2f} ms" if ms < 100 else f"{ms:.0f} ms"


def format_bytes(count):
    if count is None:
        return "n/a"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def format_tflops(tflops):
    if tflops is None:
        return "-"
    return f"{tflops:.0f}" if tflops >= 100 else f"{tflops:.1f}" if tflops >= 1 else f"{tflops:.4f}"


def speedups(rows, over="naive"):
    """Map (pass, implementation) to the time of `over` divided by its own, for the rows of one case."""
    base = {row["pass"]: row["ms"] for row in rows if row["impl"] == over}
    return {
        (row["pass"], row["impl"]): base[row["pass"]] / row["ms"]
        for row in rows
        if row["ms"] is not None and base.get(row["pass"]) is not None
    }


def geometric_mean(values):
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def case_table(label, rows):
    """Forward and backward of every implementation on one case, side by side."""
    with_memory = any(row.get("extra_bytes") is not None for row in rows)
    table = _table(label)
    table.add_column(no_wrap=True, min_width=14)
    for pass_name in ("forward", "backward"):
        table.add_column(pass_name, justify="right", no_wrap=True, min_width=10)
        table.add_column("speed-up", justify="right", no_wrap=True)
        table.add_column("TFLOP/s", justify="right", no_wrap=True)
        if with_memory:
            table.add_column("memory", justify="right", no_wrap=True, min_width=8)
    ratio = speedups(rows)
    by_key = {(row["pass"], row["impl"]): row for row in rows}
    for name in dict.fromkeys(row["impl"] for row in rows):
        pair = [by_key.get((pass_name, name)) for pass_name in ("forward", "backward")]
        if any(row and row["ms"] is not None for row in pair):
            cells = [cell for row in pair for cell in _cells(row, ratio, with_memory)]
            table.add_row(LABELS[name], *cells, style=STYLES.get(name))
    return table


def _table(title):
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )


def _cells(row, ratio, with_memory):
    if row is None or row["ms"] is None:
        return ("-",) * (4 if with_memory else 3)
    speedup = ratio.get((row["pass"], row["impl"]))
    cells = (
        _mark(format_ms(row["ms"]), row),
        "-" if speedup is None else f"{speedup:.2f}x",
        format_tflops(row["tflops"]),
    )
    return (*cells, format_bytes(row.get("extra_bytes"))) if with_memory else cells


def _mark(text, row):
    return text if row.get("check", "passed") == "passed" else f"{text}!"


def notes(rows):
    """Why rows have no time, and which results failed their check: one line per reason."""
    reasons = {}
    for row in rows:
        reason = row.get("error")
        if reason is None and row.get("check", "passed") != "passed":
            reason = f"! wrong result: {row['check']}"
        if reason:
            reasons.setdefault((row["impl"], reason), []).append(row)
    lines = []
    for (name, reason), found in reasons.items():
        where = (dict.fromkeys(row[column] for row in found) for column in ("dtype", "pass"))
        lines.append(f"{LABELS[name]}: {reason} ({'; '.join(', '.join(kinds) for kinds in where)})")
    return lines


def grid_table(title, rows, names):
    """TFLOP/s of one (pass, head_dim, causal) of the grid: a line per sequence length."""
    table = _table(title)
    table.add_column("seqlen", justify="right")
    for name in names:
        table.add_column(LABELS[name].removeprefix("flash_ext "), justify="right", max_width=9)
    for ours, other in RATIOS:
        table.add_column(f"{ours[-2:]} / {other.removeprefix('sdpa_')}", justify="right", max_width=7)
    for seqlen in sorted({row["seqlen"] for row in rows}):
        at = {row["impl"]: row for row in rows if row["seqlen"] == seqlen}
        cells = [_grid_cell(at.get(name)) for name in names]
        table.add_row(str(seqlen), *cells, *(_ratio(at.get(ours), at.get(other)) for ours, other in RATIOS))
    return table


def _grid_cell(row):
    if row is None or row["ms"] is None:
        return "-"
    return _mark(format_tflops(row["tflops"]), row)


def _ratio(row, base):
    if row is None or base is None or row["ms"] is None or base["ms"] is None:
        return "-"
    return f"{base['ms'] / row['ms']:.2f}"
