"""One4D on PyTorch Lightning: one model that generates and reconstructs 4D video."""

__version__ = "0.2.0"  # the only place; CITATION.cff repeats it, and a test compares
