"""Batches, how a model runs on them, and the statistics of values and gradients that are gathered from them.

Uses `graph`. Moments are [G, F] and [G, F, F] in float64, with F = O or D of the site.
"""
