"""Random combinations of the arguments beyond plain attention, forward and every gradient.

    python -m pytest tests/test_fuzz_general.py --fuzz-cases 10000
"""

import pytest
from general_cases import backward_algorithm, check_call, random_case
from numerics import causal_argument

from flash_ext import explain


def draw(seed, device):
    return random_case(1_000_000 + seed, device=device)


def test_random_combination(device, fuzz_seed):
    tensors, options = draw(fuzz_seed, device)
    check_call(*tensors, **options)


@pytest.mark.hopper
def test_combinations_reach_v3():
    """The forward of a third of them, and all gradients of a sixth."""
    forward = backward = 0
    for seed in range(500):
        (q, k, v, _, _, features), options = draw(seed, "cuda")
        del options["tile"]
        backward += backward_algorithm(q, k, v, features, **options) == "v3"
        options["causal"] = causal_argument(options["causal"])
        forward += explain(q, k, v, **options, **features).algorithm == "v3"
    assert forward >= 500 / 3
    assert backward >= 500 / 6
