# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face hub on the loopback interface: the routes that pushes and downloads use, with faults on order.

Repositories, branches, commits and large-file contents live in memory. A content is stored under the sha256 of what
arrived, and refused when that is not what was announced. `fail`, `cut` and `lie` order misbehaviour.
"""

import base64
import hashlib
import json
import re
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
ROUTES = {
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "yaml": ("POST", r"/api/validate-yaml"),
    "preupload": ("POST", MODEL + r"/preupload/(?P<rev>[^/]+)"),
    "commit": ("POST", MODEL + r"/commit/(?P<rev>[^/]+)"),
    "branch": ("POST", MODEL + r"/branch/(?P<rev>[^/]+)"),
    "paths": ("POST", MODEL + r"/paths-info/(?P<rev>[^/]+)"),
    "tree": ("GET", MODEL + r"/tree/(?P<rev>[^/]+)"),
    "info": ("GET", MODEL + r"(/revision/(?P<rev>[^/]+))?"),
    "batch": ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    "put": ("PUT", r"/blobs/(?P<sha>[0-9a-f]{64})"),
    "resolve": ("GET|HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)"),
}
OPEN_ROUTES = {"put"}  # storage takes signed addresses, not tokens


@dataclass(frozen=True)
class Stored:
    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob(self) -> str:
        """Git's name of what git stores: the content, or the pointer to it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        text = pointer.encode() if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()


@dataclass
class Repository:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Stored]) -> str:
        listing = json.dumps([len(self.commits), {name: stored.sha256 for name, stored in sorted(files.items())}])
        oid = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def find(self, revision: str | None) -> str | None:
        oid = self.branches.get(revision or "main", revision)
        return oid if oid in self.commits else None


@dataclass(frozen=True)
class Fault:
    """status: answer with it. cut "half": drop the connection in mid-body; "lost": do the work, then drop it;
    "silent": answer nothing until the hub ends.
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: str = ""


class DroppedError(Exception):
    """The connection is to be closed without an answer."""


class FakeHub:
    """Use as a context manager. token: the only one accepted (None: no token is asked for)."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.repos: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.calls: Counter[str] = Counter()  # requests of each route, failed ones too
        self.stored: list[str] = []  # sha256 of each content that was uploaded to the end
        self.whole: list[str] = []  # files of which all was asked for
        self.lies: set[str] = set()  # names that the listing gives a wrong hash
        self.faults: dict[str, deque[Fault]] = {route: deque() for route in ROUTES}
        self.lock = Lock()
        self.ended = Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def fail(
        self, route: str, status: int, *, times: int = 1, headers: Mapping[str, str] | None = None, body: str = ""
    ) -> None:
        """Answer the next requests of a route with a status."""
        self.faults[route].extend([Fault(status, headers or {}, body.encode())] * times)

    def cut(self, route: str, *, times: int = 1, how: str = "half") -> None:
        """Drop the connection of the next requests of a route."""
        self.faults[route].extend([Fault(cut=how)] * times)

    def heal(self) -> None:
        for faults in self.faults.values():
            faults.clear()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a branch or commit, without the file that every repository begins with."""
        files = self.repos[repo].commits[self.repos[repo].find(revision) or ""]
        return {name: stored.content for name, stored in files.items() if name != ".gitattributes"}


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's acknowledgement

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.handle_any()

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        def handle_any(self) -> None:
            try:
                self.dispatch()
            except (DroppedError, ConnectionError):
                self.close_connection = True

        def dispatch(self) -> None:
            path = urlsplit(self.path).path
            matches = ((name, re.fullmatch(pattern, path), methods) for name, (methods, pattern) in ROUTES.items())
            found = ((name, match) for name, match, methods in matches if match and self.command in methods.split("|"))
            route, match = next(found, ("", None))
            with hub.lock:
                hub.calls[route] += 1
                faults = hub.faults.get(route)
                fault = faults.popleft() if faults else Fault()
            if fault.cut == "silent":
                hub.ended.wait()
                raise DroppedError
            if fault.cut == "half" and route != "resolve":
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                raise DroppedError
            body = self.body()
            if fault.status:
                return self.answer(fault.status, fault.body, fault.headers)
            if match is None:
                return self.answer(404, b'{"error": "no such route"}')
            if hub.token and route not in OPEN_ROUTES and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.answer(401, b'{"error": "Invalid credentials"}')
            fields = {key: unquote(value) for key, value in match.groupdict().items() if value}
            with hub.lock:
                answer = getattr(self, f"on_{route}")(fields, body)
            if fault.cut == "lost":
                raise DroppedError
            return self.answer(*answer, half=fault.cut == "half")

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def answer(
            self, status: int, content: Any, headers: Mapping[str, str] | None = None, *, half: bool = False
        ) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if half else data)
            if half:
                raise DroppedError

        def found(self, fields: Mapping[str, str]) -> tuple[Repository | None, str, tuple[Any, ...]]:
            """The repository and the commit; or None, and the answer that says what is missing."""
            repo = hub.repos.get(fields["repo"])
            if repo is None:
                return None, "", (404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            oid = repo.find(fields.get("rev"))
            if oid is None:
                return None, "", (404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return repo, oid, ()

        # Each on_<route> returns (status, body) or (status, body, headers).

        def on_whoami(self, fields: Mapping[str, str], body: bytes) -> tuple[Any, ...]:
            return 200, {"type": "user", "name": "someone", "orgs": []}

        def on_create(self, fields: Mapping[str, str], body: bytes) -> tuple[Any, ...]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            url = {"url": f"{hub.endpoint}/{name}"}
            if name in hub.repos:
                return 409, {"error": "You already created this model repo", **url}
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            hub.repos[name] = Repository(private)
            hub.repos[name].commit("main", {".gitattributes": Stored(b"*.safetensors filter=lfs\n", large=False)})
            return 200, url

        def on_yaml(self, fields: Mapping[str, str], body: bytes) -> tuple[Any, ...]:
            return 200, {"errors": [], "warnings": []}

        def on_branch(self, fields: Mapping[str, str], body: bytes) -> tuple[Any, ...]:
            repo = hub.repos[fields["repo"]]
            if fields["rev"] in repo.branches:
                return 409, {"error": "Reference already exists"}
            repo.branches[fields["rev"]] = repo.branches["main"]
            return 200, {}

        def on_preupload(self, fields: Mapping[str, str], body: bytes) -> tuple[Any, ...]:
            repo, oid, missing = self.found(fields)
            if repo is None:
                return missing
            files = []
            for asked in json.loads(body)["files"]:
                large = asked["path"].endswith(".safetensors") or asked["size"] > 10_000_000
                there = repo.commits[oid].get(asked["path"])
                known = {"oid": there.sha256 if there.large else there.blob} if there else {}
                mode = "lfs" if large else "regular"
                files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, **known})
            return 200, {"files": files}

        def on_batch(self, fields: Mapping[str, str], body: bytes) -> tuple[Any, ...]:
            objects = []
            for asked in json.loads(body)["objects"]:
                address = {"href": f"{hub.endpoint}/blobs/{asked['oid']}?X-Amz-Signature=signed"}
                actions = {} if asked["oid"] in hub.blobs else {"actions": {"upload": address}}
                objects.append({"oid": asked["oid"], "size": asked["size"], **actions})
            return 200, {"transfer": "basic", "objects": objects}

        def on_put(self, fields: Mapping[str, str], body: bytes) -> tuple[Any, ...]:
            if hashlib.sha256(body).hexdigest() != fields["sha"]:
                return 400, {"error": "the content does not match its name"}
            hub.blobs[fields["sha"]] = body
            hub.stored.append(fields["sha"])
            return 200, {}

        def on_commit(self, fields: Mapping[str, str], body: bytes) -> tuple[Any, ...]:
            repo, oid, missing = self.found(fields)
            if repo is None:
                return missing
            files = dict(repo.commits[oid])
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    files[value["path"]] = Stored(base64.b64decode(value["content"]), large=False)
                elif item["key"] == "lfsFile" and value["oid"] in hub.blobs:
                    files[value["path"]] = Stored(hub.blobs[value["oid"]], large=True)
                elif item["key"] != "header":
                    return 400, {"error": f"cannot do {item['key']} of {value}"}
            new = repo.commit(fields["rev"], files)
            return 200, {
                "success": True,
                "commitOid": new,
                "commitUrl": f"{hub.endpoint}/{fields['repo']}/commit/{new}",
            }

        def on_info(self, fields: Mapping[str, str], body: bytes) -> tuple[Any, ...]:
            repo, oid, missing = self.found(fields)
            if repo is None:
                return missing
            siblings = [{"rfilename": name, "size": len(stored.content)} for name, stored in repo.commits[oid].items()]
            return 200, {"id": fields["repo"], "sha": oid, "private": repo.private, "siblings": siblings, "tags": []}

        def on_tree(self, fields: Mapping[str, str], body: bytes) -> tuple[Any, ...]:
            repo, oid, missing = self.found(fields)
            if repo is None:
                return missing
            return 200, [self.listed(name, stored) for name, stored in sorted(repo.commits[oid].items())]

        def on_paths(self, fields: Mapping[str, str], body: bytes) -> tuple[Any, ...]:
            repo, oid, missing = self.found(fields)
            if repo is None:
                return missing
            asked = parse_qs(body.decode()).get("paths", [])
            return 200, [self.listed(name, stored) for name, stored in repo.commits[oid].items() if name in asked]

        def listed(self, name: str, stored: Stored) -> dict[str, Any]:
            size, sha256, blob = len(stored.content), stored.sha256, stored.blob
            if name in hub.lies:
                sha256, blob = sha256[::-1], blob[::-1]
            large = {"lfs": {"oid": sha256, "size": size, "pointerSize": 134}} if stored.large else {}
            return {"type": "file", "path": name, "size": size, "oid": blob, **large}

        def on_resolve(self, fields: Mapping[str, str], body: bytes) -> tuple[Any, ...]:
            repo, oid, missing = self.found(fields)
            if repo is None:
                return missing
            stored = repo.commits[oid].get(fields["file"])
            if stored is None:
                return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
            etag = stored.sha256 if stored.large else stored.blob
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if not asked:
                hub.whole.append(fields["file"]) if self.command == "GET" else None
                return 200, stored.content, headers
            size, begin = len(stored.content), int(asked[1])
            end = min(size, int(asked[2]) + 1) if asked[2] else size
            return 206, stored.content[begin:end], {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{size}"}

    return Handler
