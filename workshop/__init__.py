"""What edgevlm is made and measured with; no part of the installed package."""
