"""Captured graphs and the records about them: sites, widths, curves, allocations, plans, and access to `node.meta`.

Uses nothing of balf_fx but `errors` and `version`. A site computes, in each of its G groups, y = W x + b with W of
shape [O, D] (`graph.site`); a width has `heads` heads of `features` features (`graph.widths`).
"""
