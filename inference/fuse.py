"""Fuse adapters: what `rite fuse` does, as a script.

python inference/fuse.py dog.safetensors cat.safetensors --out both.safetensors --report
"""

import sys

from rite_diffusion.cli.app import main

if __name__ == "__main__":
    sys.argv.insert(1, "fuse")
    main()
