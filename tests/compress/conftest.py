"""The helpers beside these tests (`tiny_configs`, `text_fixtures`) import by their plain names, whatever pytest's import mode."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
