"""Settings of all tests: no time limit on a single hypothesis example, since machines stall."""

import os

import torch
from hypothesis import settings

settings.register_profile("nanor1", deadline=None)
settings.load_profile("nanor1")

if not torch.cuda.is_available():  # triton reads this once, when the kernels are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")
