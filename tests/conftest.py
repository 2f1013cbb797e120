"""What every test shares: two threads and DeepSpeed on the CPU (the hang guard stands in setup.cfg)."""

from __future__ import annotations

import os

import torch

# Read when deepspeed is first imported: on a machine with a GPU it would pick CUDA for the CPU tests too.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# The same on every machine: the order of float additions, and with it a tolerance, must not depend on its cores.
torch.set_num_threads(2)
