"""Several runs of `fit` one after the other in each process of one launch: `torchrun ... run_cases.py a.yaml b.yaml`.

Starting processes costs more than the runs themselves, so a matrix of strategies shares one launch.
"""

from __future__ import annotations

import sys

import torch

from one4d_pl.config import load_config
from one4d_pl.fit import fit

if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in sys.argv[1:]:
        fit(load_config([path], []))
