"""edgevlm beside other projects on the same weights, picture, prompt and machine."""
