"""What a container or a Space starts: the studio on every address, for those who know RITE_AUTH.

    RITE_AUTH=me:a-long-password python app/app.py

RITE_WORKSPACE is where photos, runs, adapters and pictures are kept (default: ./studio).
"""

import os
import sys

from rite_diffusion.cli.app import main

if __name__ == "__main__":
    workspace = os.environ.get("RITE_WORKSPACE", "studio")
    sys.argv[1:1] = ["studio", "--host", "0.0.0.0", "--workspace", workspace]
    main()
