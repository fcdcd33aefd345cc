"""Views of a plan and of a sweep over budgets: tables, plots and an HTML page. No folder below imports it.

Uses `graph`. Shares are fractions in [0, 1], costs are whole numbers.
"""
