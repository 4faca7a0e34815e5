"""A Hugging Face Hub on this machine, as far as huggingface_hub needs one to read repositories."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WEIGHTS = "model.safetensors"  # lies in large-file storage, to which the Hub redirects


@dataclass
class Hub:
    """Repositories by name; each has commits by id, of which the last one is the main branch."""

    repositories: dict[str, dict[str, dict[str, bytes]]]
    url: str = ""
    requests: list[str] = field(default_factory=list)

    def commit(self, repository: str, revision: str) -> str | None:
        """The commit that a revision means."""
        commits = self.repositories[repository]
        return list(commits)[-1] if revision == "main" else revision if revision in commits else None


@contextlib.contextmanager
def serving(repositories: dict[str, dict[str, dict[str, bytes]]]) -> Iterator[Hub]:
    """Serve repositories on 127.0.0.1."""
    hub = Hub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            words = self.path.split("?")[0].strip("/").split("/")
            if words[:2] == ["api", "models"]:
                self._api("/".join(words[2:4]), *words[4:6])
            elif words[0] == "large":
                self._send(200, {}, hub.repositories["/".join(words[1:3])][words[3]][words[4]])
            elif len(words) == 5 and words[2] == "resolve":
                self._file("/".join(words[:2]), words[3], words[4])
            else:  # whatever else the library asks, such as who it runs for
                self._send(404, {}, b"")

        do_HEAD = do_GET  # noqa: N815

        def _api(self, repository: str, what: str = "", revision: str = "main") -> None:
            commit = self._commit(repository, revision)
            if commit is None:
                return
            files = hub.repositories[repository][commit]
            if what == "tree":
                content: object = [self._entry(name, data) for name, data in files.items()]
            else:
                content = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

        def _file(self, repository: str, revision: str, name: str) -> None:
            commit = self._commit(repository, revision)
            if commit is None:
                return
            data = hub.repositories[repository][commit].get(name)
            if data is None:
                self._send(404, {"X-Error-Code": "EntryNotFound"}, b"")
            elif name == WEIGHTS:
                large = hub.url.replace("127.0.0.1", "localhost")  # another host, as of the Hub
                tag = hashlib.sha256(data).hexdigest()
                self._send(302, {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(data)),
                                 "Location": f"{large}/large/{repository}/{commit}/{name}"}, b"")  # fmt: skip
            else:
                self._send(200, {"X-Repo-Commit": commit, "ETag": f'"{_blob_id(data)}"'}, data)

        def _commit(self, repository: str, revision: str) -> str | None:
            if repository not in hub.repositories:
                self._send(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"}, b"")
                return None
            commit = hub.commit(repository, revision)
            if commit is None:
                self._send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such revision"}, b"")
            return commit

        @staticmethod
        def _entry(name: str, data: bytes) -> dict[str, object]:
            entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": _blob_id(data)}
            if name == WEIGHTS:
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
            return entry

        def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _blob_id(data: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
