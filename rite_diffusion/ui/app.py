"""The studio's page: its tabs, its look, and what is refreshed when a tab is shown."""

from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr

from rite_diffusion.ui import api
from rite_diffusion.ui.studio import Studio
from rite_diffusion.ui.tabs import (
    Refresh,
    compare,
    convert,
    fuse,
    generate,
    library,
    regions,
    train,
)
from rite_diffusion.ui.theme import HEAD


@dataclass(frozen=True)
class Tab:
    """A tab's name and what lays it out."""

    name: str
    build: Callable[[Studio], list[Refresh]]


TABS = [
    Tab("Generate", generate.build),
    Tab("Regions", regions.build),
    Tab("Train", train.build),
    Tab("Fuse", fuse.build),
    Tab("Compare", compare.build),
    Tab("Convert", convert.build),
    Tab("Library", library.build),
]

DAY = 24 * 3600  # seconds that copies for the page are kept


def build(studio: Studio) -> gr.Blocks:
    """The whole page with its API."""
    with gr.Blocks(
        title="rite studio", analytics_enabled=False, delete_cache=(DAY, DAY), fill_width=True
    ) as page:
        with gr.Row(elem_classes="top"):
            gr.HTML(HEAD)
            dark = gr.Button("Light / dark", size="sm", scale=0, min_width=110, elem_id="dark")
        dark.click(None, js="() => document.body.classList.toggle('dark')")
        for tab in TABS:
            with gr.Tab(tab.name, id=tab.name, elem_id=f"tab-{tab.name.lower()}") as shown:
                for refresh in tab.build(studio):
                    for event in (page.load, shown.select):
                        event(
                            refresh.handler,
                            list(refresh.inputs),
                            list(refresh.outputs),
                            show_progress="hidden",
                            api_visibility="private",
                            concurrency_limit=None,
                        )
        api.build(studio)
    return page
