"""Settings of all tests: no time limit on a single hypothesis example, since machines stall; cores are shared out among
the processes that run tests side by side, and their children."""

import os

N_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if N_PROCESSES > 1:  # before torch counts the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // N_PROCESSES)))

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("nanor1", deadline=None)
settings.load_profile("nanor1")

if not torch.cuda.is_available():  # triton reads this once, when the kernels are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def fresh_dynamo():
    """torch.compile's counters, with nothing compiled before."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()
