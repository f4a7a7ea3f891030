"""`python -m rite_diffusion` is `rite`."""

from rite_diffusion.cli import main

main()
