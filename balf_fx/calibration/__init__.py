"""What a batch is, how it runs, and the statistics of values and gradients that it leaves.

Uses `graph`. Moments are [G, F] and [G, F, F] in float64, with F = O or D of the site.
"""
