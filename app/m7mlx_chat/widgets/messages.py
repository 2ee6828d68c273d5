"""Messages as they are shown: questions to the letter, answers as Markdown that grows."""

from __future__ import annotations

from collections.abc import Sequence

from textual import events
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widgets import Markdown, Static

from m7mlx.terminal import visible
from m7mlx.units import counted
from m7mlx_chat.actions import bindings
from m7mlx_chat.focus import give_focus
from m7mlx_chat.markdown import Part, answer_markdown, parts
from m7mlx_chat.steps import Step
from m7mlx_chat.store.rows import Message
from m7mlx_chat.widgets.calls import StepsView
from m7mlx_chat.widgets.message_parts import SHOWN, Thoughts, Versions, When

_LINE = 80  # characters: about a line, where a text has no line ends
_BAR = 2  # columns at the left of a message that select it: the bar, and the space beside it
_ROOMY = 56  # columns of a message from which there is room for its time
_NOTES = {
    "stopped": "stopped",
    "length": "cut at the longest length",
    "error": "failed",
    "interrupted": "interrupted",
    "answering": "being answered in another window",
}


class MessageView(Vertical, can_focus=False):
    """A message of the conversation.

    Its keys work while it is selected, that is, has the focus. Only `select` gives it that: a key
    that is typed after a click is meant for the composer.
    """

    BINDINGS = bindings("message")
    DEFAULT_CSS = """
    MessageView { height: auto; margin: 0 0 1 0; padding: 0 2; border-left: outer $secondary 50%; }
    MessageView:focus, MessageView.-found { border-left: outer $accent; background: $accent 12%; }
    MessageView .versions { width: auto; height: 1; color: $text-accent; }
    MessageView .footer { color: $text-muted; height: auto; width: 1fr; }
    MessageView .end { height: auto; }
    MessageView .when { color: $text-muted; width: auto; height: 1; margin-left: 1; }
    MessageView.-tight .when { display: none; margin-left: 0; }
    MessageView.-tight .end { layout: vertical; }
    MessageView.-tight:focus .when { display: block; }
    MessageView .when.-to-come { display: none; }
    """

    def __init__(self, message: Message) -> None:
        super().__init__()
        self.message = message
        self.when = When(message.said_at)

    def select(self) -> None:
        """Select the message, until something else gets the focus."""
        self.can_focus = True
        give_focus(self)

    def on_focus(self) -> None:
        self.when.show(in_full=True)

    def on_blur(self) -> None:
        self.can_focus = self.screen.focused is self
        self.when.show()

    def on_resize(self, event: events.Resize) -> None:
        self.set_class(event.size.width < _ROOMY, "-tight")

    def on_click(self, event: events.Click) -> None:
        """Select the message by a click on the bar at its left."""
        if event.screen_x - self.region.x < _BAR:
            self.select()

    @property
    def text(self) -> str:
        """The whole text, whatever of it is shown."""
        return self.message.text

    def toggle_fold(self) -> None:
        """Show what is folded of the message, or fold it again."""


class Fold(Static):
    """A line that says that there is more; a click shows it, or hides it again."""

    def __init__(self, what: str) -> None:
        super().__init__("", classes="more", markup=False)
        self._what = what
        self.show(is_open=False)

    def show(self, *, is_open: bool) -> None:
        """Show which way it goes."""
        self.update(f"▾ {self._what} · t folds them" if is_open else f"▸ {self._what} · t shows all")

    def on_click(self, event: events.Click) -> None:
        event.stop()
        view = next(one for one in self.ancestors if isinstance(one, MessageView))
        view.toggle_fold()


class Question(MessageView):
    """What the user wrote: no markup, no Markdown."""

    DEFAULT_CSS = """
    Question { border-left: outer $primary; background: $boost; }
    Question .body { height: auto; }
    Question .when { dock: right; }
    Question.-tight .when { dock: none; }
    Question .more { height: 1; color: $text-muted; display: none; }
    Question.-long .more { display: block; }
    Question.-long.-folded .body { max-height: 8; overflow: hidden; }
    """
    FOLDED_FROM = 16  # lines, or about as much text: less is shown whole
    SHOWN = 20_000  # characters; a long paste is in the conversation whole, on the screen in part

    def compose(self) -> ComposeResult:
        yield self.when
        if self.message.siblings > 1:
            yield Versions(self.message)
        shown = visible(self.message.text)
        if len(shown) > self.SHOWN:
            shown = shown[: self.SHOWN] + f"\n… ({counted(len(shown) - self.SHOWN, 'more character')})"
        yield Static(shown, markup=False, classes="body")
        self._lines = max(shown.count("\n") + 1, len(shown) // _LINE)
        self.set_class(self._lines >= self.FOLDED_FROM, "-long", "-folded")
        yield Fold(counted(self._lines, "line"))

    def toggle_fold(self) -> None:
        self.toggle_class("-folded")
        self.query_one(Fold).show(is_open=not self.has_class("-folded"))


class Answer(MessageView):
    """An answer: Markdown or plain parts, of which the last grows, and a line with what it cost."""

    DEFAULT_CSS = """
    Answer Markdown { height: auto; margin: 0; padding: 0; background: transparent; layout: stream; }
    Answer Markdown > MarkdownBlock:last-child { margin-bottom: 0; }
    Answer .plain { height: auto; }
    Answer .parts { height: auto; layout: vertical; }
    Answer .error { color: $text-error; height: auto; }
    """

    def __init__(self, message: Message, is_live: bool = False) -> None:
        super().__init__(message)
        self._live = is_live
        self._text = ""  # what has been written, or waits to be
        self._part = Part("")  # the last part; those before it are finished
        self._fence = ""
        self._thoughts = Thoughts(message.thought)
        self._steps = StepsView(message.steps)
        self._parts = Vertical(classes="parts")
        self._last: Markdown | None = None
        self._is_whole = False  # the last part was shown in one piece
        self._error = Static("", classes="error", markup=False)
        self._footer = Static("", classes="footer", markup=False)

    @property
    def text(self) -> str:
        return self._text or self.message.text

    def compose(self) -> ComposeResult:
        if self.message.siblings > 1:
            yield Versions(self.message)
        yield self._thoughts
        yield self._steps
        yield self._parts
        yield self._error
        with Horizontal(classes="end"):
            yield self._footer
            yield self.when

    async def on_mount(self) -> None:
        self._error.display = False
        self.when.add_class("-to-come")
        await self.write(self.message.text)
        if not self._live:
            self._show_end(self.message)

    def think(self, text: str) -> None:
        """Show more of what the model thinks."""
        self._thoughts.add(text)

    def toggle_fold(self) -> None:
        self._thoughts.toggle()
        self._steps.toggle()

    async def show_steps(self, steps: Sequence[Step]) -> None:
        """Show the tools that were called; what was written before has become a part of that."""
        if await self._steps.show(steps):
            await self._parts.remove_children()
            self._text, self._part, self._fence = "", Part(""), ""
            self._last, self._is_whole = None, False
        self.show_progress("")

    async def write(self, text: str) -> None:
        """Show more of the answer."""
        before, self._text = len(self._text), self._text + text
        text = visible(text[: max(0, SHOWN - before)])
        if not text:
            return
        *done, last = parts(self._part.text + text, self._fence)
        for part in done:
            await self._show_part(part)
            self._fence, self._last, self._part = part.fence, None, Part("")
        if last.plain and not last.text:
            return
        await self._show_part(last)
        self._part = last

    async def _show_part(self, part: Part) -> None:
        """Show a part in the last widget, which has the beginning of it, or in a new one."""
        if part.plain:
            if self._last is not None:
                await self._last.remove()
                self._last = None
            plain = self._parts.children[-1] if self._part.plain and self._parts.children else None
            if isinstance(plain, Static):
                plain.update(part.text.removesuffix("\n"))
            else:
                await self._parts.mount(Static(part.text.removesuffix("\n"), markup=False, classes="plain"))
            return
        if self._last is None:
            self._last = answer_markdown()
            await self._parts.mount(self._last)
            await self._last.append(part.text)
        elif part.text.startswith(self._part.text) and not self._is_whole:
            await self._last.append(part.text[len(self._part.text) :])
        else:
            # After an update Textual appends to the last line, not to the last block: a code block
            # would end there.
            await self._last.update("")
            await self._last.append(part.text)
        self._is_whole = False

    async def finish(self, message: Message) -> None:
        """Show the end of the answer: the last part once more, in one piece, and how it ended."""
        self.message, self._live = message, False
        await self.show_steps(message.steps)
        if message.text.startswith(self._text):
            await self.write(message.text[len(self._text) :])
        if self._last is not None:
            await self._last.update(self._part.text)
            self._is_whole = True
        if message.thought.startswith(self._thoughts.text):
            self._thoughts.add(message.thought[len(self._thoughts.text) :])
        self._show_end(message)

    def go_on(self) -> None:
        """Show that the answer is under way here, perhaps once more after it had ended."""
        if not self._live:
            self._live = True
            self._footer.update("")
            self.when.add_class("-to-come")

    def _show_end(self, message: Message) -> None:
        footer = footer_of(message)
        if len(message.text) > SHOWN:
            footer = f"… ({len(message.text) - SHOWN:,} more characters: /copy or /export) · {footer}"
        self._footer.update(footer)
        self.when.seconds = message.said_at
        self.when.set_class(message.status == "answering", "-to-come")
        self.when.show(in_full=self.has_focus)
        error = message.statistics.get("error")
        self._error.display = bool(error)
        self._error.update(f"✗ {visible(str(error))}" if error else "")

    def show_progress(self, text: str) -> None:
        """Show what the model does while nothing has been said yet."""
        if text or self._footer.content:
            self._footer.update(text)


def view_of(message: Message, is_live: bool = False) -> MessageView:
    """The widget for a message; `is_live`: it is being answered here."""
    return Question(message) if message.role == "user" else Answer(message, is_live)


def footer_of(message: Message) -> str:
    """The line below an answer: how it ended, how much and how fast it was."""
    s = message.statistics
    if s.get("written") and message.status == "stopped":
        return "written by you · /continue goes on with it"
    found = [_NOTES[message.status]] if message.status in _NOTES else []
    if message.status == "error" and message.text:
        found = ["failed on the way"]
    if tokens := s.get("generated_tokens"):
        found.append(counted(tokens, "token"))
        if s.get("generation_tps"):
            found.append(f"{s['generation_tps']:.1f} tok/s")
        if s.get("time_to_first_token"):
            found.append(f"first after {s['time_to_first_token']:.2f} s")
    elif message.status == "stopped":
        found = ["stopped before the first word"]
    return " · ".join(found)
