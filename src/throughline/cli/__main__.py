"""`python -m throughline.cli`."""

from throughline.cli import main

main()
