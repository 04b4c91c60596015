"""Hostile input for everything that edgevlm reads, `python -m workshop.fuzz`.

A target (targets/NAME.py) makes an input from a random generator and gives it to edgevlm; a child
process (worker.py) does that again and again, and its parent (loop.py) sees what becomes of it: an
answer and an error of edgevlm's are well, anything else is a finding whose input is kept.
"""
