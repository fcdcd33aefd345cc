"""A module becomes an `fx.GraphModule` in normal form, checked against the model and with its FLOPs counted.

Uses `passes` (for normalisation), `calibration` and `graph`. Inputs keep the names of the arguments of `forward`.
"""
