"""Compressed models in files: tensors as safetensors with the plan as JSON, and the graph made again from the model's code.

Uses `engine` and everything below. Tensors go by dotted path, in the shapes of the modules that hold them.
"""
