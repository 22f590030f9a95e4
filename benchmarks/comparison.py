"""Rows of results for one case: every implementation checked, timed and weighed side by side."""

import torch

from benchmarks import baselines
from benchmarks.baselines import BASELINES
from benchmarks.cases import attention_flops
from benchmarks.timing import Contender, Timing, attempt, input_sets, time_contenders

# What is timed for a pass: the first, less the others.
MODES = {"forward": ("forward",), "backward": ("forward_backward", "forward_with_grad")}


def compare(case, names, passes, device, plan, with_memory=False):
    """One row per (pass, implementation): its time, TFLOP/s and spread, or "error" and no time.

    A row whose results were wrong has the text of the failed check under "check"; otherwise "passed".
    Backward is the time of (forward + backward) minus that of a forward that records gradients.
    """
    inputs = [case.make_inputs(device, seed) for seed in range(input_sets(case, device))]
    rows, contenders = {}, {}
    for name in names:
        for pass_name in passes:
            rows[pass_name, name] = row = _empty_row(case, pass_name, name)
            row["error"] = BASELINES[name].refusal(case, pass_name, device)
            if row["error"] is None:
                _check(row, case, name, inputs[0], device)
            if row["error"] is None:
                contenders |= _contenders(name, pass_name, case, inputs)
                if with_memory:
                    row["extra_bytes"] = _extra_memory(name, pass_name, case, inputs[0], device)

    timings = time_contenders(contenders, device, plan)
    for (pass_name, name), row in rows.items():
        if row["error"] is None:
            _fill(row, case, [timings[name, mode] for mode in MODES[pass_name]])
    return list(rows.values())


def _empty_row(case, pass_name, name):
    return {"pass": pass_name, **case.record(), "impl": name, "ms": None, "tflops": None}


def _check(row, case, name, inputs, device):
    def run():
        if row["pass"] == "forward":
            return baselines.check_forward(BASELINES[name], case, *inputs[:3])
        return baselines.check_backward(name, baselines.small_problem(case), device)

    wrong, row["error"] = attempt(run, device)
    row["check"] = wrong or "passed"


def call(name, case, inputs, mode):
    """One call of an implementation; `mode` is forward, forward_with_grad or forward_backward."""
    run = BASELINES[name].run
    q, k, v, dout = inputs
    if mode == "forward":
        with torch.no_grad():
            return run(q, k, v, case.causal)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = run(*leaves, case.causal)
    if mode == "forward_with_grad":
        return out
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def _contenders(name, pass_name, case, inputs):
    def contender(mode):
        def run():
            for one_set in inputs:
                call(name, case, one_set, mode)

        return Contender(run, calls=len(inputs))

    return {(name, mode): contender(mode) for mode in MODES[pass_name]}


def _fill(row, case, timings):
    failures = [timing for timing in timings if not isinstance(timing, Timing)]
    if failures:
        row["error"] = failures[0]
        return
    ms = timings[0].ms - sum(timing.ms for timing in timings[1:])
    if ms <= 0:
        row["error"] = "the forward pass took all of the time of forward and backward"
        return
    row["ms"] = ms
    row["tflops"] = attention_flops(case, row["pass"]) / ms / 1e9
    row["spread"] = max(timing.spread for timing in timings)


def extra_memory(make_results, device):
    """Bytes that a call needed at its peak beyond what was allocated before and what it returns.

    Only the CUDA allocator keeps such a count: None on the CPU.
    """
    if device.type != "cuda":
        return None
    make_results()  # library workspaces are allocated once
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = make_results()
    peak = torch.cuda.max_memory_allocated(device)
    results = results if isinstance(results, tuple) else (results,)
    return max(0, peak - before - sum(x.nbytes for x in results))


def _extra_memory(name, pass_name, case, inputs, device):
    mode = "forward" if pass_name == "forward" else "forward_backward"
    extra, _ = attempt(lambda: extra_memory(lambda: call(name, case, inputs, mode), device), device)
    return extra
