"""Bundles of random weights at the real sizes, to learn a model's speed before downloading it.

They are written directly in quantized form: no checkpoint, no torch. What they answer is noise.
"""
