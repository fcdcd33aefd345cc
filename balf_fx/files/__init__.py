"""Compressed models in files: tensors and plan in one file, and the graph made again from the model's own code.

Uses `engine` and everything below. Tensors go by dotted path, in the shapes of the modules that hold them.
"""
