import asyncio
import os
import stat
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from random_adapters import small_adapter
from rite_diffusion.config import resolve
from rite_diffusion.errors import AdapterError, ConfigError, StudioError
from rite_diffusion.studio import library, uploads
from rite_diffusion.studio.access import login_check, read_logins, require_password
from rite_diffusion.studio.photo_sets import read_set, remove_photo, write_captions
from rite_diffusion.studio.presets import PURPOSES, training_settings
from rite_diffusion.studio.uploads import save_photos
from rite_diffusion.studio.workspace import Workspace, name_from

LEADING_OUT = ["../x", "..", ".", "/etc/passwd", "a/../../x", "a\\..\\x", "", ".hidden", "x\0", "~",
               "a" * 65, "x ", "x.", "C:x", "\nx"]  # fmt: skip


@pytest.fixture
def space(tmp_path) -> Workspace:
    return Workspace(tmp_path / "space")


def picture(path: Path, colour="red") -> Path:
    Image.new("RGB", (64, 64), colour).save(path)
    return path


# --- names and paths ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEADING_OUT)
def test_names_cannot_lead_out_of_the_workspace(space, name):
    for act in (lambda: space.find("runs", name), lambda: space.new("runs", name)):
        with pytest.raises(StudioError):
            act()


def test_a_link_to_outside_is_not_followed(space, tmp_path):
    (tmp_path / "secret").mkdir()
    (space.folder("runs") / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(StudioError, match="no 'link'"):
        space.find("runs", "link")


def test_new_paths_never_replace_existing_files(space):
    first = space.new("runs", "robot")
    first.mkdir()
    assert space.new("runs", "robot").name == "robot-2"
    assert name_from("../../<b>my dog</b>.png", "photo") == "bmy dogb.png"
    assert name_from("../..", "photo") == "photo"


@pytest.mark.parametrize("base", ["/etc", "../models", "models/../..", "x", "./a/b", "~/sd"])
def test_base_models_cannot_be_paths(space, base):
    with pytest.raises(StudioError, match="no base model"):
        space.base(base)


def test_base_models_of_the_workspace_pocket_and_the_hub_are_known(space):
    (space.folder("models") / "my-sd").mkdir()
    assert space.base("my-sd") == str(space.root / "models/my-sd")
    assert space.base(" pocket ") == "pocket" and space.base("") is None
    assert space.base("owner/model-1.5") == "owner/model-1.5"


def test_undo_restores_what_was_deleted_last(space):
    run = space.folder("runs") / "robot"
    for text in ("one", "two"):
        run.mkdir()
        (run / "note").write_text(text)
        space.move_to_trash(run)
    assert space.restore_from_trash() == run and (run / "note").read_text() == "two"
    with pytest.raises(StudioError, match="exists again"):
        space.restore_from_trash()


# --- uploads -----------------------------------------------------------------------------------


def zip_of(path: Path, entries: dict[str, bytes], **flags) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = flags.get("attributes", 0o644) << 16
            archive.writestr(info, content)
    return str(path)


def test_photos_and_captions_come_out_of_a_zip_under_plain_names(space, tmp_path):
    content = picture(tmp_path / "p.png").read_bytes()
    archive = zip_of(
        tmp_path / "a.zip",
        {"dir/<b>x.PNG": content, "dir/<b>x.txt": b"a <dog>", "__MACOSX/._x.png": b"x",
         "other/<b>x.PNG": content, "run.sh": b"rm"},
    )  # fmt: skip
    folder = space.folder("photos") / "dog"
    save_photos([archive], folder)
    assert sorted(path.name for path in folder.iterdir()) == ["bx-2.png", "bx.png", "bx.txt"]
    assert [(shown.path.name, shown.caption) for shown in read_set(folder)] == [
        ("bx-2.png", ""), ("bx.png", "a <dog>"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["../x.png", "/x.png", "a/../../x.png", "..\\x.png", "C:\\x.png", "C:x.png"]
)
def test_a_zip_with_outside_paths_is_refused_before_writing(space, tmp_path, name):
    good = picture(tmp_path / "good.png")
    archive = zip_of(tmp_path / "a.zip", {"ok.png": good.read_bytes(), name: b"x"})
    folder = space.folder("photos") / "dog"
    with pytest.raises(StudioError, match="leads out of it"):
        save_photos([str(good), archive], folder)
    assert not folder.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "good.png", "space"}


def test_a_link_in_a_zip_is_refused(space, tmp_path):
    archive = zip_of(tmp_path / "a.zip", {"x.png": b"/etc/passwd"}, attributes=stat.S_IFLNK | 0o777)
    with pytest.raises(StudioError, match="a link"):
        save_photos([archive], space.folder("photos") / "dog")


def test_a_zip_bomb_is_refused_by_stated_and_actual_size(space, tmp_path, monkeypatch):
    archive = zip_of(tmp_path / "a.zip", {"x.png": bytes(3_000_000)})
    monkeypatch.setattr(uploads, "LARGEST_FILE", 2_000_000)
    folder = space.folder("photos") / "dog"
    with pytest.raises(StudioError, match="over 2 MB"):
        save_photos([archive], folder)
    lying = Path(archive).read_bytes().replace(struct.pack("<I", 3_000_000), struct.pack("<I", 10))
    Path(archive).write_bytes(lying)
    with pytest.raises(StudioError, match="damaged"):
        save_photos([archive], folder)
    assert not folder.exists()


def test_too_many_or_too_large_uploads_are_refused_without_traces(space, tmp_path, monkeypatch):
    sources = [str(picture(tmp_path / f"{i}.png")) for i in range(3)]
    folder = space.folder("photos") / "dog"
    monkeypatch.setattr(uploads, "MAX_FILES", 2)
    with pytest.raises(StudioError, match="more than 2 files"):
        save_photos(sources, folder)
    monkeypatch.undo()
    monkeypatch.setattr(uploads, "LARGEST_SET", 1)
    with pytest.raises(StudioError, match="choose fewer"):
        save_photos(sources, folder)
    assert not folder.exists()
    archive = zip_of(tmp_path / "many.zip", {f"{i}.txt": b"" for i in range(9)})
    monkeypatch.setattr(uploads, "MAX_ENTRIES", 8)
    with pytest.raises(StudioError, match="over 8 files"):
        save_photos([archive], folder)
    (tmp_path / "not.zip").write_bytes(b"PK no")
    with pytest.raises(StudioError, match="zip archive is damaged"):
        save_photos([str(tmp_path / "not.zip")], folder)
    with pytest.raises(StudioError, match="no photos among"):
        save_photos([], folder)


def test_captions_are_written_beside_their_photos_only(space, tmp_path):
    folder = space.folder("photos") / "dog"
    save_photos([str(picture(tmp_path / "a.png")), str(picture(tmp_path / "b.png"))], folder)
    write_captions(folder, [["a.png", " a  <dog>\non red "], ["b.png", ""]])
    assert (folder / "a.txt").read_text() == "a <dog> on red\n"
    with pytest.raises(StudioError, match="not a photo of this set"):
        write_captions(folder, [["../../x.png", "x"]])
    remove_photo(folder, "a.png")
    assert [path.name for path in folder.iterdir()] == ["b.png"]
    with pytest.raises(StudioError):
        remove_photo(folder, "../dog/b.png")


# --- library -----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["method", "data"])
def test_an_archive_that_cannot_be_unpacked_is_refused_and_leaves_nothing(space, tmp_path, place):
    path = Path(zip_of(tmp_path / "a.zip", {"x.png": b"picture" * 100}))
    content = bytearray(path.read_bytes())
    if place == "method":  # 97 is no method of zipfile
        content[8] = content[content.index(b"PK\x01\x02") + 10] = 97
    else:
        content[35:40] = b"\xff" * 5
    path.write_bytes(content)
    folder = space.folder("photos") / "dog"
    with pytest.raises(StudioError, match="zip archive is damaged"):
        save_photos([str(path)], folder)
    assert not folder.exists()


def test_the_library_shows_runs_and_files_and_leaves_out_what_is_damaged(space, tmp_path):
    small_adapter(space.folder("runs") / "robot/adapter.safetensors", "<robot>")
    small_adapter(space.folder("adapters") / "robot.safetensors", "<other>")
    (space.folder("adapters") / "bad.safetensors").write_bytes(b"no")
    found = {card.name: card for card in library.cards(space)}
    assert set(found) == {"robot", "robot (run)"}
    assert found["robot (run)"].trigger == "<robot>" and found["robot (run)"].run == "robot"
    assert found["robot"].ranks == "2" and found["robot"].method == "lora"
    [item] = library.with_weights(space, [("robot (run)", 0.5)])
    assert item == f"{space.root / 'runs/robot/adapter.safetensors'}:0.5"
    with pytest.raises(StudioError, match="no adapter '../robot'"):
        library.with_weights(space, [("../robot", 1.0)])


def test_foreign_files_are_checked_before_they_are_imported(space, tmp_path):
    good = small_adapter(tmp_path / "up/My LoRA.safetensors")
    assert library.import_adapter(space, good) == "My LoRA"
    assert library.import_adapter(space, good) == "My LoRA-2"
    canary = tmp_path / "canary"
    evil = tmp_path / "up/evil.safetensors"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    torch.save({"x": Evil()}, evil)
    with pytest.raises(AdapterError, match="pickle"):
        library.import_adapter(space, evil)
    with pytest.raises(StudioError, match="never pickles"):
        library.import_adapter(space, evil.rename(evil.with_suffix(".pt")))
    assert not canary.exists() and len(library.cards(space)) == 2


def test_adapters_are_renamed_deleted_and_restored(space, tmp_path):
    small_adapter(space.folder("runs") / "robot/adapter.safetensors")
    library.import_adapter(space, small_adapter(tmp_path / "cat.safetensors"))
    with pytest.raises(StudioError, match="another 'cat'"):
        library.rename(space, "robot", "cat")
    with pytest.raises(StudioError, match="not a name"):
        library.rename(space, "robot", "../robot")
    assert library.rename(space, "robot", "bot") == "bot"
    assert library.rename(space, "cat", "kitten") == "kitten"
    library.delete(space, "bot")
    assert [card.name for card in library.cards(space)] == ["kitten"]
    assert space.last_in_trash() == "bot"
    space.restore_from_trash()
    assert (space.root / "runs/bot/adapter.safetensors").exists() and not space.last_in_trash()


def test_files_beside_an_adapter_are_renamed_and_deleted_with_it(space, tmp_path):
    library.import_adapter(space, small_adapter(tmp_path / "cat.safetensors"))
    home = space.folder("adapters")
    picture(home / "cat.png")
    (home / "cat.sketch.safetensors").write_bytes(b"statistics")
    library.rename(space, "cat", "kitten")
    names = ["kitten.png", "kitten.safetensors", "kitten.sketch.safetensors"]
    assert sorted(path.name for path in home.iterdir()) == names
    assert [card.name for card in library.cards(space)] == ["kitten"]
    library.delete(space, "kitten")
    assert list(home.iterdir()) == [] and space.last_in_trash() == "kitten"
    space.restore_from_trash()
    assert sorted(path.name for path in home.iterdir()) == names
    with pytest.raises(StudioError, match="is a name of a sketch"):
        library.rename(space, "kitten", "kitten.sketch")


# --- who may come in, and what a run is asked for ----------------------------------------------


@pytest.mark.parametrize(("host", "share"), [("0.0.0.0", False), ("192.168.1.5", False),
                                             ("example.org", False), ("::", False),
                                             ("127.0.0.1", True)])  # fmt: skip
def test_other_machines_need_a_password(host, share):
    with pytest.raises(StudioError, match="--auth"):
        require_password(host, share, {})
    require_password(host, share, read_logins(["me:long enough"]))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.5.5.5"])
def test_the_loopback_needs_no_password(host):
    require_password(host, False, {})


@pytest.mark.parametrize("text", ["me", "me:short", "../me:long enough", ":long enough"])
def test_invalid_users_and_short_passwords_are_refused(text):
    with pytest.raises(StudioError):
        read_logins([text])


def test_the_login_check_accepts_only_known_users(monkeypatch):
    monkeypatch.setattr("rite_diffusion.studio.access.PAUSE", 0)
    admit = login_check({"me": "long enough", "you": "something else"})

    async def answers(*logins: tuple[str, str]) -> list[bool]:
        return [await admit(*login) for login in logins]

    assert all(asyncio.run(answers(("me", "long enough"), ("you", "something else"))))
    assert not any(asyncio.run(answers(("me", "something else"), ("nobody", ""))))


def test_guesses_at_one_users_password_are_answered_one_after_another(monkeypatch):
    monkeypatch.setattr("rite_diffusion.studio.access.PAUSE", 0.05)
    admit = login_check({"me": "long enough"})

    async def guess(count: int) -> list[bool]:
        return await asyncio.gather(*(admit("me", f"guess {i}") for i in range(count)))

    start = time.monotonic()
    assert not any(asyncio.run(guess(6)))
    assert time.monotonic() - start >= 6 * 0.05


@pytest.mark.parametrize("purpose", PURPOSES)
def test_every_purpose_gives_a_valid_configuration(purpose):
    needed = {"photos": "p", "trigger": "<t>", "class_noun": "dog", "base": "pocket"}
    tree = training_settings(purpose, needed, {"lora": {"rank": 3}}, "batch = 2\n\nseed=7")
    config = resolve(tree)
    assert (config.lora.rank, config.batch, config.seed, config.photos) == (3, 2, 7, "p")


@pytest.mark.parametrize("line", ["photos=/etc", "class_photos = '/'", "dataset=[{photos='/'}]",
                                  "base=/etc", "dataset.photos = '/'"])  # fmt: skip
def test_settings_lines_cannot_set_paths(line):
    needed = {"photos": "p", "trigger": "<t>", "class_noun": "dog", "base": "pocket"}
    with pytest.raises(StudioError, match="has its own field"):
        training_settings("quick", needed, {}, line)


def test_a_misspelt_settings_line_suggests_the_nearest_key(space):
    needed = {"photos": "p", "trigger": "<t>", "class_noun": "dog", "base": "pocket"}
    with pytest.raises(ConfigError, match="did you mean 'optim.lr'"):
        resolve(training_settings("quick", needed, {}, "optim.lrr=1"))
