"""A Hugging Face Hub on this machine, as far as huggingface_hub needs one to read repositories."""

import contextlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Commits = dict[str, dict[str, bytes]]
"""Files by commit and name; the last commit is the main branch."""


def publish(root: Path, repository: str, commits: Commits) -> None:
    """Lay out a repository as it is asked for: what a revision is, what a commit has, and its files."""
    for revision, commit in [*((commit, commit) for commit in commits), ("main", list(commits)[-1])]:
        files = commits[commit]
        entries = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in files.items()]
        about = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        answers = {f"api/models/{repository}/revision/{revision}": json.dumps(about).encode()}
        answers[f"api/models/{repository}/tree/{revision}"] = json.dumps(entries).encode()
        for path, content in (
            answers | {f"{repository}/resolve/{commit}/{name}": files[name] for name in files}
        ).items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)


@contextlib.contextmanager
def serving(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve what was published in a folder on 127.0.0.1; gives the address and the paths that were asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            asked.append(self.path)

        def end_headers(self) -> None:
            _, *words = self.path.split("/")
            if "resolve" in words:
                self.send_header("X-Repo-Commit", words[3])
                self.send_header("ETag", '"{}"'.format("-".join(words[3:])))
            super().end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
