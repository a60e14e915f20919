"""What gives the reference's own bfloat16 is that reference: in float32 it gives what is stored."""

import pytest
import torch

from tests.helpers.parity_cases import CASES, Case, error_of
from tests.helpers.parity_oracles import are_installed, has_oracle, oracle_of

# Of RRDBNet only the full size has an oracle; it is small.
TESTED = [case for case in CASES if has_oracle(case) and (not case.full or case.family == "rrdbnet")]


@pytest.mark.skipif(not are_installed(), reason="needs the extra `parity`")
@pytest.mark.parametrize("case", TESTED, ids=lambda case: case.label)
def test_oracle_in_float32_equals_what_is_stored(case: Case) -> None:
    oracle = oracle_of(case, case.build(case.source.meta))
    assert error_of(case, oracle, "cpu", torch.float32) <= case.tolerance
