"""Measurements of edgevlm: latency reports, and pico, the built-in model, with its accuracy."""
