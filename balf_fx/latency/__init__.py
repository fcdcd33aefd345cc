"""Measured times: of single operations by their sizes, of the nodes of a graph, and of whole models side by side.

`operations` and `uses` say which stock operations a site runs at a rank, `table` measures these on grids of sizes and
`granules` finds the multiples that kernels prefer; `profile` times the nodes of a graph. `stopwatch` is the only file
that reads a clock. Times are nanoseconds in tables and seconds elsewhere; sizes are features per group. Imports `graph`
alone.
"""
