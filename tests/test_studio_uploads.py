"""Uploads in the page: what is refused leaves the field empty and all else as it was."""

import zipfile
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from studio_page import IN_A_BROWSER, picture_of, tab

pytestmark = IN_A_BROWSER


def refuses(page: Page, field: str, file: Path, words: str) -> None:
    """A file is refused with these words; the field is empty again, and no panel says Error."""
    page.locator(f"{field} input[type=file]").set_input_files(str(file))
    expect(page.get_by_text(words)).to_be_visible()
    empty = page.locator(f"{field} input[type=file]")  # gone while the field has a file
    expect(empty).to_have_count(1, timeout=15_000)
    page.wait_for_timeout(500)
    assert page.locator("span.error:visible").all_inner_texts() == []


def archive_of(path: Path, colours: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, colour in colours.items():
            picture = path.with_name(name)
            Image.new("RGB", (64, 64), colour).save(picture)
            archive.write(picture, name)
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_upload_after_a_refused_one_succeeds(view, tmp_path, scheme):
    page = view(scheme=scheme)
    tab(page, "Train")
    bad = tmp_path / "bad.zip"
    bad.write_bytes(b"PK no archive")
    refuses(page, "#drop-photos", bad, "zip archive is damaged")
    picture_of(page, f"refused_{scheme}", tmp_path)
    good = archive_of(tmp_path / "good.zip", {"a.png": "red", "b.png": "blue"})
    page.locator("#drop-photos input[type=file]").set_input_files(str(good))
    expect(page.locator("#thumbnails img")).to_have_count(2)


def test_a_foreign_picture_and_a_foreign_adapter_leave_their_fields_empty(view, tmp_path):
    page = view()
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    page.locator("#prompt textarea").fill("a cat")
    refuses(page, "#restore", tmp_path / "foreign.png", "carries no parameters")
    expect(page.locator("#prompt textarea")).to_have_value("a cat")
    tab(page, "Library")
    (tmp_path / "foreign.safetensors").write_bytes(b"no adapter")
    refuses(page, "#bring-in", tmp_path / "foreign.safetensors", "foreign.safetensors")
