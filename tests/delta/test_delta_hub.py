"""Deltas on the hub: the real client against a server that answers what the hub does."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from lightning_mask.delta import inspect, save_delta

pytest.importorskip("huggingface_hub")
COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """One repository, whose files are those of the commits."""

    files: dict[str, bytes]
    asked: list[str]

    def _answer(self, content: Any, code: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/me/closed/" in self.path:
            self._answer({"error": "You may not write here."}, 403)
        elif self.path == "/api/repos/create":
            made = json.loads(body)
            assert made.get("private") or made.get("visibility") == "private"
            name = f"{made.get('organization') or 'me'}/{made['name']}"
            self._answer({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [each["path"] for each in json.loads(body)["files"]]
            self._answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/me/tuned/commit/{COMMIT}"
            self._answer({"commitUrl": url, "commitOid": COMMIT, "success": True, "hookOutput": ""})

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        content = self.files.get(self.path.rpartition("/")[2])
        if content is None:
            self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            self._answer(content, ETag=f'"{sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    Hub.files, Hub.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


PROGRAM = """
import sys
from lightning_mask.delta import pull_delta, push_delta
print(push_delta("d.safetensors", "me/tuned", name="tweets.safetensors"))
print(pull_delta("me/tuned", "pulled.safetensors", name="tweets.safetensors"))
for refused in (lambda: pull_delta("me/tuned"), lambda: push_delta("d.safetensors", "me/closed")):
    try:
        refused()
    except (FileNotFoundError, ValueError) as error:
        print(type(error).__name__, error)
"""


def test_a_delta_is_pushed_and_pulled_by_the_real_client(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    save_delta(tmp_path / "d.safetensors", {"w": torch.zeros(3)}, {"w": torch.ones(3)}, metrics={"test/accuracy": 0.5})
    address = f"http://127.0.0.1:{hub.server_port}"
    given = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_XET": "1"}
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE" and "proxy" not in k.lower()} | given
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, (ran.stderr, Hub.asked)
    pushed, pulled, missing, closed = ran.stdout.splitlines()
    assert pushed.startswith(f"{address}/me/tuned/")
    assert (
        (tmp_path / pulled).read_bytes() == (tmp_path / "d.safetensors").read_bytes() == Hub.files["tweets.safetensors"]
    )
    card = Hub.files["README.md"].decode()
    assert inspect(tmp_path / pulled)["base"][:16] in card
    assert "| test/accuracy | 0.5000 |" in card
    assert missing.startswith("FileNotFoundError There is no delta.safetensors in 'me/tuned' on the hub")
    assert closed.startswith("ValueError 'me/closed' could not be written to on the hub")
