"""Views of a plan and of a sweep over budgets: tables, pictures and a page. Nothing below imports it.

Uses `graph`. Shares are fractions in [0, 1], costs whole numbers.
"""
