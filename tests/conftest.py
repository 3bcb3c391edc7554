"""Settings of all tests: no time limit on a single hypothesis example, since machines stall; cores are shared out among
the processes that run tests side by side, and their children."""

import os
import sys

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


@pytest.fixture(scope="session", autouse=True)
def scalars_in_tritons_interpreter():
    """Triton 3.6 makes a scalar an int by int(array of one entry), which numpy 2.4 refuses; 3.7 squeezes it first."""
    triton = sys.modules.get("triton")  # the tests of the kernels import it
    if triton is None or not triton.__version__.startswith("3.6."):
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor  # called before each launch

    def patch_scalars_too(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_scalars_too


@pytest.fixture
def fresh_dynamo():
    """torch.compile's counters, with nothing compiled before."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()
