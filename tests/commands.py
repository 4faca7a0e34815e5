"""Finds what README, the pages and the doors tell a person to type, and makes of it what can be typed."""

import ast
import itertools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
PROGRAMS = (
    "make", "python", "python3", "deepspeed", "tensorboard", "hf", "touch", "pip", "apt-get", "source", "scontrol",
    "sbatch", "grep", "git", "rm", "mv", "df", "kill", "nvidia-smi",
)  # fmt: skip
_PROGRAM = re.compile(rf"(?:{'|'.join(PROGRAMS)}|\S*\.venv\S*/bin/\S+|\.\./\S+/bin/\S+)(?= +\S)|\.ci/run$")
_MESSAGE = re.compile(r"make (?:it|room) ")
"""Begins like a command and is English: what docs/troubleshooting.md quotes."""
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)(`{1,2})([^`]+)\1(?!`)")
PLACES = {
    "R": "recipes/demo.yaml", "RUN": "runs/demo", "RUN_OR_HANDOFF": "runs/demo", "HANDOFF": "runs/demo/handoff",
    "RUNS": "runs", "DEST": "data/digits", "OUT.onnx": "out.onnx", "FILE.html": "page.html", "P": "debug",
    "ID": "apache-2.0", "FILE": "file", "N": "2", "SOURCE": "digits", "FOLDER": "folder",
}  # fmt: skip
"""What stands for a word in capitals where a command is tried."""


@dataclass(frozen=True)
class Command:
    """A command as a page has it, without its remark."""

    page: str
    text: str

    def forms(self) -> list[list[str]]:
        """Its words, without anything that stands in brackets, and with all of it: once per alternative."""
        bare = re.sub(r"\[[^]]*\]", " ", self.text)
        options = [part.split(" | ") for part in re.findall(r"\[([^]]*)\]", self.text)]
        full = re.sub(r"\[[^]]*\]", "\0", self.text).split("\0")
        forms = [bare]
        for chosen in itertools.zip_longest(*options):
            taken = [one if one is not None else choices[0] for one, choices in zip(chosen, options, strict=True)]
            forms.append("".join(a + b for a, b in itertools.zip_longest(full, taken, fillvalue="")))
        return [list(form) for form in dict.fromkeys(tuple(_words(form)) for form in forms)]


def _words(form: str) -> list[str]:
    words = [re.sub(r"^FOLDER/", "folder/", word).replace("runs/NAME", "runs/demo") for word in form.split()]
    filled = [PLACES.get(word, word) for word in words if word not in ("...", "begin|end")]
    return ["runs/again" if word == "runs/demo" and word in filled[:i] else word for i, word in enumerate(filled)]


def commands() -> list[Command]:
    """All of them, in the order of the pages; then those in the descriptions of doors, and in the heads of recipes."""
    found = [Command(page.name, text) for page in PAGES for text in _of_page(page.read_text())]
    for file in python_files():
        name = str(file.relative_to(ROOT))
        found += [Command(name, text) for text in _of_page(_said_by(file))]
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        head = "\n".join(re.findall(r"^#(.*)", recipe.read_text(), re.MULTILINE)).replace("\\\n", " ")
        found += [
            Command(f"recipes/{recipe.name}", " ".join(re.split(r" {2,}\(|;", text)[0].split()))
            for text in re.findall(r"\b(?:python -m|deepspeed) .*", head)
        ]
    return list(dict.fromkeys(found))


def python_files() -> list[Path]:
    """Of all but the tests."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split() if not name.startswith("tests/") and (ROOT / name).exists()]


def blocks(language: str) -> list[tuple[str, str]]:
    """Fenced blocks of a language: page and content."""
    return [
        (page.name, content)
        for page in PAGES
        for found, content in _FENCED.findall(page.read_text())
        if found == language
    ]


def _said_by(file: Path) -> str:
    """The description of a module, and what it prints as its own."""
    tree = ast.parse(file.read_text())
    texts = (
        str(ast.literal_eval(node.value))
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["DESCRIPTION"]
    )
    said = [ast.get_docstring(tree) or "", *texts]
    return re.sub(r"^ {2}(?=\S)", "    ", "\n\n".join(said), flags=re.MULTILINE)


def _of_page(text: str) -> list[str]:
    """Every line of a block of shell; elsewhere what begins with the name of a program."""
    found: list[tuple[int, str]] = []
    for match in _FENCED.finditer(text):
        if match[1] in ("bash", "sh", "console"):
            lines = match[2].replace("\\\n", " ").splitlines()
            found += [(match.start() + i, _bare(line.removeprefix("$ "))) for i, line in enumerate(lines)]
    text = _FENCED.sub(lambda match: "\n" * len(match[0]), text)
    lone = [(match.start(), match[1]) for match in re.finditer(r"^ {4}(\S.*)$", text, re.MULTILINE)]
    prose = re.sub(r"^ {4}.*$", lambda match: " " * len(match[0]), text, flags=re.MULTILINE)
    lone += [(match.start(), match[2]) for match in _INLINE.finditer(prose)]
    found += [(at, line) for at, line in ((at, _bare(line)) for at, line in lone) if _is_command(line)]
    return [line for _, line in sorted(found) if line]


def _bare(line: str) -> str:
    return " ".join(re.sub(r"(^|\s)#.*| {3,}.*", "", line).split())


def _is_command(line: str) -> bool:
    return _PROGRAM.match(line) is not None and _MESSAGE.match(line) is None
