"""A sample of the malformed inputs of `fuzz_inputs.py`, which runs all of them."""

import pytest
from fuzz_inputs import build_cases, run_cases


pytestmark = pytest.mark.usefixtures("own_datasets_cache")
NUM_CASES = 160


def test_malformed_inputs_end_in_results_or_in_clear_refusals():
    cases = build_cases(seed=0)[:NUM_CASES]
    counts, faults = run_cases(cases)
    assert not faults, "\n".join(faults)
    # Were all refused, or none, this would be no test of either.
    kinds = [kind for _, kind in counts]
    assert {"result", "refusal"} <= set(kinds)
