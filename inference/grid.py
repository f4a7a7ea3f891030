"""Compare pictures on a sheet: what `rite grid` does, as a script.

python inference/grid.py --prompt "a <dog>" --adapter dog.safetensors --weight 0.5 --weight 1
"""

import sys

from rite_diffusion.cli.app import main

if __name__ == "__main__":
    sys.argv.insert(1, "grid")
    main()
