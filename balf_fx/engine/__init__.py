"""The compiler: settings, programs of one or more parts, and the numbered steps from calibration to rewritten graphs.

Uses `capture`, `passes` and everything below. A trace lists the steps in which one call of the model ran the parts.
"""
