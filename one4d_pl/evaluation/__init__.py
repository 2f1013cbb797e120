"""Benchmarks, named protocols, stored predictions of any model, and tables laid out as the paper's."""
