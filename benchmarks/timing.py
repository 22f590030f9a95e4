"""Times callables against each other.

GPU: each contender is captured into a CUDA graph and replayed in slots; every round visits all
contenders in a new random order, and the median over the rounds counts. The order matters because the
card is power-limited: what ran a few tens of milliseconds ago sets the clock of what runs now. For the
same reason each slot begins with an untimed lead-in. CPU: the same rounds and slots by perf_counter.
"""

import functools
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Calls longer than this are launched one by one: the gaps between their kernels are below 0.1% of it,
# and captured temporaries of gigabytes would stay reserved for each graph.
GRAPH_LIMIT_MS = 10.0
# At least so much data is passed through by one run of a contender before it meets an input again.
L2_MULTIPLE = 2
MAX_INPUT_SETS = 64


class DeviceLost(RuntimeError):
    """A CUDA error that leaves the process without a usable device: nothing can be measured after it."""


@dataclass(frozen=True)
class Contender:
    """`run()` makes `calls` calls of the thing to be timed, each on its own inputs."""

    run: Callable[[], None]
    calls: int = 1


@dataclass(frozen=True)
class Timing:
    ms: float
    spread: float  # (slowest - fastest round) / median
    rounds: int


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    rounds: int = 9
    slot_ms: float = 10.0
    # One call over this is not timed: it would eat the time of all others.
    limit_ms: float = 500.0
    max_seconds: float = float("inf")
    seed: int = 0


MIN_ROUNDS = 3


def input_sets(case, device):
    """Copies of the inputs to rotate through, so that a call finds none of its data in the L2 cache.

    Small problems would need thousands; they stop at MAX_INPUT_SETS and run partly out of L2.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_INPUT_SETS, -(-L2_MULTIPLE * cache // case.io_bytes)))


def error_text(error):
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def attempt(action, device):
    """(result, None), or (None, error text) after an error that the process survives."""
    try:
        result = action()
        synchronize(device)
        return result, None
    except Exception as error:  # a failing implementation becomes a row, whatever it raised
        text = error_text(error)
    settle(device, text)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None, text


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def settle(device, text=None):
    """Wait for the device; an error that shows up only now is not one that a process survives."""
    try:
        synchronize(device)
    except Exception as error:
        raise DeviceLost(text or error_text(error)) from error


def time_contenders(contenders, device, plan):
    """Map each key of `contenders` to a Timing, or to the text of what went wrong."""
    results, estimates = {}, {}
    for key, contender in contenders.items():
        per_run, error = attempt(functools.partial(_estimate, contender, device), device)
        if error is None and per_run / contender.calls > plan.limit_ms:
            error = f"a call takes over {plan.limit_ms:.0f} ms: not timed"
        if error is None:
            estimates[key] = per_run
        else:
            results[key] = error

    runs = {key: contenders[key].run for key in estimates}
    if device.type == "cuda":
        runs = _capture_all(contenders, estimates, results, device)

    slots = {key: _Slot(run, contenders[key].calls, estimates[key], plan, device) for key, run in runs.items()}
    results.update(_run_rounds(slots, device, plan))
    return {key: results[key] for key in contenders}


def _estimate(contender, device):
    """Milliseconds of one run, warmed up."""
    for _ in range(2):
        contender.run()
    synchronize(device)
    begin = time.perf_counter()
    contender.run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - begin)


def _capture_all(contenders, estimates, results, device):
    """Graphs of the contenders that are short enough. One memory pool serves all: replays never overlap."""
    runs, pool = {}, torch.cuda.graph_pool_handle()
    for key, per_run in estimates.items():
        contender = contenders[key]
        if per_run / contender.calls > GRAPH_LIMIT_MS:
            runs[key] = contender.run
            continue
        graph, error = attempt(functools.partial(_capture, contender.run, pool), device)
        if error is None:
            runs[key] = graph.replay
        else:
            results[key] = f"graph capture: {error}"
            pool = torch.cuda.graph_pool_handle()
    return runs


def _capture(run, pool):
    stream = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        run()
    stream.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            run()
    finally:
        # A capture that fails leaves its own stream current.
        torch.cuda.set_stream(stream)
    graph.replay()
    return graph


class _Slot:
    """One contender's share of a round."""

    def __init__(self, run, calls, per_run, plan, device):
        self.run, self.calls, self.times = run, calls, []
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            # The estimate holds launch gaps that a graph has not: measure again.
            begin, end = self._timed(1)
            settle(device)
            per_run = begin.elapsed_time(end)
        self.repeats = max(1, round(plan.slot_ms / max(per_run, 1e-4)))
        self.lead_in = -(-self.repeats // 4) if per_run < plan.slot_ms else 0

    def _timed(self, repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            self.run()
        end.record()
        return begin, end

    def measure(self):
        """Run the slot; return a function that gives its milliseconds per call, once synchronized."""
        for _ in range(self.lead_in):
            self.run()
        if self.is_cuda:
            begin, end = self._timed(self.repeats)
            return lambda: begin.elapsed_time(end) / (self.repeats * self.calls)
        begin = time.perf_counter()
        for _ in range(self.repeats):
            self.run()
        elapsed = 1e3 * (time.perf_counter() - begin) / (self.repeats * self.calls)
        return lambda: elapsed


def _run_rounds(slots, device, plan):
    shuffle, errors = random.Random(plan.seed).shuffle, {}
    start = time.perf_counter()
    # The first round only warms the clocks up.
    for round_idx in range(plan.rounds + 1):
        if round_idx > MIN_ROUNDS and time.perf_counter() - start > plan.max_seconds:
            break
        order, pending = [key for key in slots if key not in errors], {}
        shuffle(order)
        for key in order:
            try:
                pending[key] = slots[key].measure()
            except Exception as error:  # out of memory beside the others, for one
                errors[key] = error_text(error)
        settle(device)
        if round_idx > 0:
            for key, elapsed in pending.items():
                slots[key].times.append(elapsed())
    return errors | {key: _summary(slot.times) for key, slot in slots.items() if key not in errors}


def _summary(times):
    median = statistics.median(times)
    return Timing(ms=median, spread=(max(times) - min(times)) / median, rounds=len(times))
