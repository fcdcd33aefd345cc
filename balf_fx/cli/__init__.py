"""The command `balf-fx`: what a user types, the models and data it names, and what is printed.

Uses `api` and everything below. Images are [samples, channels, height, width].
"""
