"""All that knows TorchDynamo: sessions of `torch.compile(backend="balf")`, recorded calls, and the tensors to watch.

Uses `files`, `engine`, `reporting` and everything below. Graphs take the model's weights as inputs until `lift`.
"""
