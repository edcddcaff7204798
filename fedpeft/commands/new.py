"""`fedpeft new`: a project folder to start from."""

from __future__ import annotations

import re
import string
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import typer

from fedpeft.errors import RunFolderError, sentence
from fedpeft.runs import write_folder

_RENAMED = {"gitignore": ".gitignore"}


def run_new(folder: Path) -> None:
    """`folder` is a project: settings, a client app, a server app.

    Raises:
        RunFolderError: the name cannot be a Flower app's, or something is there already.
    """
    name = folder.absolute().name
    if not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,30}[A-Za-z0-9])?", name):
        raise RunFolderError(
            sentence(
                str(folder),
                expected="a name of at most 32 letters, digits and inner hyphens (Flower's rule for an app)",
                found=repr(name),
                remedy="choose another name",
            )
        )
    if folder.exists():
        raise RunFolderError(sentence(str(folder), expected="no such folder yet", found="one", remedy="choose another"))
    template = files("fedpeft") / "templates" / "project"
    write_folder(folder.absolute(), lambda scratch: _copy(template, scratch, {"name": name}))
    typer.echo(f"made {folder}; next: cd {folder} && fedpeft simulate simulations/first.toml")


def _copy(source: Traversable, target: Path, values: dict[str, str]) -> None:
    target.mkdir(exist_ok=True)
    for item in source.iterdir():
        if item.is_dir():
            _copy(item, target / item.name, values)
        else:
            plain = item.name.removesuffix(".tmpl")
            text = string.Template(item.read_text(encoding="utf-8")).substitute(values)
            (target / _RENAMED.get(plain, plain)).write_text(text, encoding="utf-8")
