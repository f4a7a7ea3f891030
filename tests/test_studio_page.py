"""The studio's page in a real browser: how soon, how wide, and what it asks for."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect

from studio_page import (
    IN_A_BROWSER,
    PHONE,
    TABS,
    WIDE,
    choose,
    fits,
    picture_of,
    set_number,
    tab,
)

pytestmark = IN_A_BROWSER


EMPTY_PAGE = """
import gradio as gr
with gr.Blocks() as page:
    with gr.Tab("Train"):
        gr.Textbox(elem_id="prompt")
        gr.Button(elem_id="start")
page.launch(server_port=PORT, prevent_thread_lock=True, quiet=True, ssr_mode=False)
print("up", flush=True)
page.block_thread()
"""
STUDIO = """
import sys
from rite_diffusion.cli.app import main
sys.argv[1:] = ["studio", "--port", "PORT", "--workspace", "WORKSPACE"]
main()
"""


def seconds_until_usable(browser, code: str, port: int, folder: Path) -> float:
    """From the start of a process to a page whose fields and tabs answer."""
    code = code.replace("PORT", str(port)).replace("WORKSPACE", str(folder / "space"))
    page = browser.new_page()
    page.set_default_timeout(60_000)
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=folder)
    try:
        assert process.stdout.readline()
        page.goto(f"http://127.0.0.1:{port}")
        page.locator("#prompt textarea").fill("a cat")
        page.get_by_role("tab", name="Train", exact=True).click()
        expect(page.locator("#start")).to_be_visible()
        return time.monotonic() - start
    finally:
        page.close()
        process.terminate()
        process.communicate()


def test_the_page_opens_within_five_seconds(browser, unused_port, tmp_path):
    commands = (STUDIO, EMPTY_PAGE)
    best = [math.inf, math.inf]
    for _ in range(3):  # on a machine that is busy with other things, the least says most
        for index, command in enumerate(commands):
            seconds = seconds_until_usable(browser, command, unused_port, tmp_path)
            best[index] = min(best[index], seconds)
        ours, empty = best
        print(f"usable after {ours:.1f} s, an empty page of Gradio after {empty:.1f} s")
        if ours < max(5, 2 * empty):
            return
    pytest.fail(f"usable after {ours:.1f} s, an empty page of Gradio after {empty:.1f} s")


def test_an_idle_page_sends_few_requests(view, second):
    page = view()
    choose(page, "Adapters", second)
    expect(page.get_by_label(f"Weight of {second}").first).to_be_visible()
    page.wait_for_timeout(1000)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(3000)
    assert len(asked) <= 12  # the runs' timer, and nothing that answers itself


def test_the_first_preview_appears_soon_after_the_click(view):
    page = view()
    page.locator("#prompt textarea").fill("a cat on a blue background")
    set_number(page, "Pictures", 1)
    waits = []
    for _ in range(2):  # the first opens the base, if nothing has yet
        start = time.monotonic()
        page.locator("#generate").click()
        expect(page.locator("#stage img")).to_be_visible()
        waits.append(time.monotonic() - start)
        expect(page.locator("#stage .bar")).to_have_count(0)
        expect(page.locator("#made img")).to_have_count(1)
    print(f"first picture after {waits[0]:.1f} s, then after {waits[1]:.1f} s")
    assert waits[1] < 5 * max(1, os.getloadavg()[0] / os.cpu_count())  # busy with other things


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_every_tab_fits_a_phone_and_a_laptop(view, size, scheme, tmp_path):
    page = view(size, scheme)
    for name in TABS:
        tab(page, name)
        page.wait_for_timeout(300)
        assert fits(page), name
        width = "phone" if size is PHONE else "wide"
        picture_of(page, f"{name.lower()}_{width}_{scheme}", tmp_path)
    dark = page.evaluate("document.body.classList.contains('dark')")
    assert dark == (scheme == "dark")


def test_light_or_dark_mode_is_remembered(view):
    page = view()
    page.locator("#dark").click()
    page.reload()
    expect(page.locator("#generate")).to_be_visible()
    page.wait_for_function("document.body.classList.contains('dark')")


def test_the_page_requests_nothing_from_other_hosts(browser, served):
    context = browser.new_context()
    asked = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.goto(served.url)
    expect(page.locator("#generate")).to_be_visible()
    for name in TABS:
        tab(page, name)
        page.wait_for_timeout(300)
    context.close()
    outside = [url for url in asked if not url.startswith((served.url, "data:", "blob:"))]
    assert outside == []
