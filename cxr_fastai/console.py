"""How long work tells a person how far it is: a line, a warning, a bar with the time left.

On a terminal, rich draws; elsewhere there are plain lines without control characters. Library code takes a
`Console` and never prints itself; `QUIET` says nothing.
"""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console as RichConsole
from rich.markup import escape


class Console:
    """The human side of a command: standard output, or standard error where standard output is for machines."""

    def __init__(self, *, machine: bool = False, quiet: bool = False):
        self.rich = RichConsole(stderr=machine, quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print one line as it is."""
        self.rich.print(escape(text))

    def warn(self, title: str, text: str) -> None:
        """Print a warning that cannot be overlooked."""
        if self.rich.is_terminal:
            from rich.panel import Panel

            self.rich.print(Panel(escape(text), title=f"[bold]WARNING: {escape(title)}[/bold]", border_style="yellow"))
        else:
            self.say(f"WARNING: {title}. {text}")

    @contextlib.contextmanager
    def busy(self, label: str) -> Iterator[None]:
        """Show on a terminal that something of a few seconds is going on."""
        if self.rich.is_terminal:
            with self.rich.status(escape(label)):
                yield
        else:
            yield

    @contextlib.contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        """Show a bar with the time left while the body calls what it is given, `total` times in all."""
        if not self.rich.is_terminal:
            self.say(f"{label} ({total})")
            yield lambda: None
            return
        # Only here: a film that is classified for a program does not wait for what draws bars.
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.rich, transient=True) as bar:
            task = bar.add_task(escape(label), total=total)
            yield lambda: bar.advance(task)


QUIET = Console(quiet=True)
