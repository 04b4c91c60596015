"""pico: the small model that ships with edgevlm, and the drawn scenes it is trained and measured
on.

Nothing is imported here: drawing needs Pillow and numpy, training needs torch, and most readers
need neither.
"""
