"""Model cards, and a push to a stand-in for a hub."""

import base64
import json
import os
import shlex
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from rite_diffusion.adapters import Adapter, AdapterInfo, save_adapter
from rite_diffusion.adapters.card import card
from rite_diffusion.api.publish import write_card
from rite_diffusion.errors import OutputError
from rite_diffusion.types import LoraPair

PAIR = LoraPair("lora_unet_conv_in", torch.ones(2, 4), torch.ones(6, 2), 0.5)
INFO = AdapterInfo(
    trigger="<dog>", class_noun="dog", base="someone/model", licence="cc-by-4.0", steps="30"
)


@pytest.fixture
def adapter(tmp_path):
    path = tmp_path / "dog.safetensors"
    save_adapter(path, Adapter([PAIR], INFO))
    return path


def test_a_card_states_the_facts_of_the_header(adapter):
    text = write_card(adapter).read_text()
    for words in ('license: "cc-by-4.0"', 'base_model: "someone/model"', "| steps | `30` |",
                  '--adapter dog.safetensors --base someone/model',
                  'load_lora_weights(".", weight_name="dog.safetensors")'):  # fmt: skip
        assert words in text
    with pytest.raises(OutputError, match=r"README.md exists already"):
        write_card(adapter)


def test_a_header_cannot_inject_markup_into_the_card():
    bad = AdapterInfo(trigger="x", method="`</table>`|\n---\nlicense: mit", licence='a"\nb: c')
    text = card(Adapter([PAIR], bad), "a.safetensors")
    assert text.count("\n---\n") == 1 and "\nb: c" not in text
    assert "`</table>\\| --- license: mit`" in text


class Hub(BaseHTTPRequestHandler):
    """What a hub answers to a new repository and one commit; keeps what it was told."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.asked[self.path] = (self.headers.get("Authorization"), body)
        if self.path.endswith("/repos/create"):
            answer = {"url": f"{self.server.address}/me/dog", "name": "me/dog"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                                for f in files]}  # fmt: skip
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{self.server.address}/me/dog/commit/0", "commitOid": "0" * 40,
                      "success": True}  # fmt: skip
        else:
            answer = {"errors": [], "warnings": []}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.address = {}, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def pushed(file, address, offline="0"):
    code = "from rite_diffusion.cli.app import main; main()"
    environment = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": "stand-in",
                                "HF_HUB_OFFLINE": offline}  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code, "push", str(file), "me/dog"],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip


def test_push_sends_the_adapter_and_its_card_in_one_commit(adapter, hub):
    done = pushed(adapter, hub.address)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/me/dog/commit/0")
    [create] = [asked for path, asked in hub.asked.items() if path.endswith("/repos/create")]
    assert create[0] == "Bearer stand-in" and "private" in json.loads(create[1]).values()
    [commit] = [asked for path, asked in hub.asked.items() if "/commit/" in path]
    lines = [json.loads(line)["value"] for line in commit[1].splitlines()]
    sent = {line["path"]: base64.b64decode(line["content"]) for line in lines if "path" in line}
    assert sent["dog.safetensors"] == adapter.read_bytes()
    assert sent["README.md"].decode() == card(Adapter([PAIR], INFO), "dog.safetensors")


def test_a_failed_push_is_an_error_of_one_line(adapter, unused_port):
    for offline, address in (("1", "http://127.0.0.1:1"), ("0", f"http://127.0.0.1:{unused_port}")):
        done = pushed(adapter, address, offline)
        assert done.returncode == 2 and "was not uploaded to 'me/dog'" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_header_cannot_inject_shell_code_into_the_cards_command(tmp_path):
    trigger, name = "<x> $(touch owned) \"'; true", "my dog\x1b.safetensors"
    save_adapter(tmp_path / name, Adapter([PAIR], replace(INFO, trigger=trigger, base="a; true")))
    text = write_card(tmp_path / name).read_text()
    [line] = [line for line in text.splitlines() if line.startswith("rite generate")]
    words = ["rite", "generate", f"a {trigger}", "--adapter", "my dog\\x1b.safetensors"]
    assert shlex.split(line) == [*words, "--base", "a; true"]
    echo = ["sh", "-c", f"printf '%s\\n' {line}"]
    shown = subprocess.run(echo, capture_output=True, text=True, cwd=tmp_path).stdout
    assert shown.splitlines() == shlex.split(line) and not (tmp_path / "owned").exists()
