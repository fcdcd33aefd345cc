"""Captures a module as an `fx.GraphModule` in normal form, checks it against the model and counts its FLOPs.

Uses `passes` (for normalisation), `calibration` and `graph`. Inputs keep the names of the arguments of `forward`.
Graphs in normal form are functional and hold no contexts.
"""
