"""`python -m edgevlm` is the command `edgevlm`."""

from edgevlm.cli import main

main()
