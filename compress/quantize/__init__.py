"""Quantisation of one matrix at a time: grids, rounding with and without calibration, and packed codes."""
