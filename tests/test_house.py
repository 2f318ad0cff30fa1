"""The house keeps its rules: the field's words, short files, few configurations."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PRIVATE = {
    r"pictures?\b": "image",
    r"(?<!memory )(?<!memory_)\bbanks?\b": "memory bank",
    r"\bunlucky\b": "resampled",
    r"\bwhole numbers?\b": "integer",
    r"\bl(ie|ies|ay|ying) on each other\b": "overlap",
    r"\bparts? of\b": "fraction",
    r"(?<!at )\bleast\b": "minimum, lowest",
    r"\bgreatest\b": "maximum, largest",
    r"(?<!standard )(?<!standard_)\bdeviations?\b": "standard deviation",
    r"\bbeside\b": "compared with, next to",
    r"\bjudge[sd]?\b|\bjudging\b": "evaluated",
    r"\bcontrols\b": "baselines",
    r"\btold\b|\btelling\b": "action-conditioned, given",
    r"\bdriven\b": "actuated",
    r"\bimagin(e|es|ed|ing)\b": "rolled out, predicted",
    r"\bpaint(s|ed|ing)?\b": "decoded, drawn",
    r"\buntrained (encoder|network)s?\b": "random-initialization baseline",
    r"\btrue dynamics\b": "oracle",
    r"\bsliders?\b": "action sweep",
    r"\bspoil(s|t|ed)?\b": "degraded",
    r"\breadouts?\b": "ridge or MLP probe",
    r"\b(phase two|second phase)\b": "evaluation",
    r"\bmade by code\b": "synthetic",
    r"\bscript that is not kept\b": "",
    r"\w*(isation|isations|olour|eighbour|entred?\b(?<=centred)|entring)\w*": "American spelling",
}
"""What this project once said -> what the field says."""

KEPT = re.compile(r"\"judged\"|\.paint\b")
"""What may stay: a key of reports, and a name in checkpoints."""


def texts() -> list[Path]:
    """Code and docs that are kept in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    kinds = (".py", ".md", ".yaml", ".toml", ".cff")
    files = [ROOT / line for line in listed.stdout.splitlines() if line.endswith(kinds)]
    return [
        file for file in files if file.is_file() and file not in (Path(__file__), ROOT / "tests" / "equivalent_mutants.toml")
    ]


@pytest.mark.parametrize("file", texts(), ids=lambda file: str(file.relative_to(ROOT)))
def test_the_field_s_words_are_used(file: Path) -> None:
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        for pattern, better in PRIVATE.items():
            line = KEPT.sub("", line)
            found += [f"{number}: {match.group()!r}: {better}" for match in re.finditer(pattern, line, re.IGNORECASE)]
    assert not found, "\n" + "\n".join(found)
