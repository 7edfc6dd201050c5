"""`python -m sdxl_core.cli`."""

from sdxl_core.cli import main

main()
