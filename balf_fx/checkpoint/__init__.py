"""What a killed run has finished, in a folder: the stages of a run, the values that they return, and their digests.

Uses the errors alone. Files are safetensors and JSON; nothing is pickled, and no code is read from them.
"""
