"""A small Hugging Face Hub on this machine: repositories of files, in the API that huggingface_hub speaks. A plugin of
conftest.py, for its fixture.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

TOKEN = "hf_" + "a" * 34
COMMIT = "0" * 40


class FakeHub:
    """files: by repository and path."""

    def __init__(self, url):
        self.url, self.files, self.requests = url, {}, []

    def put(self, repo, folder):
        """A repository with the files of a folder."""
        self.files[repo] = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *args):
        pass

    def answer(self, code=200, data=None, body=b"", **headers):
        body = json.dumps(data).encode() if data is not None else body
        self.send_response(code)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def is_known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.hub.requests.append(f"{self.command} {self.path}")
        resolved = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if not resolved:
            return self.answer(404, {"error": "not here"})
        repo, revision, name = resolved.groups()
        if repo not in self.hub.files:
            return self.answer(404, {"error": "no repository"}, X_Error_Code="RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.answer(404, {"error": "no revision"}, X_Error_Code="RevisionNotFound")
        if name not in self.hub.files[repo]:
            return self.answer(404, {"error": "no file"}, X_Error_Code="EntryNotFound")
        body = self.hub.files[repo][name]
        return self.answer(body=body, ETag=f'"{hashlib.sha1(body).hexdigest()}"')

    def do_POST(self):
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/validate-yaml":
            return self.answer(data={"errors": [], "warnings": []})
        if not self.is_known():
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            data = json.loads(body)
            repo = f"{data['organization']}/{data['name']}"
            if data["organization"] == "others":
                return self.answer(403, {"error": "forbidden"})
            self.hub.files.setdefault(repo, {})
            return self.answer(data={"url": f"{self.hub.url}/{repo}"})
        repo, what = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path).groups()
        if what == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            return self.answer(data={"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                self.hub.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.hub.url}/{repo}/commit/{COMMIT}"
        return self.answer(data={"commitUrl": url, "commitOid": COMMIT})


@contextmanager
def serving():
    """The Hub while the context lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Handler.hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that huggingface_hub is pointed at, with an empty cache and a login."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with serving() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found
