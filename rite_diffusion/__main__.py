"""`python -m rite_diffusion`, the same as `rite`."""

from rite_diffusion.cli.app import main

main()
