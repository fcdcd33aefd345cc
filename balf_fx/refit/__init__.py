"""Runs the compressed model alongside the original, and solves its layers by regression on its own values.

Uses `widths`, `ranks`, `calibration` and `graph`. Inputs are [G, D, n] and outputs [G, O, n] at n positions; sums over
positions are float64.
"""
