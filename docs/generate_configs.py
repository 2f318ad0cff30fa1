"""The page configs.md, made of the comments at the head of each YAML whenever the site is built (a hook of mkdocs).

`python docs/generate_configs.py` prints it.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

FAMILIES = {
    "ijepa": "I-JEPA: train",
    "iwm": "IWM: train",
    "pendulum": "World model of the double pendulum: train",
    "worlds": "World models of other environments: record, train",
    "probes": "Evaluate a run",
    "overlays": "Overlays",
}
"""Folder of configs/ -> heading; a folder that is not listed comes last, under its own name."""

INTRODUCTION = """# Configurations

One YAML for each thing that a person would run. This page is made of their first lines.
`--config A --config B` reads B over A; any key can be set from the command line as well. A probe takes its data from the
run that it reads, `--model.checkpoint runs/NAME`.
"""

FIELD = re.compile(r"^([A-Z][A-Za-z ]+?)( \([^)]*\))?: ")
"""How a field of a header begins: a name, perhaps a remark in parentheses, and a colon."""

COMMAND = re.compile(r"(`[^`]+`|python -m [^,()]*[^,()\s]|make [a-z]+\b(?=[ :]*(?:\(|--|$)))")
"""What is shown as code."""

FIELDS = ("Source", "Command", "Hardware and time", "Expected")


def fields(text: str) -> dict[str, str]:
    """The header of a YAML by field: what it is ("", the lines before the first field), Source, Command and so on.

    A remark in parentheses, as in "Expected (measured)", belongs to the field's name.
    """
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        line = line.removeprefix("#").strip()
        match = FIELD.match(line)
        if match and match[1] in FIELDS:
            name, line = line[: match.end() - 2], line[match.end() :]
        found[name] = f"{found.get(name, '')} {line.strip()}".strip()
    return found


def entry(path: Path) -> str:
    """The section of one YAML."""
    found = fields(path.read_text())
    lines = [f"### {path.relative_to(ROOT / 'configs')}", found.pop("", "")]
    lines += ["\n".join(f"* **{name}:** {escaped(value)}" for name, value in found.items())]
    return "\n\n".join(lines)


def escaped(text: str) -> str:
    """Commands as code, and what Markdown would take for something else as it is."""
    parts = COMMAND.split(text)  # odd ones are commands
    return "".join(
        f"`{part.strip('` ')}`" if number % 2 else re.sub(r"([*<_|\[\]])", r"\\\1", part)
        for number, part in enumerate(parts)
    )


def page() -> str:
    """The page, in Markdown."""
    folders = {path.name: path for path in sorted((ROOT / "configs").iterdir()) if path.is_dir()}
    parts = [INTRODUCTION]
    for name in sorted(folders, key=lambda name: ([*FAMILIES, name].index(name), name)):
        parts += [f"## {FAMILIES.get(name, name)}", *(entry(path) for path in sorted(folders[name].glob("*.yaml")))]
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs when it has collected the pages: one more of them."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "configs.md", content=page()))
    return files


if __name__ == "__main__":
    print(page())
