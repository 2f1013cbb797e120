"""Pointmaps in, cameras and depth out (One4D, Eq. 11-12): closed form first, then a few robust Gauss-Newton steps."""
