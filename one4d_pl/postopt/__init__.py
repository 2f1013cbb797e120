"""Cameras and depth from pointmaps (One4D, Eq. 11-12).

A closed form gives the start, a few robust Gauss-Newton steps the answer.
"""
