"""`python -m rite_diffusion` is `rite`."""

from rite_diffusion.cli.app import main

main()
