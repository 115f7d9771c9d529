"""How every group of commands is set up: help with examples, no completion scripts, no decorated tracebacks."""

from __future__ import annotations

import typer


def group(summary: str, *examples: str) -> typer.Typer:
    """An application for subcommands, whose help shows `examples` line by line."""
    shown = "\n".join(["\b", "Examples:", *(f"  {example}" for example in examples)])
    return typer.Typer(
        help=f"{summary}\n\n{shown}",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def single() -> typer.Typer:
    """An application of one command."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
