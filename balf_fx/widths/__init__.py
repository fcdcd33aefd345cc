"""Widths, the features that may be reduced: how they are found and ordered, and how layers are narrowed.

Uses `ranks`, `calibration` and `graph`. A map of one width is [heads, features, r] or [heads, r, features].
"""
