"""Sphinx's settings. `make docs` builds the site; every warning is an error there."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from make_reference import write_pages  # noqa: E402

from rite_diffusion import __version__  # noqa: E402

project = "rite_diffusion"
author = "the rite_diffusion authors"
copyright = author  # noqa: A001
version = release = __version__

extensions = ["myst_parser"]
myst_enable_extensions = ["fieldlist"]
myst_heading_anchors = 4  # `page.md#heading` is checked like any other link
exclude_patterns = ["_build"]
maximum_signature_line_length = 80

html_theme = "furo"
html_title = "rite_diffusion"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "native"

write_pages(Path(__file__).parent / "reference")
