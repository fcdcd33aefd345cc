"""Compressed models in files: tensors and plan in one file, and the graph rebuilt from the model's own code.

Uses `engine` and everything below. Tensors are stored by dotted path, in the shapes of the modules that hold them.
"""
