"""A Hub on this machine, for tests that push and pull over real HTTP: repositories in memory, the real protocol.

    with LoopbackHub() as hub:
        environment = os.environ | hub.environment(token=WRITE_TOKEN, cache=folder)   # of a process that uses it

Knows what huggingface_hub asks for when models are pushed and pulled: accounts, creation, commits with large files,
listings, downloads by branch or commit, private repositories, stale parents, branches, front matter of cards, large
files that it has already. Not: pull requests, datasets, Xet.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


WRITE_TOKEN = "hf_writer"
LICENSES = ("apache-2.0", "mit", "other")  # some of those that the Hub knows
LARGE = (".safetensors", ".png", ".bin")  # kept apart from the small files, behind a redirect, as on the Hub

API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<verb>\w[\w-]*)(?:/(?P<revision>[^/]+))?)?(?:/(?P<folder>.*))?"
)
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Repository:
    """Commits of all branches, oldest first: each a sha and all files of its tree; and the last one of each branch."""

    is_private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits.append((sha, files))
        self.branches[branch] = sha
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.branches.get("main" if revision == "HEAD" else revision, revision)
        return next((commit for commit in self.commits if commit[0] == sha), None)


class LoopbackHub:
    """Serves until the `with` block ends. `repositories` may be read and tampered with by tests."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}  # large files by their sha256
        self.uploads_left: int | None = None  # large files that still get through, if not all
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        # The client drops its headers at a redirect to the same host, so large files lie under another name.
        self.storage = f"http://localhost:{self.server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache, token: str | None = None) -> dict[str, str]:
        """What a process needs in its environment to use this hub, with a cache of its own."""
        names = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return names | {"HF_TOKEN": token or "", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None):
        super().__init__(message)
        self.status, self.code, self.commit = status, code, commit


class _Handler(BaseHTTPRequestHandler):
    state: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve(self._get)

    do_HEAD = do_GET

    def do_POST(self):
        self._serve(self._post)

    def do_PUT(self):
        self._serve(self._put)

    def _serve(self, answer):
        self.path = unquote(urlsplit(self.path).path)
        self.state.requests.append(f"{self.command} {self.path}")
        self.body = self._read_body()
        try:
            answer()
        except _Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)}
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
            headers |= {"X-Repo-Commit": refusal.commit} if refusal.commit else {}
            self._send(refusal.status, json.dumps({"error": str(refusal)}).encode(), headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any):
        self._send(200, json.dumps(value).encode())

    @property
    def _is_writer(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {WRITE_TOKEN}"

    def _need_writer(self):
        if not self._is_writer:
            raise _Refusal(401, "Invalid username or password.")

    def _repository(self, name: str) -> Repository:
        repository = self.state.repositories.get(name)
        if repository is None or (repository.is_private and not self._is_writer):
            raise _Refusal(401 if not self._is_writer else 404, "Repository not found", "RepoNotFound")
        return repository

    def _tree(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        found = repository.at(revision)
        if found is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def _get(self):
        if self.path == "/api/whoami-v2":
            self._need_writer()
            self._json(
                {"type": "user", "name": "org", "fullname": "org", "orgs": [], "auth": {"type": "access_token"}}
            )
        elif match := API.fullmatch(self.path):
            self._model(self._repository(match["repo"]), match)
        elif match := RESOLVE.fullmatch(self.path):
            self._resolve(self._repository(match["repo"]), match["revision"], match["path"])
        elif self.path.startswith("/storage/") and self.path[9:] in self.state.uploads:
            self._send(200, self.state.uploads[self.path[9:]], {"Content-Type": "application/octet-stream"})
        else:
            raise _Refusal(404, f"This hub has no {self.path}", "EntryNotFound")

    def _model(self, repository: Repository, match: re.Match):
        verb = match["verb"] or "revision"
        sha, files = self._tree(repository, match["revision"] or "main")
        if verb == "revision":
            siblings = [{"rfilename": path} for path in sorted(files)]
            common = {"private": repository.is_private, "tags": [], "downloads": 0, "likes": 0}
            self._json({"id": match["repo"], "modelId": match["repo"], "sha": sha, "siblings": siblings} | common)
        elif verb == "tree":
            inside = f"{match['folder']}/" if match["folder"] else ""
            found = [_entry(path, content) for path, content in sorted(files.items()) if path.startswith(inside)]
            if not found:
                raise _Refusal(404, f"{match['folder']} does not exist", "EntryNotFound", commit=sha)
            self._json(found)
        elif verb == "refs":
            heads = repository.branches.items()
            branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": head} for name, head in heads]
            self._json({"branches": branches, "tags": [], "converts": []})
        else:
            raise _Refusal(404, f"This hub has no {self.path}")

    def _resolve(self, repository: Repository, revision: str, path: str):
        sha, files = self._tree(repository, revision)
        if path not in files:
            raise _Refusal(404, "Entry not found", "EntryNotFound", commit=sha)
        content = files[path]
        digest = hashlib.sha256(content).hexdigest()
        if path.endswith(LARGE):
            self.state.uploads[digest] = content
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            location = {"Location": f"{self.state.storage}/storage/{digest}"}
            self._send(302, b"", {"X-Repo-Commit": sha} | linked | location)
        else:
            headers = {"X-Repo-Commit": sha, "ETag": f'"{digest}"', "Content-Length": str(len(content))}
            self._send(200, content, headers)

    def _post(self):
        if self.path == "/api/repos/create":
            self._create(json.loads(self.body))
        elif self.path == "/api/validate-yaml":
            errors = [{"message": fault} for fault in faults_of_card(json.loads(self.body)["content"])]
            self._send(400 if errors else 200, json.dumps({"errors": errors, "warnings": []}).encode())
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            self._need_writer()
            wanted = json.loads(self.body)["objects"]
            objects = []
            for one in wanted:  # what is there already, needs no upload
                upload = {"upload": {"href": f"{self.state.storage}/storage/{one['oid']}"}}
                objects.append(one | ({} if one["oid"] in self.state.uploads else {"actions": upload}))
            self._json({"transfer": "basic", "objects": objects})
        elif match := API.fullmatch(self.path):
            repository = self._repository(match["repo"])
            if match["verb"] == "preupload":
                self._need_writer()
                self._json({"files": [_upload_mode(one) for one in json.loads(self.body)["files"]]})
            elif match["verb"] == "paths-info":
                _, files = self._tree(repository, match["revision"])
                wanted = json.loads(self.body)["paths"]
                self._json([_entry(path, files[path]) for path in wanted if path in files])
            elif match["verb"] == "commit":
                self._need_writer()
                lines = [json.loads(line) for line in self.body.splitlines()]
                self._commit(match["repo"], repository, match["revision"], lines)
            elif match["verb"] == "branch":
                self._need_writer()
                if match["revision"] in repository.branches:
                    raise _Refusal(409, "Reference already exists")
                repository.branches[match["revision"]] = repository.branches["main"]
                self._json({})
            else:
                raise _Refusal(404, f"This hub has no {self.path}")
        else:
            raise _Refusal(404, f"This hub has no {self.path}")

    def _create(self, wanted: dict):
        self._need_writer()
        name = f"{wanted.get('organization') or 'org'}/{wanted['name']}"
        url = {"url": f"{self.state.endpoint}/{name}", "name": name}
        if name in self.state.repositories:
            self._send(409, json.dumps({"error": "You already created this model repo"} | url).encode())
            return
        is_private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.state.repositories[name] = Repository(is_private)
        self.state.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json(url)

    def _commit(self, name: str, repository: Repository, branch: str, lines: list[dict]):
        head, files = self._tree(repository, branch)
        files = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit") not in (None, head):
                    raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.state.uploads:
                    raise _Refusal(400, f"{value['path']} was announced, but never uploaded.")
                files[value["path"]] = self.state.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif line["key"] == "deletedFolder":
                files = {path: one for path, one in files.items() if not path.startswith(value["path"])}
        sha = repository.commit(files, branch)
        url = f"{self.state.endpoint}/{name}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _put(self):
        digest = self.path.removeprefix("/storage/")
        if self.state.uploads_left is not None:
            self.state.uploads_left -= 1
            if self.state.uploads_left < 0:
                raise _Refusal(403, "The line is cut.")
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise _Refusal(400, "The upload is not what was announced.")
        self.state.uploads[digest] = self.body
        self._send(200)


def faults_of_card(text: str) -> list[str]:
    """What the Hub refuses in a card's front matter: what is of the wrong shape, or names no task."""
    parts = text.split("---\n", 2)
    data = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    if not isinstance(data, dict):
        return ["empty or missing yaml metadata"]
    strings = [name for name in ("license", "pipeline_tag") if name in data]
    faults = [f'"{name}" must be a string' for name in strings if type(data[name]) is not str]
    if data.get("license", "other") not in LICENSES:
        faults.append(f'"license" must be one of {LICENSES}')
    faults += [f'"{name}" must be an array' for name in ("tags", "widget") if not isinstance(data.get(name, []), list)]
    for model in data.get("model-index", []):
        for result in model["results"]:
            whole = result.get("task", {}).get("type") and result.get("dataset", {}).get("type")
            if not whole or not all({"type", "value"} <= set(metric) for metric in result["metrics"]):
                faults.append('"model-index" needs task.type, dataset.type and metrics with type and value')
    return faults


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if path.endswith(LARGE):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return entry


def _upload_mode(file: dict) -> dict:
    mode = "lfs" if file["path"].endswith(LARGE) else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
