"""The ``sapwood`` command: one module per command, found through the list ``COMMANDS``.

A command module holds a function named after the command, or a ``typer.Typer`` named ``app`` for
a group of commands; ``EPILOG``, if there is one, stands below the options. It imports torch and
the methods inside its functions, so that help is quick.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import typer

COMMANDS = ("tour", "prune", "minimize", "compare", "mask", "mnist-add", "bench", "info")


def build_app() -> typer.Typer:
    """Assembles the commands into one application."""
    app = typer.Typer(
        name="sapwood",
        help="Prune networks, pack what is left, and run it faster than dense.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,
    )
    for name in COMMANDS:
        python_name = name.replace("-", "_")
        module = importlib.import_module(f"sapwood.cli.{python_name}")
        group = getattr(module, "app", None)
        if isinstance(group, typer.Typer):
            app.add_typer(group, name=name)
        else:
            app.command(name, epilog=getattr(module, "EPILOG", None))(getattr(module, python_name))
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; ``arguments`` defaults to those of the process."""
    build_app()(None if arguments is None else list(arguments), prog_name="sapwood")
