"""Messages of other libraries that no user of a run can act on; quick to import.

What has a cause in our code is mended there. Here is what is meant to be as it is.
"""

from __future__ import annotations

import logging
import warnings

# loggers whose INFO is about the library itself: advertisements, seeds, a line per HTTP request, "initializing"
TALKATIVE = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.strategies.deepspeed",
    "httpx",
)
UNIMPORTANT = (
    ".*does not have many workers.*",  # data.num_workers is the user's; a tiny run needs none
    ".*treespec.*",  # Lightning calls what torch has deprecated
    r".*module\(s\) in eval mode.*",  # the frozen base, on purpose
    # on any machine with SLURM installed; slurm/train_8node.sh uses srun, and a laptop or a login node need not
    ".*`srun` command is available.*",
    # a rank may hold no clip of some task and must take part in the reduction of its metric all the same; values to
    # which no clip contributed are left out
    ".*was called before the ``update`` method.*",
    ".*val_dataloader.* but have no `validation_step`.*",  # the tiny base's pretraining is not validated, on purpose
)


def quieten() -> None:
    """Silence them in this process."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in UNIMPORTANT:
        warnings.filterwarnings("ignore", message=message)
