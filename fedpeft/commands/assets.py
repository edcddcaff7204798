"""`fedpeft assets list`."""

from __future__ import annotations

import typer

from fedpeft.assets import ASSETS, GROUPS, resolve
from fedpeft.errors import AssetError
from fedpeft.report.tables import Table, render_plain


def run_list() -> None:
    """Prints each asset, what it holds and whether it is in the cache."""
    rows = tuple((name, asset.package, asset.holds, _where(name)) for name, asset in ASSETS.items())
    typer.echo(render_plain(Table(("asset", "package", "holds", "in the cache"), rows)))
    for group, members in GROUPS.items():
        typer.echo(f"{group}: {', '.join(members)}")


def _where(name: str) -> str:
    try:
        return str(resolve(name))
    except AssetError:
        return "no"
