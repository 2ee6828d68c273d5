"""The chat's one screen: the widgets on it, and how they show the session as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.events import DescendantBlur, DescendantFocus, Key, Paste
from textual.filter import LineFilter
from textual.widgets import Static

from m7mlx.terminal import visible
from m7mlx_chat.actions import Place, hints
from m7mlx_chat.catalog import short_name
from m7mlx_chat.config import Config
from m7mlx_chat.dispatch import DispatchingApp
from m7mlx_chat.drafts import Drafts
from m7mlx_chat.environment import Environment
from m7mlx_chat.events import AnyEngine
from m7mlx_chat.focus import give_focus
from m7mlx_chat.gate import Gate
from m7mlx_chat.session import Session
from m7mlx_chat.sight import first_seen
from m7mlx_chat.store.drafts import Place as DraftPlace
from m7mlx_chat.unsent import UnsentText
from m7mlx_chat.widgets.completion import Completion
from m7mlx_chat.widgets.composer import Composer
from m7mlx_chat.widgets.messages import MessageView
from m7mlx_chat.widgets.ring import RingPicture, gauge
from m7mlx_chat.widgets.sidebar import Sidebar
from m7mlx_chat.widgets.transcript import Transcript
from m7mlx_chat.widgets.waiting import Waiting
from m7mlx_chat.widgets.welcome import Welcome

State = Literal["no model", "loading", "ready", "answering"]
# columns, rows: for the conversations beside the talk; for lines around it, for long messages
BESIDE_FROM, _FRAMED_FROM, _TALL_FROM = 56, 11, 24

_HINTS = "/ commands · F1 help"


@dataclass(frozen=True)
class Parts:
    """What a chat is put together from."""

    engine: AnyEngine
    session: Session
    config: Config
    environment: Environment


class ChatView(DispatchingApp):
    """The screen of `session`. The command groups (`m7mlx_chat.commands`) are built on it."""

    TITLE = "m7mlx"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (BESIDE_FROM, "-wide")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-low"), (_FRAMED_FROM, "-high"), (_TALL_FROM, "-tall")]  # noqa: RUF012
    CSS = """
    #top { height: 1; background: $panel; padding: 0 1; }
    #brand { width: auto; text-style: bold; color: $primary; }
    #model { width: 1fr; padding: 0 2; color: $text-muted; text-overflow: ellipsis; text-wrap: nowrap; }
    #gauge { width: auto; }
    #main { height: 1fr; }
    #talk { width: 1fr; min-width: 20; height: 1fr; }
    #bottom { height: auto; background: $background; }
    #status { height: 1; padding: 0 2; }
    #state { width: 1fr; color: $text-muted; }
    #hints { width: auto; max-width: 100%; color: $text-muted; text-wrap: nowrap; text-overflow: ellipsis; }
    Screen.-narrow Sidebar { width: 100%; max-width: 100%; }
    Screen.-narrow .row { height: auto; layout: vertical; }
    Screen.-low #top, Screen.-low #status { display: none; }
    Screen.-low Composer { border: none; min-height: 1; max-height: 2; }
    Screen.-high Composer, Screen.-high Completion { max-height: 4; }
    Screen.-low Completion { border: none; max-height: 2; }
    Screen.-low Transcript, Screen.-high Transcript { padding: 0 2; }
    Screen.-low RingPicture { display: none; }
    Waiting { max-height: 4; }
    Screen.-low Waiting, Screen.-high Waiting { max-height: 1; }
    Screen.-high RingPicture { max-height: 4; }
    ToastRack { dock: top; align: right top; margin: 1 0 0 0; max-height: 40vh; }
    Screen.-low ToastRack { margin: 0; }
    Screen.-low Toast { padding: 0 1; margin: 0; }
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.environment.log)
        self.engine = parts.engine
        self.session = parts.session
        self.store = parts.session.store
        self.config = parts.config
        self.environment = parts.environment
        self.is_loading = False  # the engine is loading a model
        self._gate = Gate()
        self._told_damage: set[str] = set()
        self.drafts = Drafts(self.store, lambda: self.composer, self.going_on)

    def get_line_filters(self) -> Sequence[LineFilter]:
        return [*super().get_line_filters(), self._gate]

    def compose(self) -> ComposeResult:
        with Horizontal(id="top"):
            yield Static("m7mlx", id="brand")
            yield Static("", id="model", markup=False)
            yield Static("", id="gauge")
        yield RingPicture(id="window")
        with Horizontal(id="main"):
            yield Sidebar(self.store)
            with Vertical(id="talk"):
                yield Transcript(self.session, Welcome())
                with Vertical(id="bottom"):
                    completion = Completion()
                    yield Waiting()
                    yield completion
                    yield Composer(completion, self.drafts.recalled)
                    with Horizontal(id="status"):
                        yield Static("", id="state", markup=False)
                        yield Static(_HINTS, id="hints", markup=False)

    def exit(self, result: None = None, return_code: int = 0, message: Any = None) -> None:
        """Leave; what is not sent yet is kept."""
        if self._drawn:
            self.drafts.keep()
        super().exit(result, return_code, message)

    # --- what is on it ----------------------------------------------------------------------------

    @property
    def composer(self) -> Composer:
        return self.screen_stack[0].query_one(Composer)

    @property
    def transcript(self) -> Transcript:
        return self.screen_stack[0].query_one(Transcript)

    @property
    def sidebar(self) -> Sidebar:
        return self.screen_stack[0].query_one(Sidebar)

    @property
    def selected(self) -> MessageView | None:
        """The message that is selected."""
        return self.focused if isinstance(self.focused, MessageView) else None

    @property
    def state(self) -> State:
        """What the model is doing."""
        if self.session.under_way is not None:
            return "answering"
        return "loading" if self.is_loading else "no model" if self.session.ready is None else "ready"

    @property
    def waits_here(self) -> list[UnsentText]:
        """What was sent in the conversation shown, and waits for its turn."""
        return self.drafts.turns.at(DraftPlace(self.session.conversation))

    # --- where typed text goes --------------------------------------------------------------------

    def take_typed(self, event: Key) -> bool:
        """Give the composer what is typed where no text is expected; returns whether it was."""
        is_text = event.is_printable and event.character is not None
        if is_text and len(self.screen_stack) == 1:
            give_focus(self.composer)
            self.composer.insert(event.character or "")
            return True
        return False

    def on_paste(self, event: Paste) -> None:
        """Give the composer what is pasted where no text is expected."""
        if len(self.screen_stack) == 1:
            give_focus(self.composer)
            self.composer.paste(event.text)

    @on(DescendantFocus)
    @on(DescendantBlur)
    def _show_hints(self) -> None:
        """Show the keys of the message, or of the list, that has the focus."""
        place: Place | None = None
        if self.selected is not None:
            place = "message"
        elif self.sidebar.conversations.has_focus:
            place = "sidebar"
        text = f"{hints(place, self.config.keys)} · Esc back" if place else _HINTS
        main = self.screen_stack[0]
        main.query_one("#hints", Static).update(text)
        main.query_one("#state").display = place is None  # there is hardly room for both

    # --- showing ----------------------------------------------------------------------------------

    async def show_all(self, found: int | None = None) -> None:
        """Show the session as it is now; `found` is the message that a search has led to."""
        self.drafts.follow(self.session.conversation)  # before anything is waited for: keys go there
        await self.transcript.sync(at=found)
        self.show_conversations()
        self.show_state()
        self.show_gauge()
        self.show_seen()
        self.show_waiting()
        self._tell_damage()

    async def open_conversation(self, conversation: int) -> None:
        """Go to a conversation."""
        self.session.open(conversation)
        await self.show_all()

    def show_conversations(self) -> None:
        """Show the list, and the title of the conversation."""
        self.sidebar.refresh_list(self.session.conversation)
        self.show_title()

    def show_title(self) -> None:
        """Show which model answers, and the title of the conversation."""
        shown = short_name(self.session.settings.model)
        if self.session.conversation is None:
            self.title = self.TITLE
        else:
            head = self.store.conversation(self.session.conversation)
            self.title = head.title
            shown += f" · {head.title}  {head.hashtags}".rstrip()
        self.screen_stack[0].query_one("#model", Static).update(visible(shown))

    def show_state(self, text: str = "") -> None:
        """Say in the last line what the model is doing; `text` says it better than `state` does."""
        text = (
            text
            or {
                "no model": "no model is loaded · Ctrl+O chooses one",
                "loading": "loading the model …",
                "ready": "ready",
                "answering": "answering · Esc stops"
                if self.session.ready
                else "the model is loading; it answers then",
            }[self.state]
        )
        self.screen_stack[0].query_one("#state", Static).update(text, layout=False)  # its place is fixed

    def show_gauge(self) -> None:
        """Show how much of the conversation the model can see."""
        seen = self.session.seen_here
        line, text = self.screen_stack[0].query_one("#gauge", Static), gauge(self.session.ready, seen)
        # a layout per token would cost 5 % of them
        line.update(text, layout=text.cell_len != line.size.width)
        self.screen_stack[0].query_one(RingPicture).show(self.session.ready, seen, self.session.on_disk)

    def show_waiting(self) -> None:
        """Show what waits for its turn here."""
        self.screen_stack[0].query_one(Waiting).show(self.waits_here)

    def show_seen(self) -> None:
        """Dim what the model no longer sees of the conversation."""
        ready = self.session.ready
        first = first_seen(self.session.line, self.store.read, ready)
        self.transcript.show_seen(first, ready.sinks if ready else 0)

    def _tell_damage(self) -> None:
        """Tell, once, what could not be read as it must be."""
        new = sorted(self.store.damaged - self._told_damage)
        self._told_damage |= self.store.damaged
        if new:
            what = ", ".join(new[:5]) + (f" and {len(new) - 5} more" if len(new) > 5 else "")
            self.tell(f"{self.store.path} is damaged: {what}. What can be read is shown", is_error=True)
