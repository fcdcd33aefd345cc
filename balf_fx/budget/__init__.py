"""The choice of all ranks and sizes under one budget: clusters of sites and widths, and the knapsack over them.

Uses `widths`, `ranks`, `calibration` and `graph`. Costs are whole numbers of FLOPs or parameters, losses are floats.
"""
