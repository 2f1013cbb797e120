"""Benchmarks, named protocols, stored predictions of any model, tables laid out as One4D's."""
