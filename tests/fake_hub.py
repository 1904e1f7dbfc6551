"""A server on this machine that answers what the client of the Hugging Face Hub asks when it uploads small files."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WRITE, READ = "hf_write", "hf_read"  # the tokens that it accepts


class FakeHub:
    """The repositories of the server.

    Attributes:
        endpoint: the address of the server.
        files: the content of the files, by repository and path.
        private: whether a repository is private.
        asked: the requests so far.
        refuses_commits: whether commits are refused although the token may write.
        refuses_cards: whether the metadata of model cards are refused.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []
        self.refuses_commits = self.refuses_cards = False

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Return the status and the answer to a request."""
        path = path.partition("?")[0]
        self.asked.append(f"{method} {path}")
        if token not in (WRITE, READ):
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"name": "anna", "type": "user"}
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if path == "/api/validate-yaml":
            if self.refuses_cards:
                return 400, {"error": "Bad request", "errors": [{"message": "no such task"}], "warnings": []}
            return 200, {"errors": [], "warnings": []}
        if "/resolve/main/" in path:
            repository, _, file = path[1:].partition("/resolve/main/")
            found = self.files.get(repository, {}).get(file)
            return (404, {"error": "Entry not found"}) if found is None else (200, found)
        user, name, action = f"{path.removeprefix('/api/models/')}/info".split("/")[:3]
        if f"{user}/{name}" not in self.files:
            return 404, {"error": "Repository not found"}
        if action == "info":
            return 200, {"id": f"{user}/{name}"}
        files = self.files[f"{user}/{name}"]
        if action == "tree":
            return 200, [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()]
        if token != WRITE or user != "anna" or (action == "commit" and self.refuses_commits):
            return 403, {"error": "You have no write access."}
        if action == "preupload":
            asked = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        assert action == "commit", path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        return 200, {"commitUrl": f"{self.endpoint}/{user}/{name}/commit/1", "commitOid": "1" * 40}

    def _create(self, asked: dict[str, Any], token: str) -> tuple[int, Any]:
        repository = f"{asked['organization'] or 'anna'}/{asked['name']}"
        address = {"url": f"{self.endpoint}/{repository}"}
        if repository in self.files:
            return 409, {"error": "You already created this model repo", **address}
        if token != WRITE or not repository.startswith("anna/"):
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        self.files[repository], self.private[repository] = {}, asked["visibility"] == "private"
        return 200, address


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Run the server until exit."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, answer = hub.answer(self.command, self.path, token, body)
            sent = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            if isinstance(answer, bytes):
                self.send_header("ETag", f'"{hashlib.sha256(sent).hexdigest()}"')
                self.send_header("X-Repo-Commit", "1" * 40)
            elif "/resolve/" in self.path:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(sent)))
            if status >= 400:
                self.send_header("X-Error-Message", answer["error"])
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(sent)

        do_GET = do_POST = do_HEAD = _answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
