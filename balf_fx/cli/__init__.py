"""The command `balf-fx`: its options, the models and data that they name, and the printed results.

Uses `api` and everything below. Images are [samples, channels, height, width].
"""
