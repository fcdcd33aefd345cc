"""Everything specific to TorchDynamo: sessions of `torch.compile(backend="balf")`, recorded calls and watched tensors.

Uses `files`, `engine`, `reporting` and everything below. Graphs take the model's weights as inputs until `lift`.
"""
