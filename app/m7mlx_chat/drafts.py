"""What is written and not yet sent: a draft for each conversation, kept on the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from m7mlx_chat.store import Store
from m7mlx_chat.store.drafts import Place
from m7mlx_chat.store.errors import StoreError
from m7mlx_chat.store.rows import Role
from m7mlx_chat.turns import Turns
from m7mlx_chat.unsent import UnsentText, folded, joined
from m7mlx_chat.widgets.composer import Composer


class Drafts:
    """The draft in the composer, and those of other conversations.

    turns  what has been sent, and waits for the answer under way to end

    Each window keeps its own: two of one conversation never write over what the other holds.
    Keeping a draft never stands in the way of anything: what could not be written is told, and
    written the next time.
    """

    def __init__(
        self,
        store: Store,
        composer: Callable[[], Composer],
        telling: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`telling` makes a block in which an error is told, and the program goes on."""
        self._store = store
        self._composer = composer
        self._telling = telling
        self._place: Place | None = None  # None: nothing has been shown yet
        self._begun = UnsentText()  # what the place shows without a draft: "", or its message
        self._kept = UnsentText()  # what the composer held when it was looked at last
        self._waiting: dict[Place, UnsentText] = {}  # to be written
        self.turns = Turns(store, telling)

    @property
    def edited(self) -> int | None:
        """The question or the answer that the draft takes the place of."""
        return None if self._place is None else self._place.message

    # --- from one place to another ----------------------------------------------------------------

    def follow(self, conversation: int | None) -> None:
        """Show the draft of the conversation that is shown now."""
        if self._place is None or conversation != self._place.conversation:
            self._leave()
            place = Place(conversation)
            with self._telling():
                place = self._store.last_place(conversation)
            self._show(place)

    def edit(self, conversation: int, message: int) -> None:
        """Show a message, or what has become of it, to be changed."""
        self._leave()
        self._show(Place(conversation, message))

    def leave_edit(self) -> None:
        """Go back to the draft that was left for a message; what has become of that is kept."""
        self._leave()
        if self._place is not None:
            self._show(Place(self._place.conversation))
            self._waiting[self._place] = self._kept  # whoever opens the conversation begins here
            self.keep()

    def _leave(self) -> None:
        """Keep what is in the composer, and what made room for it."""
        composer = self._composer()
        if composer.aside is not None and composer.draft is not composer.aside:
            self._keep_cleared(composer.aside)
        self.keep()

    def _show(self, place: Place) -> None:
        self._place, self._begun = place, UnsentText()
        what: Role | None = None
        if place.message is not None:
            with self._telling():
                message = self._store.message(place.message)
                what, self._begun = message.role, folded(message.text)
        self._kept = self._waiting.get(place) or self._read(place) or self._begun
        self._composer().show_editing(what)
        self._composer().load(self._kept)
        self._take_left_over()

    def _read(self, place: Place) -> UnsentText | None:
        with self._telling():
            if (found := self._store.draft(place)) is not None:
                return UnsentText(*found)
        return None

    # --- keeping ----------------------------------------------------------------------------------

    def keep(self) -> None:
        """Write the draft if it has changed."""
        self._look()
        with self._telling():
            for place, unsent in list(self._waiting.items()):
                try:
                    if place == self._place and place.message is not None and unsent.shown == self._begun.shown:
                        self._store.drop_draft(place)
                    else:
                        self._store.keep_draft(place, unsent.shown, unsent.pastes)
                except StoreError:  # its conversation has been erased, say: another time does not help
                    del self._waiting[place]
                    raise
                del self._waiting[place]

    def _look(self) -> None:
        unsent = self._composer().draft
        if self._place is not None and unsent.shown != self._kept.shown:
            self._kept = self._waiting[self._place] = unsent

    def sent(self, conversation: int | None) -> None:
        """Forget the draft: it has become a part of a conversation, which is shown now."""
        place, self._place, self._begun = self._place or Place(), Place(conversation), UnsentText()
        self._waiting.pop(place, None)
        with self._telling():
            self._store.drop_draft(place)
            self._store.drop_cleared()
        left = self._composer().aside
        if place.message is not None:
            left = self._waiting.get(self._place) or self._read(self._place)
        self._composer().show_editing(None)
        self._composer().reset(left)
        self._kept = UnsentText()

    # --- what waits for its turn ------------------------------------------------------------------

    def wait(self, unsent: UnsentText) -> None:
        """Let a message wait for its turn; it leaves the composer."""
        place = self._place or Place()
        self.turns.add(place, unsent)
        self.sent(place.conversation)

    def take_back(self) -> bool:
        """Put what waits here back into the composer; return whether anything did."""
        place = self._place
        if place is None or not (texts := self.turns.at(place)):
            return False
        self._put_before(texts)
        self.turns.drop(place)
        return True

    def turn_taken(self, conversation: int) -> None:
        """Forget the message whose turn it was; it has been asked in a conversation.

        Where it began that, and is shown, the draft goes there with it.
        """
        turn = self.turns.take_first(conversation)
        if turn.place == self._place and turn.place.conversation is None:
            unsent = self._composer().draft
            self._waiting.pop(turn.place, None)
            with self._telling():
                self._store.drop_draft(turn.place)
            self._place = Place(conversation)
            self._kept = self._waiting[self._place] = unsent
            self.keep()

    def give_back(self) -> None:
        """Make drafts of all that waits."""
        self.turns.give_up()
        if self._place is not None and self._place.message is None:
            self._take_left_over()

    def _take_left_over(self) -> None:
        """Take into the draft what waited here and will not have its turn."""
        place = self._place
        if place is not None and place.message is None and (left := self.turns.left_over(place)) is not None:
            self._put_before([left])
            self.turns.drop(place)

    def _put_before(self, texts: Sequence[UnsentText]) -> None:
        """Put texts before the draft, and keep that."""
        composer = self._composer()
        composer.reset(joined([*texts, composer.draft]))
        self.keep()

    def clear(self) -> None:
        """Empty the composer; what was in it is the first that ↑ brings back."""
        self._keep_cleared(self._composer().draft)
        self._composer().reset()

    def _keep_cleared(self, unsent: UnsentText) -> None:
        if unsent.shown:
            with self._telling():
                self._store.keep_cleared(unsent.shown, unsent.pastes)

    def recalled(self) -> list[UnsentText]:
        """What can be brought back: what was cleared last, what was asked before."""
        cleared = None
        with self._telling():
            cleared = self._store.cleared()
        asked = [folded(text) for text in self._store.prompts(limit=200)]
        return [UnsentText(*cleared), *asked] if cleared and cleared[0] else asked
