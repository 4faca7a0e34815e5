"""A Hugging Face Hub on this machine, as far as huggingface_hub needs one to read repositories."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def serving(repositories: dict[str, dict[str, dict[str, bytes]]]) -> Iterator[tuple[str, list[str]]]:
    """Serve files by repository, commit and name on 127.0.0.1; gives the address and the paths that were asked for.

    The last commit of a repository is its main branch.
    """
    asked: list[str] = []

    def tag(content: bytes) -> str:
        return hashlib.sha1(content).hexdigest()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            words = self.path.split("?")[0].strip("/").split("/")
            if words[:2] == ["api", "models"]:
                self._answer("/".join(words[2:4]), words[5] if len(words) > 5 else "main", tree="tree" in words)
            elif len(words) == 5 and words[2] == "resolve":
                self._answer("/".join(words[:2]), words[3], words[4])
            else:  # whatever else the library asks, such as who it runs for
                self._send(404)

        do_HEAD = do_GET  # noqa: N815

        def _answer(self, repository: str, revision: str, name: str | None = None, tree: bool = False) -> None:
            """A file, or without a name what there is in a commit, in one of two forms."""
            commits = repositories.get(repository, {})
            commit = list(commits)[-1] if commits and revision == "main" else revision
            files = commits.get(commit, {})
            if not commits:
                self._send(401, **{"X-Error-Code": "RepoNotFound"})
            elif commit not in commits:
                self._send(404, **{"X-Error-Code": "RevisionNotFound"})
            elif name is None:
                entries = [
                    {"type": "file", "path": file, "size": len(files[file]), "oid": tag(files[file])} for file in files
                ]
                content = {"id": repository, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
                self._send(
                    200, json.dumps(entries if tree else content).encode(), **{"Content-Type": "application/json"}
                )
            else:
                self._send(200, files[name], **{"X-Repo-Commit": commit, "ETag": f'"{tag(files[name])}"'})

        def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
