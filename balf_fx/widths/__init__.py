"""Features that may become fewer: how they are found, in which order they go, and what that means for layers.

Uses `ranks`, `calibration` and `graph`. A map of one width is [heads, features, r] or [heads, r, features].
"""
