"""Every endpoint of the studio's API with bad values: a message, and the workspace is unchanged.

The table is made from what the server says of its API, so that new endpoints enter by themselves.
"""

import asyncio
import json
from pathlib import Path

import httpx
import pytest
from diffusers import UNet2DConditionModel
from gradio_client import Client
from PIL import Image

from rite_diffusion.errors import RiteError
from rite_diffusion.studio.jobs import JobQueue
from rite_diffusion.studio.workspace import Workspace
from studio_server import pocket_adapter, studio

TOGETHER = 24  # requests at a time
FOLDERS = ("adapters", "runs", "photos", "outputs", "sheets", "drafts", "models", "trash")
# Parameters with a value that lets a request come to its other parameters.
GOOD = {
    "name": "a", "adapters": ["a"], "prompt": "a cat", "prompts": ["a cat"], "run": "r",
    "trigger": "<new>", "class_noun": "toy", "to": "kohya", "what": "save",
    "file": {"path": "/nowhere"},
}  # fmt: skip
PATHS = ["/etc/passwd", "../../etc/passwd", "a\0b", "", "adapters/a.safetensors", "x" * 5000]
SENT = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in PATHS[:3]]
FILES = [{"path": path} for path in PATHS] + SENT + [{}, {"path": 5}, {"path": None}, {"url": "x"}]
TEXTS = ["", " ", "\0", "\x1b[31m", "\udcff", "x" * 5000, "../..", ".", "-", "a:nan", "a:1e999",
         "<b>", "{", "%s", "new\nline", "nothing"]  # fmt: skip
NUMBERS = [-1, 0, 2**31, 2**63, 2**64, -(2**64) - 1, 1e999, 0.5]
WRONG = {
    "string": [5, None, ["x"], {}, True],
    "integer": ["x", 1.5, [1], {}, 1e999],
    "number": ["x", [1.0], {}, 1e999],
    "boolean": ["x", 5, {}, []],
    "array": ["x", 5, {}, [None], [{}], [[[]]]],
    "object": ["x", 5, [], None, True],
}
OPEN = {
    "string": TEXTS,
    "integer": NUMBERS,
    "number": NUMBERS,
    "array": [[], *([text] for text in TEXTS), ["a"] * 300, *([number] for number in NUMBERS)],
    "object": FILES,
}


class Reached(RiteError):
    """All checks were passed and work would begin."""


def refuse(*_, **__):
    raise Reached("reached")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A studio of this module's own, whose work stops at `Reached`."""
    space = Workspace(tmp_path_factory.mktemp("bad") / "space")
    with pytest.MonkeyPatch.context() as patch, studio(space.root) as served:
        patch.setattr(UNet2DConditionModel, "forward", refuse)
        patch.setattr(JobQueue, "submit", refuse)
        patch.setattr(JobQueue, "resume", refuse)
        for name in FOLDERS:
            space.folder(name)
        pocket_adapter(space.root / "adapters/a.safetensors", "<a>", 0)
        pocket_adapter(space.root / "adapters/b.safetensors", "<b>", 1)
        (space.root / "runs/r").mkdir()
        (space.root / "photos/set").mkdir()
        Image.new("RGB", (64, 64), "red").save(space.root / "photos/set/0.png")
        yield served, space.root


def kind_of(schema: dict) -> str:
    """A parameter's kind, by its JSON schema; that of the first alternative that is not null."""
    for each in schema.get("anyOf", [schema]):
        if each.get("type", "object") != "null":
            return each.get("type", "object")
    raise AssertionError(schema)


def table_of(api: dict, upload: str) -> list[tuple[str, str, list, bool]]:
    """Endpoint, parameter, values of a request, and whether that is certain to be refused.

    Each parameter gets one value of a wrong type and two others; all values take turns.
    """
    good = GOOD | {"photos": [{"path": upload, "meta": {"_type": "gradio.FileData"}}]}
    taken, rows = dict.fromkeys(WRONG, 0), []
    for endpoint, facts in api["named_endpoints"].items():
        parameters = facts["parameters"]
        usual = [good.get(p["parameter_name"], p.get("parameter_default")) for p in parameters]
        for place, parameter in enumerate(parameters):
            kind = kind_of(parameter["type"])
            wrong, open_ = WRONG[kind], OPEN.get(kind, [])
            at = taken[kind]
            taken[kind] += 1
            values = [(wrong[at % len(wrong)], True)]
            values += [(open_[(2 * at + more) % len(open_)], False) for more in (0, 1) if open_]
            for value, certain in values:
                optional = value is None and "anyOf" in parameter["type"]
                row = [*usual[:place], value, *usual[place + 1 :]]
                name = parameter["parameter_name"]
                rows.append((endpoint, name, row, certain and not optional))
    return rows


def uploaded(url: str, path: Path) -> str:
    """Where the server keeps a file that is sent to it."""
    with path.open("rb") as stream:
        return httpx.post(f"{url}upload", files={"files": stream}).json()[0]


def snapshot(root: Path) -> dict:
    """What the workspace holds, and when each file was written."""
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.stat().st_mtime_ns
        for path in root.rglob("*")
        if path.name != "studio.json"
    }


async def answer(client: httpx.AsyncClient, endpoint: str, values: list) -> tuple[bool, str]:
    """Whether a request went through, and what the server said."""
    body = json.dumps({"data": values})
    sent = await client.post(f"call{endpoint}", content=body)
    if sent.status_code != 200:
        return False, sent.text
    text = (await client.get(f"call{endpoint}/{sent.json()['event_id']}")).text
    events = dict(part.split("\ndata: ", 1) for part in text.strip().split("\n\n") if "\n" in part)
    if "event: error" in events:
        return False, json.loads(events["event: error"])["error"] or "no message"
    return "event: complete" in events, text


async def answers(url: str, rows) -> list[tuple[bool, str]]:
    """The answers to many requests, some at a time."""
    most = asyncio.Semaphore(TOGETHER)
    headers = {"Content-Type": "application/json"}
    async with httpx.AsyncClient(base_url=url, timeout=60, headers=headers) as client:

        async def one(row):
            async with most:
                return await answer(client, row[0], row[2])

        return await asyncio.gather(*(one(row) for row in rows))


def fault_of(row, went: bool, said: str) -> str:
    """What is wrong with an answer; empty where nothing is."""
    endpoint, name, values, certain = row
    what = f"{endpoint} {name} {str(values)[:120]!a}: {said[:200]!r}"
    if went:
        return f"went through: {what}" if certain else ""
    if said == "no message" or "Traceback" in said or '.py"' in said or len(said) > 700:
        return f"no message: {what}"
    return "" if said.isprintable() else f"control codes: {what}"


def test_every_endpoint_answers_bad_values_with_a_message(page):
    served, root = page
    url = f"{served.local_url}gradio_api/"
    api = Client(served.local_url, verbose=False).view_api(return_format="dict", print_info=False)
    rows = table_of(api, uploaded(url, root / "photos/set/0.png"))
    assert {row[0] for row in rows} >= {"/generate", "/train", "/fuse", "/convert_adapter"}
    before, faults = snapshot(root), list[str]()
    for endpoint in dict.fromkeys(row[0] for row in rows):
        own = [row for row in rows if row[0] == endpoint]
        found = asyncio.run(answers(url, own))
        faults += filter(None, (fault_of(row, *each) for row, each in zip(own, found, strict=True)))
        after = snapshot(root)
        changed = sorted(before.keys() ^ after.keys())
        reached = any(went or said == "Reached" for went, said in found)
        if changed and not reached:
            faults.append(f"{endpoint} changed {changed[:5]}")
        before = after
    assert not faults, "\n".join(faults)
    [(went, said)] = asyncio.run(answers(url, [("/adapters", "", [], False)]))
    assert went and '"b"' in said  # it is alive, and what it had is there
