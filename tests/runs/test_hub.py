"""`export --push` and `reproduce hub:NAME`, through huggingface_hub's own client.

The hub is a stand-in on loopback, because none can be reached here: it takes a repository's creation and one commit of
whole files, and gives files back, as the client asks for them.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from advice import heard
from drumline.recipe import yaml12

pytestmark = [pytest.mark.xdist_group("docs"), pytest.mark.heavy]


class Hub:
    """Repositories by name, each with its files; `asked`: what was asked for with which token."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str | None] = set()
        self.is_down = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_POST(self) -> None:
                hub.tokens.add(self.headers.get("Authorization"))
                size = int(self.headers.get("Content-Length") or 0)
                raw = self.rfile.read(size)
                if hub.is_down:
                    self.answer(b"{}", 500)
                elif self.path == "/api/repos/create":
                    wish = json.loads(raw)
                    name = (
                        f"{wish['organization']}/{wish['name']}"
                        if wish.get("organization")
                        else wish["name"]
                    )
                    hub.files.setdefault(name, {})
                    hub.private[name] = bool(
                        wish.get("private") or wish.get("visibility") == "private"
                    )
                    self.answer(
                        json.dumps(
                            {"url": f"{hub.address}/{name}", "id": "1", "name": name}
                        ).encode()
                    )
                elif self.path == "/api/validate-yaml":
                    self.answer(b'{"errors": [], "warnings": []}')
                elif self.path.endswith("/preupload/main"):
                    files = [
                        {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for one in json.loads(raw)["files"]
                    ]
                    self.answer(json.dumps({"files": files}).encode())
                elif found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
                    for line in map(json.loads, raw.splitlines()):
                        if line["key"] == "file":
                            hub.files[found[1]][line["value"]["path"]] = base64.b64decode(
                                line["value"]["content"]
                            )
                    self.answer(
                        json.dumps(
                            {
                                "success": True,
                                "commitOid": "a" * 40,
                                "commitUrl": f"{hub.address}/{found[1]}/commit/{40 * 'a'}",
                                "hookOutput": "",
                            }
                        ).encode()
                    )
                else:
                    self.answer(b"{}", 404)

            def do_GET(self) -> None:
                if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path):
                    body = hub.files.get(found[1], {}).get(found[3])
                    if body is None:
                        code = "EntryNotFound" if found[1] in hub.files else "RepoNotFound"
                        return self.answer(b"", 404, X_Error_Code=code, X_Error_Message="not there")
                    tag = hashlib.sha256(body).hexdigest()
                    return self.answer(body, X_Repo_Commit="a" * 40, ETag=f'"{tag}"')
                if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", self.path):
                    name = found[1]
                    if name in hub.files:
                        siblings = [{"rfilename": one} for one in hub.files[name]]
                        return self.answer(
                            json.dumps(
                                {
                                    "id": name,
                                    "modelId": name,
                                    "sha": "a" * 40,
                                    "private": True,
                                    "siblings": siblings,
                                    "tags": [],
                                }
                            ).encode()
                        )
                return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")

            do_HEAD = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, module_drumline: Any) -> Path:
    """A short run that has ended."""
    folder = tmp_path_factory.mktemp("hub")
    short = ["duration.steps=4", "schedule.warmup_steps=1", "evaluation.every_steps=4"]
    done = module_drumline(folder, "run", "tiny-code-lm", *short, "--run-dir", "r")
    assert done.returncode == 0, done.stderr
    return folder / "r"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    made = Hub()
    monkeypatch.setenv("HF_ENDPOINT", made.address)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    yield made
    made.close()


def test_a_model_is_pushed_with_its_card_and_trained_again_from_there(
    hub: Hub, run: Path, drumline: Any, tmp_path: Path
) -> None:
    """The card says what the record holds and nothing of the machine's folders; the name alone reproduces the run."""
    record = json.loads((run / "record.json").read_text())
    done = drumline("export", str(run), "model", "--push", "me/tiny")
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/me/tiny" in done.stdout
    assert hub.private == {"me/tiny": True}
    assert hub.tokens == {"Bearer hf_" + "x" * 34}
    files = hub.files["me/tiny"]
    assert {"config.json", "model.safetensors", "README.md", "drumline/recipe.yaml"} <= set(files)
    card = files["README.md"].decode()
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert yaml12.parse(head) == {"library_name": "transformers", "tags": ["drumline"]}
    for said in ("32 = 8 per device × 2 GPUs × 2 accumulation", "| optimizer steps | 4 of 4 |", record["data"]["fingerprint"], "eval/loss", "torch 2.",
                 "drumline reproduce hub:me/tiny"):  # fmt: skip
        assert said in body, said
    for hidden in (str(tmp_path), record["hardware"]["host"] + " ", "hf_xxx"):
        assert hidden not in card
    again = drumline("reproduce", "hub:me/tiny", "--gpus", "1", "--run-dir", "again", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["verdict"] == "equal"


def test_what_cannot_be_pushed_or_found_is_told(
    hub: Hub, run: Path, drumline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written, and with the address of nothing that is not there."""
    wrong = drumline("export", str(run), "model", "--push", "me/too/deep")
    heard("Nearest: --push you/", wrong.stderr)
    heard(
        "a job pushes nothing. Nearest: --to local",
        drumline("export", str(run), "model", "--push", "me/x", "--to", "slurm").stderr,
    )
    heard(
        "nothing is pushed. Nearest: --push NAME, or without it",
        drumline("export", str(run), "model", "--public").stderr,
    )
    monkeypatch.setenv("HF_TOKEN", "")
    heard(
        "no login is known. Nearest: hf auth login, or HF_TOKEN in the environment",
        drumline("export", str(run), "model", "--push", "me/x").stderr,
    )
    assert not (tmp_path / "model").exists()
    hub.files["me/other"] = {"config.json": b"{}"}
    for name, words in (("me/other", "drumline did not export it"), ("me/none", "404")):
        found = drumline("reproduce", f"hub:{name}")
        assert found.returncode == 2, found.stderr
        assert words in found.stderr
        assert "Traceback" not in found.stderr


def test_a_hub_that_fails_leaves_the_folder(
    hub: Hub, run: Path, drumline: Any, tmp_path: Path
) -> None:
    """The export is complete, and the message has the command that sends it later; a run that trains is not pushed."""
    hub.is_down = True
    done = drumline("export", str(run), "model", "--push", "me/x")
    assert done.returncode == 2
    heard("the folder model is complete. Nearest: hf upload me/x model", done.stderr)
    assert {"config.json", "model.safetensors", "README.md"} <= {
        path.name for path in (tmp_path / "model").iterdir()
    }
    shutil.copytree(run, tmp_path / "trains")
    record = json.loads((run / "record.json").read_text())
    (tmp_path / "trains/record.json").write_text(json.dumps({**record, "weights": None}))
    done = drumline("export", "trains", "other", "--push", "me/x")
    heard("has not ended, so its record is not complete. Nearest: without --push", done.stderr)
    assert not (tmp_path / "other").exists()
    assert drumline("export", "trains", "other").returncode == 0
