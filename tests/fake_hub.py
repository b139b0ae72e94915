"""A stand-in for the Hugging Face hub over HTTP: the requests that huggingface_hub and datasets make of it, no more.

A repository is a mapping of revisions (main, v0, …) to files. Models can be made and committed to, with a token.
What it cannot do it answers with 501 and keeps in `unknown`, which a test can look at.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = Mapping[str, bytes]


def commit_of(files: Files) -> str:
    """A commit id that depends on the content alone."""
    digest = hashlib.sha1(usedforsecurity=False)
    for name, content in sorted(files.items()):
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


def etag_of(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@dataclass
class FakeHub:
    """What the stand-in serves, and what was asked of it.

    `repositories` are by "models/org/name" or "datasets/org/name". `gated` ones are listed, but their files are
    refused with that status. `sizes` lie about a file. `cut` decides of a GET of a file how many of its bytes are sent
    before the connection is closed (None: all). `tokens` are those that are known, and whether they may write.
    `private` are repositories.
    """

    repositories: dict[str, Mapping[str, Files]] = field(default_factory=dict)
    gated: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    cut: Callable[[str, int], int | None] = lambda path, start: None
    closes_connections: bool = False
    tokens: dict[str, bool] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    url: str = ""

    def files_at(self, key: str, revision: str) -> Files | None:
        revisions = self.repositories[key]
        by_commit = {commit_of(files): files for files in revisions.values()}
        return {**by_commit, **revisions}.get(revision)

    def fetched(self) -> list[str]:
        """The paths of the files that were sent."""
        return [path for method, path in self.requests if method == "GET" and "/resolve/" in path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        if self.hub.closes_connections:
            self.close_connection = True
            return
        try:
            super().handle_one_request()
        except ConnectionError:  # the other side has had enough
            self.close_connection = True

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.command == "POST" and self.take_write(path, body):
            return
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            kind, name, what, revision, rest = api.groups()
        elif file:
            kind, name, what, revision, rest = (file[1] and "datasets") or "models", file[2], "file", file[3], file[4]
        else:
            self.hub.unknown.append(f"{self.command} {self.path}")
            self.send(501)
            return
        key = f"{kind}/{name}"
        if key not in self.hub.repositories:
            self.fail(401, "RepoNotFound", "Invalid username or password.")
            return
        files = self.hub.files_at(key, revision or "main")
        if files is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif what == "file" and key in self.hub.gated:
            self.fail(self.hub.gated[key], "GatedRepo", f"Access to {kind} {name} is restricted.")
        elif what == "file":
            self.send_file(files, rest)
        elif what == "tree":
            self.send_tree(files, rest.strip("/"))
        elif what == "paths-info":
            self.send_paths(files, body)
        else:
            siblings = [{"rfilename": each} for each in sorted(files)]
            is_private = key in self.hub.private
            self.send(
                200, {"id": name, "sha": commit_of(files), "siblings": siblings, "private": is_private, "tags": []}
            )

    def take_write(self, path: str, body: bytes) -> bool:
        """Answer a request to make a model's repository or to commit to it; False if it is none."""
        found = re.fullmatch(
            r"/api/(?:(repos/create|validate-yaml)|models/([^/]+/[^/]+)/(preupload|commit)/main)", path
        )
        if not found:
            return False
        may_write = self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if not may_write:
            self.send(401 if may_write is None else 403, {"error": "no"})
        elif found[1] == "validate-yaml":
            self.send(200, {"errors": [], "warnings": []})
        elif found[1]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            is_private = asked.get("private") or asked.get("visibility") == "private"  # by the client's version
            is_there = f"models/{name}" in self.hub.repositories
            if not is_there:
                self.hub.repositories[f"models/{name}"] = {"main": {}}
                self.hub.private |= {f"models/{name}"} if is_private else set()
            self.send(409 if is_there else 200, {"url": f"{self.hub.url}/{name}"})
        elif found[3] == "preupload":
            files = json.loads(body)["files"]
            self.send(200, {"files": [{**each, "uploadMode": "regular", "shouldIgnore": False} for each in files]})
        else:
            self.commit(f"models/{found[2]}", [json.loads(line) for line in body.splitlines()])
        return True

    def commit(self, key: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.hub.repositories[key]["main"])
        for value in (line["value"] for line in lines if line["key"] == "deletedFile"):
            del files[value["path"]]
        for value in (line["value"] for line in lines if line["key"] == "file"):
            files[value["path"]] = base64.b64decode(value["content"])
        self.hub.repositories[key] = {"main": files}
        url = f"{self.hub.url}/{key.removeprefix('models/')}/commit/{commit_of(files)}"
        self.send(200, {"success": True, "commitOid": commit_of(files), "commitUrl": url})

    def entry(self, files: Files, name: str) -> dict[str, Any]:
        size = self.hub.sizes.get(name, len(files[name]))
        return {"type": "file", "path": name, "size": size, "oid": etag_of(files[name])}

    def folder(self, name: str) -> dict[str, Any]:
        return {"type": "directory", "path": name, "size": 0, "oid": etag_of(name.encode())}

    def send_tree(self, files: Files, under: str) -> None:
        query = parse_qs(urlsplit(self.path).query)
        prefix = f"{under}/" if under else ""
        inside = [name for name in sorted(files) if name.startswith(prefix)]
        if under and not inside:
            self.fail(404, "EntryNotFound", f"{under} does not exist")
            return
        recursive = query.get("recursive") == ["True"] or query.get("recursive") == ["true"]
        direct = [name for name in inside if recursive or "/" not in name[len(prefix) :]]
        folders = {prefix + name[len(prefix) :].split("/")[0] for name in inside if "/" in name[len(prefix) :]}
        self.send(200, [*map(self.folder, sorted(folders)), *(self.entry(files, name) for name in direct)])

    def send_paths(self, files: Files, body: bytes) -> None:
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(body)["paths"]
        else:
            paths = parse_qs(body.decode())["paths"]
        folders = [path for path in paths if any(name.startswith(f"{path}/") for name in files)]
        self.send(200, [*map(self.folder, folders), *(self.entry(files, path) for path in paths if path in files)])

    def send_file(self, files: Files, name: str) -> None:
        if name not in files:
            self.fail(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit_of(files)})
            return
        content = files[name]
        headers = {"ETag": f'"{etag_of(content)}"', "X-Repo-Commit": commit_of(files), "Accept-Ranges": "bytes"}
        start = 0
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content = content[start : end + 1]
        if self.command == "HEAD":
            self.send_head(200, self.hub.sizes.get(name, len(content)), headers)
            return
        sent = self.hub.cut(name, start)
        if sent is None:
            self.send(206 if wanted else 200, content, headers)
            return
        self.send_head(206 if wanted else 200, len(content), headers)
        self.wfile.write(content[:sent])
        self.close_connection = True

    def fail(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        self.send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def send(self, status: int, content: Any = b"", headers: Mapping[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_head(status, len(data), headers or {})
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(key, value)
        self.end_headers()


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Answer requests on a free port of this machine until the block ends; its address is in `hub.url`."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
