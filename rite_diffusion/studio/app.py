"""The studio's page: its tabs, the light or dark theme, and the refresh of a tab when shown."""

import gradio as gr

from rite_diffusion.studio import api, library
from rite_diffusion.studio.page import with_messages
from rite_diffusion.studio.state import Studio
from rite_diffusion.studio.tabs import BuiltTab, UseButton, compare, fuse, generate, train
from rite_diffusion.studio.tabs import library as library_tab
from rite_diffusion.studio.tabs.adapters import Chooser
from rite_diffusion.studio.theme import HEAD

DAY = 24 * 3600  # seconds after which copies made for the page are deleted
# The browser stores the choice of light or dark; without one, the system's setting applies.
TOGGLE_JS = """() => {
  const dark = document.body.classList.toggle('dark');
  localStorage.setItem('rite-look', dark ? 'dark' : 'light');
}"""
REMEMBER_JS = """() => {
  const look = localStorage.getItem('rite-look');
  if (look) document.body.classList.toggle('dark', look === 'dark');
}"""


def build(studio: Studio) -> gr.Blocks:
    """The whole page with its API."""
    with gr.Blocks(
        title="rite studio", analytics_enabled=False, delete_cache=(DAY, DAY), fill_width=True
    ) as page:
        with gr.Row(elem_classes="top"):
            gr.HTML(HEAD)
            dark = gr.Button("Light / dark", size="sm", scale=0, min_width=110, elem_id="dark")
        dark.click(None, js=TOGGLE_JS)
        page.load(None, js=REMEMBER_JS)
        with gr.Tabs(elem_id="tabs") as tabs:
            with _tab("Generate") as tab:
                built, chooser = generate.build(studio)
            _connect_refreshes(page, tab, built)
            for name, part in {
                "Train": train, "Fuse": fuse, "Compare": compare, "Library": library_tab,
            }.items():  # fmt: skip
                with _tab(name) as tab:
                    built = part.build(studio)
                _connect_refreshes(page, tab, built)
                if built.use is not None:
                    _connect_use(studio, tabs, chooser, built.use)
        api.build(studio)
    return page


def _tab(name: str) -> gr.Tab:
    return gr.Tab(name, id=name, elem_id=f"tab-{name.lower()}")


def _connect_refreshes(page: gr.Blocks, tab: gr.Tab, built: BuiltTab) -> None:
    """Refresh a tab when the page is loaded and when the tab is selected."""
    for refresh in built.refreshes:
        for event in (page.load, tab.select):
            event(
                refresh.handler,
                list(refresh.inputs),
                list(refresh.outputs),
                show_progress="hidden",
                api_visibility="private",
                concurrency_limit=None,
            )


def _connect_use(studio: Studio, tabs: gr.Tabs, chooser: Chooser, use: UseButton) -> None:
    @with_messages
    def use_adapter(name: str, request: gr.Request):
        space = studio.space(request)
        known = [card.name for card in library.cards(space)]
        chosen = [use.find(space, name).name]
        return gr.Tabs(selected="Generate"), gr.Dropdown(choices=known, value=chosen), chosen

    use.button.click(
        use_adapter, use.name, [tabs, chooser.names, chooser.chosen],
        show_progress="hidden", api_visibility="private",
    )  # fmt: skip
