"""Tools that edgevlm is made and measured with; not installed."""
