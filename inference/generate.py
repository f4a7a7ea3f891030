"""Make pictures: what `rite generate` does, as a script.

python inference/generate.py "a <dog> on a blue background" --adapter runs/dog/adapter.safetensors
"""

import sys

from rite_diffusion.cli.app import main

if __name__ == "__main__":
    sys.argv.insert(1, "generate")
    main()
