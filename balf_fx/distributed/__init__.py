"""Processes that compress one model together: what they exchange, and how work is shared out over them.

Uses `progress` and `errors`. Values are any that pickle writes; tensors keep their shapes and dtypes, and arrive on the
CPU or on the receiving process's own accelerator.
"""
