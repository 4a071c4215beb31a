"""Check the shape of the repository: its files, its imports, the README's examples."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml  # type: ignore[import-untyped]  # no stubs for one call

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "supervisors.py"
TOP_LEVEL = {
    "LICENSE",
    "README.md",
    "supervisors.example.toml",
    "supervisors.py",
    "test_supervisors.py",
}
ONLY_IN_SOME = {"_sha2", "_sha256"}  # of the standard library since, and until, 3.12
OLDEST_PARSER = (3, 8)  # must be able to read the file to be told that it is too old


def main() -> int:
    """Print every finding; return 1 if there is one, else 0."""
    findings = [*wrong_files(), *wrong_syntax(), *wrong_imports(), *wrong_examples()]
    for finding in findings:
        print(finding)
    return 1 if findings else 0


def wrong_files() -> Iterator[str]:
    """Yield what stands at the top level and shouldn't, and what is missing there."""
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    found = {name.partition("/")[0] for name in listing.stdout.splitlines()}
    for name in sorted(found - TOP_LEVEL):
        if not name.startswith("."):
            yield f"{name}: does not belong at the top level"
    for name in sorted(TOP_LEVEL - found):
        yield f"{name}: not in the repository"


def wrong_syntax() -> Iterator[str]:
    """Yield the first thing that an old Python can't parse."""
    try:
        ast.parse(SCRIPT.read_text(), feature_version=OLDEST_PARSER)
    except SyntaxError as error:
        version = ".".join(map(str, OLDEST_PARSER))
        yield f"supervisors.py:{error.lineno}: {error.msg} (parsed as {version})"


def wrong_imports() -> Iterator[str]:
    """Yield every import of what the standard library doesn't have."""
    allowed = sys.stdlib_module_names | ONLY_IN_SOME
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        for name in names:
            if name.partition(".")[0] not in allowed:
                where = getattr(node, "lineno", 0)
                yield f"supervisors.py:{where}: {name} is not in the standard library"


def wrong_examples() -> Iterator[str]:
    """Yield what is wrong in the README's TOML, YAML and JSON, and in the example."""
    for path in [ROOT / "supervisors.example.toml"]:
        yield from wrong_config(path.read_text(), path.name)
    for line, language, text in fences((ROOT / "README.md").read_text()):
        where = f"README.md:{line}"
        if language == "toml":
            yield from wrong_config(text, where)
        elif language == "yaml":
            yield from wrong_yaml(text, where)
        elif language == "json":
            yield from wrong_json(text, where)


def fences(markdown: str) -> Iterator[tuple[int, str, str]]:
    """Yield line number, language and text of every fenced block."""
    for match in re.finditer(r"(?ms)^```(\w+)\n(.*?)^```$", markdown):
        yield markdown.count("\n", 0, match.start()) + 1, match[1], match[2]


def wrong_config(text: str, where: str) -> Iterator[str]:
    """Yield what `supervisors.py check` finds in a configuration."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "supervisors.toml")
        path.write_text(text)
        check = subprocess.run(
            [sys.executable, str(SCRIPT), "check", str(path)],
            capture_output=True,
            text=True,
        )
    if check.returncode != 0:
        yield f"{where}: {check.stderr.strip()}"


def wrong_yaml(text: str, where: str) -> Iterator[str]:
    try:
        list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        yield f"{where}: {error}"


def wrong_json(text: str, where: str) -> Iterator[str]:
    try:
        json.loads(text)
    except ValueError as error:
        yield f"{where}: {error}"


if __name__ == "__main__":
    sys.exit(main())
