"""A stand-in of the Hugging Face Hub's API, as far as its client creates, uploads to and loads from a repository."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import yaml
from babel import Locale
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import HFValidationError, validate_repo_id

COMMIT = "c" * 40

_LICENCES = """
afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd
bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gemma gfdl gpl gpl-2.0
gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail
openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
LICENCES = _LICENCES.split()
"""The identifiers that the Hub's documentation lists (an edition of 2024: later ones are refused here)."""

LANGUAGES = [*Locale("en").languages, "code", "multilingual"]
"""ISO 639 codes, as far as CLDR names their languages, and the Hub's own two."""


class HubStandIn:
    """Serves repositories, each a folder, until the context ends.

    Attributes:
        url: The endpoint.
        tokens: The ``Authorization`` headers of everything that wrote.
        validated: The contents of the cards whose metadata the client had checked, and that were accepted.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.validated: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubStandIn:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process that takes this for the Hub: the client reads its endpoint once.

        Args:
            home: Where its cache and its settings are.
        """
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": "hf_stand_in"}
        return {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **own}

    def folder(self, repo_id: str) -> Path:
        """Where a repository's files are."""
        return self.root / repo_id

    def write(self, repo_id: str, path: str, content: bytes) -> None:
        """Take a file into a repository."""
        file = self.folder(repo_id) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        self.hub.tokens.add(self.headers["Authorization"])
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            errors = [{"message": problem} for problem in find_problems(content)]
            if not errors:
                self.hub.validated.append(content)
            return self._send({"errors": errors, "warnings": []}, 400 if errors else 200)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo_id = f"{wanted['organization']}/{wanted['name']}"
            self.hub.folder(repo_id).mkdir(parents=True)
            return self._send({"url": f"{self.hub.url}/{repo_id}"})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._send({"objects": [self._upload(of) for of in json.loads(body)["objects"]]})
        if parts[:2] == ["api", "models"] and parts[4] == "preupload":
            return self._send({"files": [self._mode(of["path"]) for of in json.loads(body)["files"]]})
        if parts[:2] == ["api", "models"] and parts[4] == "commit":
            return self._commit("/".join(parts[2:4]), body)
        return self._send({"error": f"no such endpoint: {path}"}, 404)

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self._send({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo_id = "/".join(parts[2:4])
            folder = self.hub.folder(repo_id)
            if not folder.is_dir():
                return self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
            if len(parts) > 4 and parts[4] == "tree":
                below = "/".join(parts[6:])
                listed = [
                    {"type": "file", "path": name, "size": 0, "oid": name} for name in files if name.startswith(below)
                ]
                return self._send(listed) if listed else self._send({"error": "Entry not found"}, 404, _NO_ENTRY)
            if len(parts) > 4 and parts[4] == "commits":
                day = "2025-01-01T00:00:00.000Z"
                return self._send([{"id": COMMIT, "authors": [], "date": day, "title": "All", "message": ""}])
            return self._send({"id": repo_id, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        file = self.hub.folder("/".join(parts[:2])) / "/".join(parts[4:])
        if parts[2:3] != ["resolve"] or not file.is_file():
            return self._send({"error": "Entry not found"}, 404, _NO_ENTRY)
        content = file.read_bytes()
        return self._send(content, 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', **_AT_COMMIT})

    def _mode(self, path: str) -> dict[str, Any]:
        """Weights go to the large file storage, as on the Hub."""
        return {
            "path": path,
            "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
            "shouldIgnore": False,
        }

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}}

    def _commit(self, repo_id: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.write(repo_id, value["path"], base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                self.hub.write(repo_id, value["path"], self.hub.objects[value["oid"]])
        self._send({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{COMMIT}", "commitOid": COMMIT})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


_AT_COMMIT = {"X-Repo-Commit": COMMIT}
_NO_ENTRY = {"X-Error-Code": "EntryNotFound", **_AT_COMMIT}


# --- What is wrong with a card ---


def find_problems(content: str) -> list[str]:
    """What the Hub would find fault with in a model card's metadata, as far as it can be told without it.

    Args:
        content: The whole card.

    Returns:
        A sentence for each fault; none for a card that is taken.
    """
    if not REGEX_YAML_BLOCK.search(content):
        return ["there is no metadata"]
    try:
        data = ModelCard(content).data  # YAML, a mapping, and results that have all they need
    except (ValueError, TypeError, yaml.YAMLError) as error:
        return [str(error)]
    return [*_unknown(data), *_malformed(data)]


def _unknown(data: ModelCardData) -> Iterator[str]:
    if data.license is not None and data.license not in LICENCES:
        yield f'"license" is {data.license!r}, which is none of the Hub\'s'
    if data.pipeline_tag is not None and not _is_task(data.pipeline_tag):
        yield f'"pipeline_tag" is {data.pipeline_tag!r}, which is no task'
    for code in _as_list(data.language):
        if code not in LANGUAGES:
            yield f'"language" has {code!r}, which is no ISO 639 code'


def _malformed(data: ModelCardData) -> Iterator[str]:
    for repo_id in [*_as_list(data.base_model), *_as_list(data.datasets)]:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            yield f'"base_model" or "datasets": {error}'
    for name in ("tags", "metrics"):
        if not all(isinstance(item, str) for item in _as_list(getattr(data, name))):
            yield f'"{name}" is {getattr(data, name)!r}; it must be a list of strings'
    for result in data.eval_results or ():
        if not (isinstance(result.metric_value, (int, float)) and math.isfinite(result.metric_value)):
            yield f'"model-index": {result.metric_type!r} is {result.metric_value!r}, not a finite number'


def _is_task(tag: Any) -> bool:
    """The client has a type for the inputs of each task: ``SentenceSimilarityInput``."""
    parts = tag.split("-") if isinstance(tag, str) else []
    return bool(parts) and hasattr(huggingface_hub, "".join(part.title() for part in parts) + "Input")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
