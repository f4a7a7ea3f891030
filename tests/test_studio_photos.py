"""Photo sets in the page: a drop makes a new one, and only "Add to this set" joins."""

import re

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Page, expect

from studio_page import IN_A_BROWSER, PHONE, WIDE, fits, picture_of, tab

pytestmark = IN_A_BROWSER
DROP, JOIN = "#drop-photos input[type=file]", "[data-testid='Add to this set-upload-button']"


def pictures(folder, *colours: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    for colour in colours:
        Image.new("RGB", (64, 64), colour).save(folder / f"{colour}.png")
    return [str(folder / f"{colour}.png") for colour in colours]


def drop(page: Page, field: str, files: list[str], count: int) -> None:
    page.locator(field).set_input_files(files)
    expect(page.locator("#thumbnails img")).to_have_count(count)
    page.wait_for_timeout(500)  # until the field is empty again


def field(page: Page, name: str):
    return page.locator(f"#{name} textarea, #{name} input")


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "light"), (PHONE, "dark")])
def test_sets_are_made_joined_renamed_emptied_deleted_and_brought_back(
    view, served, tmp_path, size, scheme
):
    photos = served.workspace / "photos"
    page = view(size, scheme)
    tab(page, "Train")
    drop(page, DROP, pictures(tmp_path / "cats", "red", "blue"), 2)
    cats = page.get_by_label("Photo set").input_value()
    field(page, "trigger").fill("<cat>")
    drop(page, DROP, pictures(tmp_path / "dogs", "green"), 1)  # another concept
    dogs = page.get_by_label("Photo set").input_value()
    assert dogs != cats and [path.name for path in (photos / dogs).iterdir()] == ["green.png"]
    expect(field(page, "trigger")).to_have_value("")  # it was the other set's
    drop(page, JOIN, pictures(tmp_path / "dogs", "black"), 2)
    assert page.get_by_label("Photo set").input_value() == dogs
    page.locator("#set-actions").get_by_text("Rename, empty").click()
    field(page, "set-name").fill(f"hounds {scheme}")
    page.locator("#rename-set").click()
    expect(page.get_by_label("Photo set")).to_have_value(f"hounds {scheme}")
    picture_of(page, f"photo_set_{scheme}", tmp_path)
    assert fits(page)
    page.locator("#clear-set").click()
    expect(page.locator("#thumbnails img")).to_have_count(0)
    page.locator("#undo-photos").click()
    expect(page.locator("#thumbnails img")).to_have_count(2)
    page.locator("#delete-set").click()
    expect(page.get_by_label("Photo set")).to_have_value("")
    assert not (photos / f"hounds {scheme}").exists()
    page.locator("#undo-photos").click()
    expect(page.get_by_label("Photo set")).to_have_value(f"hounds {scheme}")
    page.locator("#new-set").click()
    expect(page.get_by_text("Start with five to ten photos")).to_be_visible()
    assert len(list((photos / cats).iterdir())) == 2


def test_files_that_are_no_pictures_are_left_out_and_make_no_set(view, served, tmp_path):
    before = {path.name for path in (served.workspace / "photos").glob("*")}
    page = view()
    tab(page, "Train")
    (tmp_path / "a.png").write_bytes(b"no picture")
    page.locator(DROP).set_input_files(str(tmp_path / "a.png"))
    expect(page.get_by_text(re.compile("No photos among the files.*a.png"))).to_be_visible()
    assert {path.name for path in (served.workspace / "photos").glob("*")} == before
    page.wait_for_timeout(1000)
    expect(page.locator(DROP)).to_have_count(1)  # the field is empty again
    files = [*pictures(tmp_path, "red"), str(tmp_path / "a.png")]
    page.locator(DROP).set_input_files(files)
    expect(page.get_by_text(re.compile("Left out: a.png"))).to_be_visible()
    expect(page.locator("#thumbnails img")).to_have_count(1)


def test_the_api_looks_after_photo_sets(served, tmp_path):
    client = Client(served.url, verbose=False)

    def ask(endpoint: str, **values):
        return client.predict(**values, api_name=f"/{endpoint}")

    files = [handle_file(file) for file in pictures(tmp_path / "few", "red", "blue")]
    first = ask("add_photos", photos=files[:1])
    assert ask("add_photos", photos=files[1:], photo_set=first) == first
    assert ask("rename_photo_set", name=first, to="balls") == "balls"
    assert {"name": "balls", "photos": 2, "trigger": "", "class_noun": ""} in ask("photo_sets")
    ask("clear_photo_set", name="balls")
    assert next(each for each in ask("photo_sets") if each["name"] == "balls")["photos"] == 0
    assert ask("undo_delete") == "balls"
    ask("delete_photo_set", name="balls")
    with pytest.raises(AppError, match="no 'balls' among the photos"):
        ask("clear_photo_set", name="balls")
    with pytest.raises(AppError, match="one of the two"):
        ask("train", photos=[], trigger="<t>", class_noun="ball")
    with pytest.raises(AppError, match="is not a name"):
        ask("delete_photo_set", name="../adapters")
