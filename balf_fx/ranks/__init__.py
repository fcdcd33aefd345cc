"""The error and the cost of each rank of a site: spectra, influence of single weights, costs, convex hulls.

Uses `calibration` and `graph`. Weights are [G, O, D], factors [G, O, r] and [G, r, D], all in float64.
"""
