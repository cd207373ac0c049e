"""A small hub: the HTTP requests that ``huggingface_hub``'s client sends to publish and to download, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER, STRANGER, UNLUCKY = "hf_writer", "hf_reader", "hf_stranger", "hf_unlucky"
"""Tokens: for writing, for reading only, one that is refused with each commit, and one whose commits fail."""
_LFS_FROM = 1000
"""Bytes from which a file is stored apart from the commits."""


@dataclass
class Repository:
    """A repository: its last commit."""

    private: bool = False
    commit: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What the server holds: repositories by type and name, large files by hash, and the requests."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def run_hub() -> Iterator[Hub]:
    """Serve an empty hub on this machine."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        self.state.requests.append(f"{self.command} {self.path}")

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            self._whoami()
        elif found := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(found[1], found[2])
        elif found := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", path):
            self._tree(found[1], found[2], found[3] or "")
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file("dataset" if found[1] else "model", found[2], found[3])
        else:
            self._send(404, {"error": "Not Found"})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        body = self._body()
        digest = self.path.rpartition("/")[2]
        right = hashlib.sha256(body).hexdigest() == digest
        self.state.large |= {digest: body} if right else {}
        self._send(200 if right else 400, {})

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        if path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/preupload/main", path):
            self._send(200, {"files": [_upload(one) for one in json.loads(body)["files"]]})
        elif re.fullmatch(r"/(datasets/)?[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            self._send(200, {"transfer": "basic", "objects": [self._object(o) for o in json.loads(body)["objects"]]})
        elif found := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/commit/main", path):
            self._commit(found[1], found[2], [json.loads(line) for line in body.splitlines()])
        else:
            self._send(404, {"error": "Not Found"})

    def _token(self) -> str:
        return self.headers.get("authorization", "").removeprefix("Bearer ")

    def _whoami(self) -> None:
        if self._token() not in (WRITER, READER, STRANGER, UNLUCKY):
            self._send(401, {"error": "Invalid credentials in Authorization header"})
            return
        role = "read" if self._token() == READER else "write"
        orgs = [
            {"type": "org", "name": "team", "roleInOrg": "write"},
            {"type": "org", "name": "seen", "roleInOrg": "read"},
        ]
        self._send(200, {"type": "user", "name": "me", "orgs": orgs, "auth": {"accessToken": {"role": role}}})

    def _create(self, asked: dict[str, Any]) -> None:
        owner, kind = asked.get("organization") or "me", asked.get("type") or "model"
        name = f"{owner}/{asked['name']}"
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.state.repositories.setdefault(f"{kind}:{name}", Repository(private, "0" * 40))
        self._send(200, {"url": f"{self.state.url}/{'datasets/' if kind == 'dataset' else ''}{name}"})

    def _find(self, kind: str, name: str) -> Repository | None:
        found = self.state.repositories.get(f"{kind}:{name}")
        if found is None or (found.private and not self._token()):
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def _info(self, kind: str, name: str) -> None:
        if (found := self._find(kind, name)) is not None:
            listed = [{"rfilename": path} for path in (".gitattributes", *found.files)]
            self._send(200, {"id": name, "sha": found.commit, "private": found.private, "siblings": listed, "tags": []})

    def _tree(self, kind: str, name: str, folder: str) -> None:
        if (found := self._find(kind, name)) is None:
            return
        start = f"{folder}/" if folder else ""
        inside = {path: data for path, data in found.files.items() if path.startswith(start)}
        if folder and not inside:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        listed: dict[str, dict[str, Any]] = {}
        for path, data in inside.items():
            below, _, rest = path.removeprefix(start).partition("/")
            if rest and "recursive=false" in self.path.lower():
                listed[start + below] = {"type": "directory", "path": start + below, "oid": "0" * 40, "size": 0}
            else:
                listed[path] = {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
        self._send(200, list(listed.values()))

    def _file(self, kind: str, name: str, path: str) -> None:
        if (found := self._find(kind, name)) is None:
            return
        if path not in found.files:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        data = found.files[path]
        self._send(200, data, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": found.commit})

    def _object(self, asked: dict[str, Any]) -> dict[str, Any]:
        upload = {"upload": {"href": f"{self.state.url}/large/{asked['oid']}"}}
        return {**asked, **({} if asked["oid"] in self.state.large else {"actions": upload})}

    def _commit(self, kind: str, name: str, lines: list[dict[str, Any]]) -> None:
        found = self._find(kind, name)
        if found is None:
            return
        if self._token() == STRANGER:
            self._send(403, {"error": "Forbidden: you must have write access"})
            return
        if self._token() == UNLUCKY:
            self._send(500, {"error": "the disk is full"})
            return
        files = dict(found.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.large[value["oid"]]
            else:
                files.pop(value["path"])
        found.files, found.commits = files, [*found.commits, lines[0]["value"]["summary"]]
        found.commit = _oid(json.dumps([len(found.commits), sorted(files)]).encode())
        address = f"{self.state.url}/{'datasets/' if kind == 'dataset' else ''}{name}/commit/{found.commit}"
        self._send(200, {"success": True, "commitUrl": address, "commitOid": found.commit})

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _upload(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["size"] >= _LFS_FROM and not file["path"].endswith((".json", ".md", ".yaml")) else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
