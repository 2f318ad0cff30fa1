"""What the documentation says can be done is done: its Python runs, its commands can be parsed, its links lead somewhere.

The Python blocks of a page are run in their order, in one namespace, in a folder that has what a reader would have: images
in my_images, and a run in runs/ijepa_cifar10_cpu. Training is cut to one step. What opens with `# not run:` is not run.
"""

import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from conftest import ROOT, write_images
from jsonargparse import capture_parser

from jepa_lightning.cli import main
from jepa_lightning.weights.__main__ import main as weights

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
NOT_RUN = "# not run:"
QUICK: dict[str, Any] = {
    "max_epochs": 1,
    "limit_train_batches": 1,
    "limit_val_batches": 1,
    "num_sanity_val_steps": 0,
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
SMALL_RUN = ["--data.root=my_images", "--data.batch_size=4", "--data.num_workers=0", "--trainer.accelerator=cpu"]
SMALL_RUN += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.enable_progress_bar=false"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Fenced blocks of a language: the number of the first line, and the text."""
    text = page.read_text()
    for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start(1)), match[1]


def commands() -> list[str]:
    """Every command of ours in the bash blocks, once."""
    lines = [
        line
        for page in PAGES
        for _, text in blocks(page, "bash")
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith(("python -m jepa_lightning ", "python -m jepa_lightning.weights "))
    ]
    return list(dict.fromkeys(lines))


PYTHON = [page for page in PAGES if any(not text.startswith(NOT_RUN) for _, text in blocks(page, "python"))]


class QuickTrainer(pl.Trainer):
    """Takes one step on few samples, and writes nothing."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**(settings | QUICK))

    def fit(self, model: pl.LightningModule, data: Any = None, *loaders: Any, **settings: Any) -> None:
        if isinstance(data, pl.LightningDataModule):
            data.batch_size = min(data.batch_size, 8)
        super().fit(model, data, *loaders, **settings)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has at hand: configurations, images of two classes, a run with a decoder, and the settings of others."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").symlink_to(ROOT / "configs")
    for hue, kind in enumerate(("ant", "bee")):
        write_images(folder / "my_images" / kind, 40, hue=hue)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(sys, "argv", ["jepa-lightning"])
        patch.chdir(folder)
        small = ["--model.encoder_depth=1", "--model.predictor_depth=1"]
        main(["fit", "--config", "configs/ijepa/cifar10_cpu.yaml", *SMALL_RUN, *small])
        run = folder / "runs" / "ijepa_cifar10_cpu"
        main(["fit", "--config", "configs/probes/completion.yaml", "--model.checkpoint", str(run), *SMALL_RUN[1:]])
        shutil.copytree(run, run.with_name("mine"))
    runs = {
        yaml.safe_load(path.read_text())["trainer"]["default_root_dir"]: path
        for path in ROOT.glob("configs/[ipw]*/*.yaml")
        if path.parent.name != "probes"
    }
    more = dict.fromkeys(
        ("runs/change", "runs/joined", "runs/iwm_frozen", "runs/iwm_both"), ROOT / "configs" / "iwm" / "cifar10_cpu.yaml"
    )
    more |= dict.fromkeys(("runs/first", "runs/hour"), ROOT / "configs" / "ijepa" / "cifar10_cpu.yaml")
    more |= dict.fromkeys(
        (
            "runs/half_hour",
            "runs/views",
            "runs/long_views",
            "runs/short_views",
            "runs/released",
            "runs/unlabeled",
            "runs/few",
        ),
        ROOT / "configs" / "ijepa" / "folder.yaml",
    )
    more["runs/my_recording"] = ROOT / "configs" / "worlds" / "tworoom.yaml"
    for place, config in (runs | more).items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        if not (folder / place / "config.yaml").exists():
            shutil.copy(config, folder / place / "config.yaml")
    return folder


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The prepared folder, to write into: what is in it is linked."""
    for path in prepared.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pl, "Trainer", QuickTrainer)
    return tmp_path


@pytest.mark.parametrize("page", PYTHON, ids=name)
def test_the_python_of_a_page_runs(page: Path, workplace: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "a_page"}
    for line, text in blocks(page, "python"):
        if not text.startswith(NOT_RUN):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a first run warns of much that does not matter here
                exec(compile("\n" * line + text, str(page), "exec"), namespace)


def test_few_blocks_are_not_run_and_say_why() -> None:
    left_out = [text.splitlines()[0] for page in PAGES for _, text in blocks(page, "python") if text.startswith(NOT_RUN)]
    assert len(left_out) == 2
    assert all(len(line) > len(NOT_RUN) + 10 for line in left_out)


@pytest.mark.parametrize("command", commands())
def test_a_command_can_be_parsed(
    command: str, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *arguments = shlex.split(command, comments=True)[2:]
    if program == "jepa_lightning.weights":
        capture_parser(weights).parse_args(arguments)
        return
    if arguments[0] == "collect":
        monkeypatch.setattr("jepa_lightning.collect_command.collect", lambda *given: None)
        main(arguments)
        return
    with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main([*arguments, *([] if "--model.help" in arguments else ["--print_config"])])
    assert ended.value.code in (0, None), capsys.readouterr().err


def test_a_misspelt_key_is_found(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The test above can fail."""
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "configs/ijepa/cifar10_cpu.yaml", "--model.patchsize", "4", "--print_config"])
    assert ended.value.code == 2
    assert "patch_size" in capsys.readouterr().err


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_links_and_configurations_are_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) if ":" not in link]
    missing = [link for link in links if not (page.parent / link).exists() and link != "configs.md"]
    missing += [path for path in re.findall(r"configs/[a-z0-9_/]+\.yaml", page.read_text()) if not (ROOT / path).exists()]
    assert not [path for path in missing if not path.endswith("configs.md")]  # made when the site is built


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_page_of_configurations_has_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(os.fspath(ROOT / "docs"))
    from generate_configs import fields, page

    made = page()
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"### {path.relative_to(ROOT / 'configs')}\n" in made
        assert {"", "Source", "Command"} <= fields(path.read_text()).keys(), path
