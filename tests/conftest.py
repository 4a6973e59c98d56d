"""One thread a test process (tiny models gain nothing from more), no network, hypothesis without deadlines."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import settings

torch.set_num_threads(1)
# No deadline: a test must not fail because the machine is busy.
settings.register_profile("default", deadline=None, max_examples=60)
settings.load_profile("default")
