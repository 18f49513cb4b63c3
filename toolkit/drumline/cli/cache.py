"""`drumline cache [ls | rm KEY…]`: prepared data and traces on this machine."""

from typing import Annotated

import typer

from drumline.data.cache import cache_root
from drumline.data.cache_entries import Entry, entries, remove
from drumline.errors import DataError
from drumline.units import format_bytes

group = typer.Typer(help="Prepared data and traces on this machine.", rich_markup_mode=None)


@group.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    """Prepared data and traces on this machine; without a subcommand, `ls`."""
    if context.invoked_subcommand is None:
        list_entries()


@group.command("ls")
def list_entries() -> None:
    """Keys, sizes, days since the last use, and what each holds; the largest first.

    Example: drumline cache ls
    """
    found = entries()
    for entry in found:
        age = f"{entry.age_days:.0f} days"
        print(f"{entry.key:<32} {format_bytes(entry.size):>10} {age:>9}  {entry.words}")
    total = format_bytes(sum(entry.size for entry in found))
    print(f"{len(found)} entries, {total}, in {cache_root()}")


@group.command("rm")
def remove_entries(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="KEY…", help="Keys, or how they begin.")
    ] = None,
    older_than: Annotated[
        float | None,
        typer.Option("--older-than", min=0, help="All that was not used for so many days."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of it.")] = False,
) -> None:
    """Remove entries; runs that need them prepare them again.

    Example: drumline cache rm --older-than 30
    """
    found = entries()
    chosen = {entry.key: entry for key in keys or () for entry in _meant(key, found)}
    if everything:
        chosen |= {entry.key: entry for entry in found}
    if older_than is not None:
        chosen |= {entry.key: entry for entry in found if entry.age_days >= older_than}
    if not (keys or everything or older_than is not None):
        raise DataError(
            "cache rm: nothing is named. Nearest: a KEY of `drumline cache`, --older-than 30, or --all"
        )
    for entry in chosen.values():
        remove(entry)
    total = format_bytes(sum(entry.size for entry in chosen.values()))
    print(f"removed {len(chosen)} entries, {total}")


def _meant(key: str, found: list[Entry]) -> list[Entry]:
    """The entry with this key, or the one whose key begins so."""
    meant = [entry for entry in found if entry.key == key or (key and entry.key.startswith(key))]
    if len(meant) != 1:
        what = "names no entry" if not meant else f"is the beginning of {len(meant)} keys"
        raise DataError(f"cache rm: {key!r} {what}. Nearest: a KEY of `drumline cache`")
    return meant


def register(app: typer.Typer) -> None:
    """Add this group."""
    app.add_typer(group, name="cache")
