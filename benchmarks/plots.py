"""Plots of the results (PNG), one visual language: a colour and a marker per implementation."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.tables import LABELS, speedups

STYLE = {
    "naive": ("#8c8c8c", "o"),
    "sdpa": ("#1f3b57", "s"),
    "sdpa_flash": ("#2f7ebc", "v"),
    "sdpa_cudnn": ("#3aa17e", "^"),
    "sdpa_efficient": ("#8d6cc0", "<"),
    "sdpa_math": ("#b9a38a", ">"),
    "flash_ext_v1": ("#f0a030", "D"),
    "flash_ext_v2": ("#d1372c", "D"),
    "flash_ext_v3": ("#6d0f2b", "D"),
}
RC = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
}


def _style(name, **changes):
    color, marker = STYLE[name]
    ours = name.startswith("flash_ext")
    return {
        "color": color,
        "marker": marker,
        "label": LABELS[name],
        "zorder": 4 if ours else 3,
        "linewidth": 2.0 if ours else 1.3,
        "markersize": 5.5 if ours else 4.5,
    } | changes


def _plain_numbers(axis):
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_locator(NullLocator())


def _finish(figure, axes, title, subtitle, path):
    """Head the figure with title, subtitle and one legend for all its axes, and write it."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = [label for label in LABELS.values() if label in handles]
    labels += [label for label in handles if label not in labels]
    inch = 1 / figure.get_figheight()
    figure.text(0.01, 1 + 0.72 * inch, title, fontsize=12, fontweight="bold")
    figure.text(0.01, 1 + 0.48 * inch, subtitle, fontsize=8.5, color="#555555")
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="lower left",
        bbox_to_anchor=(0.0, 1 + 0.08 * inch),
        ncol=len(labels),
        columnspacing=1.2,
        handletextpad=0.4,
    )
    figure.savefig(path)
    plt.close(figure)
    return path


def plot_speedups(cases, path, title, subtitle):
    """`cases`: list of (label, rows). A line per case, a mark per implementation: speed-up over naive."""
    with plt.rc_context(RC):
        figure, axes = plt.subplots(1, 2, sharey=True, figsize=(10, 1.2 + 0.34 * len(cases)), layout="constrained")
        for axis, pass_name in zip(axes, ("forward", "backward"), strict=True):
            for y, (_, rows) in enumerate(cases):
                for (row_pass, name), value in speedups(rows).items():
                    if row_pass == pass_name:
                        axis.plot(value, y, **_style(name, linestyle="none", markersize=7))
            axis.axvline(1.0, color="#8c8c8c", linewidth=1, zorder=1)
            axis.set_xscale("log", base=2)
            _plain_numbers(axis.xaxis)
            axis.set_title(f"{pass_name} pass")
            axis.set_xlabel("speed-up over naive attention (log scale)")
        axes[0].set_yticks(range(len(cases)), [label for label, _ in cases])
        axes[0].set_ylim(len(cases) - 0.5, -0.5)
        return _finish(figure, axes, title, subtitle, path)


def plot_grid(rows, path, title, subtitle):
    """TFLOP/s by sequence length: a row of panels per (pass, causal), a column per head_dim."""
    head_dims = sorted({row["head_dim"] for row in rows})
    kinds = {(row["pass"], row["causal"]) for row in rows}
    kinds = sorted(kinds, key=lambda kind: (kind[0] != "forward", kind[1]))
    with plt.rc_context(RC):
        figure, grid = plt.subplots(
            len(kinds),
            len(head_dims),
            figsize=(max(7.5, 3.5 * len(head_dims)), 2.5 * len(kinds)),
            squeeze=False,
            layout="constrained",
            sharex=True,
            sharey="row",
        )
        for line, (pass_name, causal) in zip(grid, kinds, strict=True):
            for axis, head_dim in zip(line, head_dims, strict=True):
                chosen = [
                    row
                    for row in rows
                    if (row["pass"], row["causal"], row["head_dim"]) == (pass_name, causal, head_dim)
                ]
                _plot_lines(axis, chosen, "seqlen", "tflops")
                axis.set_title(f"{pass_name}{', causal' if causal else ''}, head_dim {head_dim}")
            line[0].set_ylim(bottom=0)
            line[0].set_ylabel("TFLOP/s")
        for axis in grid[-1]:
            axis.set_xlabel("sequence length")
        return _finish(figure, grid.flat, title, subtitle, path)


def plot_ladder(rows, path, title, subtitle):
    """tables.ladder_rows by sequence length, without and with a mask. A logarithmic axis: v1 is far below v3."""
    with plt.rc_context(RC):
        figure, axes = plt.subplots(1, 2, sharey=True, figsize=(8.5, 3.6), layout="constrained")
        for axis, causal in zip(axes, (False, True), strict=True):
            _plot_lines(axis, [row for row in rows if row["causal"] == causal], "seqlen", "tflops")
            axis.set_yscale("log")
            _plain_numbers(axis.yaxis)
            axis.set_title("causal" if causal else "no mask")
            axis.set_xlabel("sequence length")
        axes[0].set_yticks([5, 10, 20, 50, 100, 200, 500])
        axes[0].set_ylabel("TFLOP/s")
        return _finish(figure, axes, title, subtitle, path)


def _plot_lines(axis, rows, x, y, **changes):
    for name in STYLE:
        points = sorted((row[x], row[y]) for row in rows if row["impl"] == name and row[y] is not None)
        if points:
            axis.plot(*zip(*points, strict=True), **_style(name, **changes))
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({row[x] for row in rows}) or [1])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def plot_memory(rows, path, title, subtitle):
    """Extra memory by sequence length, both axes logarithmic."""
    with plt.rc_context(RC):
        figure, axes = plt.subplots(1, 2, sharey=True, figsize=(8.5, 3.2), layout="constrained")
        headings = {"forward": "forward", "backward": "forward + backward"}
        for axis, (pass_name, heading) in zip(axes, headings.items(), strict=True):
            chosen = [row | {"mib": (row["extra_bytes"] or 0) / 2**20 or None} for row in rows]
            _plot_lines(axis, [row for row in chosen if row["pass"] == pass_name], "seqlen", "mib")
            axis.set_yscale("log", base=16)
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(FuncFormatter(_memory_label))
            axis.set_title(heading)
            axis.set_xlabel("sequence length")
        axes[0].set_ylabel("extra memory")
        return _finish(figure, axes, title, subtitle, path)


def _memory_label(mib, _):
    return f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib:g} MiB" if mib >= 1 else f"{mib * 1024:g} KiB"


def plot_traffic(rows, path, title, subtitle):
    """Device-memory bytes per call by sequence length: measured (marks) beside the IO model (dashes)."""
    with plt.rc_context(RC):
        figure, axes = plt.subplots(1, 2, sharey=True, figsize=(8.5, 3.4), layout="constrained")
        for axis, direction in zip(axes, ("read", "write"), strict=True):
            _plot_lines(axis, rows, "seqlen", f"{direction}_bytes", linestyle="")
            _plot_lines(axis, rows, "seqlen", f"model_{direction}_bytes", linestyle="--", marker="", linewidth=1)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count / 1e9:g} GB"))
            axis.set_title(f"bytes {'read' if direction == 'read' else 'written'}")
            axis.set_xlabel("sequence length")
        return _finish(figure, axes, title, subtitle, path)


def plot_training(curves, differences, allowed, path, title, subtitle):
    """Losses by step, and how far each smoothed curve is from the baseline's; grey: as far as noise may go."""
    styles = {"flash_ext": STYLE["flash_ext_v3"][0], "SDPA": STYLE["sdpa"][0]}
    with plt.rc_context(RC):
        figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
        for axis, lines in zip(axes, (curves, differences), strict=True):
            for name, values in lines.items():
                is_ours = name == "flash_ext"
                style = {"color": styles.get(name, "#b9a38a"), "linewidth": 1.8 if is_ours else 1.0}
                label = name.partition(" ")[0] + (" nudged" if "nudged" in name else "")
                axis.plot(values, label=label, zorder=4 if is_ours else 3, **style)
            axis.set_xlabel("step")
        axes[1].axhspan(-allowed, allowed, color="#eeeeee", zorder=1)
        axes[0].set_title("loss, nats a letter")
        axes[1].set_title("smoothed loss minus the baseline's")
        return _finish(figure, axes, title, subtitle, path)
