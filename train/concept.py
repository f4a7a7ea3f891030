"""Train a concept adapter: what `rite train` does, as a script that `accelerate launch` can start.

accelerate launch train/concept.py photos/dog --trigger "<dog>" --class dog
"""

import sys

from rite_diffusion.cli.app import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
