"""Compressed models in the folders of transformers: `save_pretrained` writes them, `from_pretrained` reads them.

Uses `engine` and everything below. Importing balf_fx is enough: transformers is not imported here, but once it is, it
learns of the layers that balf_fx writes (`huggingface.registry`), through its own registry of quantizers.
"""
