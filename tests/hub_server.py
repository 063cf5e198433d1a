"""A Hugging Face Hub in one process: repositories in memory behind the HTTP calls of huggingface_hub.

    with HubServer() as hub:
        environment = hub.get_environment(home)  # for a subprocess: huggingface_hub reads it when it is imported
        ...
        hub.read_files("tester/model")

Plays: create a repository, preupload, commit (regular and LFS files), information, tree, and download by branch or
commit. Writing needs the token, and so does reading a private repository.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


USER = "tester"
TOKEN = "hf_tokenOfTheTests"
# The real Hub decides by content; these are the kinds that matter here.
LFS_SUFFIXES = (".safetensors", ".parquet", ".pt", ".arrow", ".png", ".jpg")


@dataclass
class Repository:
    """Files of every commit by path, oldest commit first; the last one is the branch "main"."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def resolve(self, revision: str) -> str | None:
        """Return the commit of a branch or commit name, or None."""
        if revision == "main":
            return list(self.commits)[-1]
        return revision if revision in self.commits else None


def describe_file(path: str, content: bytes) -> dict:
    """Describe a file as the tree of the Hub does, under git's name for its content."""
    blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    described = {"type": "file", "path": path, "size": len(content), "oid": blob_id}
    if path.endswith(LFS_SUFFIXES):
        described["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return described


class HubHandler(BaseHTTPRequestHandler):
    """Answer one request; `self.server.hub` holds the state."""

    protocol_version = "HTTP/1.1"
    # (method, pattern of the path, name of the method here)
    routes = (
        ("POST", r"/api/repos/create", "answer_create"),
        ("POST", r"/api/validate-yaml", "answer_validate_yaml"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "answer_lfs_upload"),
        ("POST", r"/(?:datasets/)?[^/]+/[^/]+\.git/info/lfs/objects/batch", "answer_lfs_batch"),
        ("POST", r"/api/{repo}/preupload/(?P<revision>[^/]+)", "answer_preupload"),
        ("POST", r"/api/{repo}/commit/(?P<revision>[^/]+)", "answer_commit"),
        ("GET", r"/api/{repo}(?:/revision/(?P<revision>[^/]+))?", "answer_information"),
        ("GET", r"/api/{repo}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "answer_tree"),
        ("GET|HEAD", r"/{repo}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "answer_file"),
    )

    def log_message(self, *arguments):
        """Keep the output of the tests clean."""

    def answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.server.hub.requests.append((self.command, path))
        for methods, pattern, name in self.routes:
            pattern = pattern.replace("{repo}", r"(?P<id>(?:(?:models|datasets)/)?[^/]+/[^/]+)")
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                return self.answer_match(name, match.groupdict())
        return self.send_json({"error": f"{self.command} {path} is not played"}, 501)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def answer_match(self, name: str, found: dict):
        """Look up the repository a path names, check the token, and call the method that answers."""
        is_authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if "id" in found:
            if found["id"].count("/") == 1:
                found["id"] = f"models/{found['id']}"
            repository = self.server.hub.repositories.get(found["id"])
            if repository is None or (repository.private and not is_authorized):
                return self.send_json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            sha = repository.resolve(found.pop("revision", None) or "main")
            if sha is None:
                return self.send_json({"error": "Invalid rev"}, 404, {"X-Error-Code": "RevisionNotFound"})
            found |= {"repository": repository, "sha": sha}
        if not is_authorized and (self.command == "POST" and name != "answer_validate_yaml"):
            return self.send_json({"error": "Invalid username or password."}, 401)
        return getattr(self, name)(**found)

    def send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value, status: int = 200, headers: dict[str, str] | None = None):
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def answer_create(self):
        asked = json.loads(self.body)
        kind, repo_id = asked.get("type") or "model", f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.server.hub.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        key, repositories = f"{kind}s/{repo_id}", self.server.hub.repositories
        if key in repositories:
            return self.send_json({"error": "You already created this repo", "url": url}, 409)
        repositories[key] = Repository(private=asked.get("visibility") == "private")
        repositories[key].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.send_json({"url": url, "name": repo_id, "id": repo_id})

    def answer_validate_yaml(self):
        self.send_json({"errors": [], "warnings": []})

    def answer_lfs_batch(self):
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.hub.endpoint}/lfs/{one['oid']}"}}}
            for one in json.loads(self.body)["objects"]
        ]
        self.send_json({"transfer": "basic", "objects": objects})

    def answer_lfs_upload(self, oid: str):
        self.server.hub.lfs_objects[oid] = self.body
        self.send(b"")

    def answer_preupload(self, repository: Repository, sha: str, id: str):
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths}
        files = [{"path": p, "uploadMode": modes[p], "shouldIgnore": False, "oid": None} for p in paths]
        self.send_json({"files": files})

    def answer_commit(self, repository: Repository, sha: str, id: str):
        files = dict(repository.commits[sha])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.hub.lfs_objects[value["oid"]]
        commit = repository.commit(files)
        url = f"{self.server.hub.endpoint}/{id.removeprefix('models/')}/commit/{commit}"
        self.send_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def answer_information(self, repository: Repository, sha: str, id: str):
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        name = id.partition("/")[2]
        self.send_json({"id": name, "sha": sha, "private": repository.private, "tags": [], "siblings": siblings})

    def answer_tree(self, repository: Repository, sha: str, id: str, path: str | None):
        folder = f"{path}/" if path else ""
        files = repository.commits[sha]
        inside = [name for name in files if name.startswith(folder)]
        if "recursive=true" not in self.path.lower():
            inside = [name for name in inside if "/" not in name.removeprefix(folder)]
        self.send_json([describe_file(name, files[name]) for name in inside])

    def answer_file(self, repository: Repository, sha: str, id: str, path: str):
        files = repository.commits[sha]
        if path not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
            return self.send_json({"error": "Entry not found"}, 404, headers)
        content, described = files[path], describe_file(path, files[path])
        etag = described.get("lfs", described)["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if "lfs" in described:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.send(content, 200, headers)
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return self.send(content[start : end + 1], 206, headers)


class HubServer:
    """The Hub, served from a thread between `__enter__` and `__exit__`."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        """Go out of reach; what is stored stays to be looked at."""
        self.server.shutdown()
        self.server.server_close()

    def commits_of(self, repo_id: str) -> list[dict[str, bytes]]:
        """List the files of every commit of a model repository, oldest first."""
        return list(self.repositories[f"models/{repo_id}"].commits.values())

    def read_files(self, repo_id: str) -> dict[str, bytes]:
        """Return the files at the head of a model repository."""
        return self.commits_of(repo_id)[-1]

    def get_environment(self, home: str | os.PathLike) -> dict[str, str]:
        """Return the environment of a subprocess for which this is the Hub, with its cache in `home`."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
        return {
            **plain,
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
