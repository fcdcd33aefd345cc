"""The compressed model's own values beside the original's, and layers that are solved for them.

Uses `widths`, `ranks`, `calibration` and `graph`. Inputs are [G, D, n] and outputs [G, O, n] at n positions; sums over
positions are float64.
"""
