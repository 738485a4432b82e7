"""Every path of the library on a GPU without numbers: nothing on the wrong device, no wait, copy or launch beyond
`budgets.py`.

Needs its own process: python -m pytest -p tests.fake_cuda.device tests/fake_cuda
"""

import sys

import pytest

if "tests.fake_cuda.device" not in sys.modules:
    pytest.skip("the process has no fake GPU: -p tests.fake_cuda.device", allow_module_level=True)

from tests.fake_cuda import device
from tests.fake_cuda.budgets import COPIES, LAUNCHES, WAITS
from tests.fake_cuda.count import counted
from tests.fake_cuda.device import Log, fake_cuda

pytestmark = pytest.mark.skipif(device.MISSING is not None, reason=str(device.MISSING))


def check(log: Log) -> None:
    """No CPU tensor met a CUDA one; waits and copies are in the budget."""
    assert not log.all.mixed
    for name, found, budget in (("WAITS", log.all.waits, WAITS), ("COPIES", log.all.copies, COPIES)):
        over = {at: n for at, n in found.items() if n > budget.get(at, 0)}
        assert not over, f"more than {name} allows"
    repeated = [draw for draw, n in log.all.draws.items() if n > 1]
    assert not repeated, f"the same numbers of a generator (seed, offset) were drawn twice: {repeated}"


@pytest.mark.parametrize("part", LAUNCHES)
def test_launches(part):
    with fake_cuda() as log:
        counted(part, log)
        check(log)
    for phase, budget in LAUNCHES[part].items():
        found = sum((log.all if phase == "all" else log.phases[phase]).launches.values())
        assert found <= budget, f"{part}, {phase}: {found} launches, the budget is {budget}"
        assert found > 0.9 * budget, f"{part}, {phase}: {found} launches: lower the budget, {budget}"
