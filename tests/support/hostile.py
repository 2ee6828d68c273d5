"""A text that tries everything on a terminal, and every place of the chat that may show it.

As a program (`python tests/support/hostile.py FOLDER`) it goes through all places on the terminal
that it runs in.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from chat_harness import READY, Chat, ScriptedEngine, done, environment_in
from m7mlx_chat import jobs
from m7mlx_chat.actions import unknown_keys
from m7mlx_chat.app import ChatApp
from m7mlx_chat.config import Config
from m7mlx_chat.events import Failed, Text
from m7mlx_chat.session import Session
from m7mlx_chat.settings import Settings
from m7mlx_chat.store import Store
from m7mlx_chat.view import Parts
from textual import events
from textual.pilot import Pilot
from textual.widgets import Input, Markdown, OptionList, Select

from m7mlx.errors import M7Error, RunError

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
OTHERS = "\u2028\u2029\u200b\u2060\ufeff\U000e0041\U000e007f"
MARKUP = "[/x][@click=app.quit]q[/][link=http://evil.example]l[/link][b"
CONTROLS = "\x1b]0;PWNED\x07\x1b[7777;1H\x9b7777m\x9d52;c;eA==\x9c\x1bP7777\x1b\\\x7f\x0b\x0c\x08\x0e\x85"
EVIL = CONTROLS + BIDI + OTHERS + MARKUP
# in what a widget draws: no line ends
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff" + BIDI + OTHERS + "]")
SIZE = (130, 40)
FILE_NAME = "wordfile" + EVIL.replace("/", "")


class Place(NamedTuple):
    """A way to bring the text onto the screen, and the `word` before it to look for.

    What `fades` is shown again until it is seen: a busy machine may miss it.
    """

    name: str
    show: Callable[[Chat, Path], Awaitable[None]]
    word: str
    fades: bool = False


PLACES: list[Place] = []


def place(
    name: str,
    word: str,
    *,
    fades: bool = False,
) -> Callable[[Callable[[Chat, Path], Awaitable[None]]], None]:
    return lambda show: PLACES.append(Place(name, show, word, fades))


def conversation(**changes: object) -> str:
    """A file to import, hostile wherever it holds text."""
    common = {"status": "complete", "created": 1, "model": "wordmodel" + EVIL, "settings": {}}
    question = common | {"parent": None, "role": "user", "text": "wordasked" + EVIL, "statistics": {}}
    answer = {"parent": 0, "role": "assistant", "text": f"wordanswer {EVIL}", "status": "error"}
    statistics = {"error": "worderror" + EVIL, "generated_tokens": 3}
    head = {"format": "m7mlx-chat", "version": 1, "title": "wordtitle" + EVIL, "automatic": False}
    head |= {"created": 1, "updated": 1, "archived": False, "model": "wordmodel" + EVIL}
    head |= {"system": "wordsystem" + EVIL, "settings": {"stop": ["wordstop" + EVIL]}, "leaf": 1}
    return json.dumps({**head, "messages": [question, common | answer | {"statistics": statistics}]} | changes)


# --- what others say ------------------------------------------------------------------------------


async def ran(chat: Chat, command: str) -> None:
    """A command, and what it fails with as the app tells it."""
    try:
        await chat.app.run_command(command)
    except M7Error as error:
        chat.app.report(error)


@place("toasts at the start: a theme that is not there", "wordtheme", fades=True)
async def _theme(chat: Chat, work: Path) -> None:
    # the first one may have gone
    chat.app.tell(f"again: there is no theme {chat.app.config.theme}", is_error=True)


@place("… and keys for what is not there", "wordaction", fades=True)
async def _keys(chat: Chat, work: Path) -> None:
    chat.app.tell(f"again: {', '.join(unknown_keys(chat.app.config.keys))}", is_error=True)


@place("the help, with the user's keys", "wordkey")
async def _help(chat: Chat, work: Path) -> None:
    chat.app.action_help()


@place("a question, an answer, the error below it, of an imported conversation", "wordanswer")
async def _imported(chat: Chat, work: Path) -> None:
    (work / "imported.json").write_text(conversation())
    await chat.send(f"/import {work / 'imported.json'}")


@place("… the question", "wordasked")
async def _question(chat: Chat, work: Path) -> None:
    chat.app.transcript.scroll_home(animate=False)


@place("… its error", "worderror")
async def _error(chat: Chat, work: Path) -> None:
    chat.app.transcript.scroll_end(animate=False)


@place("… its title and model, at the top", "wordmodel")
async def _top(chat: Chat, work: Path) -> None: ...


@place("… its title, among the conversations", "wordtitle")
async def _sidebar(chat: Chat, work: Path) -> None:
    chat.app.sidebar.add_class("-shown")
    chat.app.show_conversations()
    assert chat.app.sidebar.conversations.option_count


@place("a search hit", "wordanswer")
async def _hit(chat: Chat, work: Path) -> None:
    chat.app.action_find("wordanswer")
    await chat.pilot.pause(0.4)
    assert chat.app.sidebar.conversations.get_option_at_index(0).id.startswith("message")  # type: ignore[union-attr]


@place("the title, to be changed", "wordtitle")
async def _title(chat: Chat, work: Path) -> None:
    chat.app.sidebar.query_one(Input).value = ""
    chat.app.sidebar.remove_class("-shown")
    chat.app.action_rename()
    await chat.pilot.pause()


@place("the settings: system prompt", "wordsystem")
async def _settings(chat: Chat, work: Path) -> None:
    chat.app.action_settings()


@place("the settings: a text to stop at", "wordstop")
async def _stop(chat: Chat, work: Path) -> None:
    chat.app.action_settings()
    await chat.pilot.pause()
    field = chat.app.screen.query_one("#field-stop", Input)
    field.focus()
    field.value = "wordstop" + EVIL
    await chat.pilot.press("home")


@place("the settings: what is wrong", "wordwrong")
async def _wrong(chat: Chat, work: Path) -> None:
    chat.app.action_settings()
    await chat.pilot.pause()
    field = chat.app.screen.query_one("#field-temperature", Input)
    field.focus()
    field.value = "wordwrong" + EVIL
    await chat.pilot.press("enter")


@place("the settings: a preset", "wordpreset")
async def _presets(chat: Chat, work: Path) -> None:
    chat.app.action_settings()
    await chat.pilot.pause()
    select = chat.app.screen.query_one(Select)
    select.value = "wordpreset" + EVIL
    select.expanded = True


@place("a toast: the system prompt", "wordsystem")
async def _system(chat: Chat, work: Path) -> None:
    chat.app.action_system()


@place("a toast: the preset that was taken", "wordpreset")
async def _preset(chat: Chat, work: Path) -> None:
    chat.app.action_preset("wordpreset" + EVIL)


@place("a toast: an import that failed", "wordmissing")
async def _missing(chat: Chat, work: Path) -> None:
    await ran(chat, "/import wordmissing" + EVIL)


@place("a toast: a setting that is not there", "wordfield")
async def _field(chat: Chat, work: Path) -> None:
    await ran(chat, "/set wordfield" + EVIL.replace("\n", ""))


@place("a toast: a file that is no text", "wordfile")
async def _bad_file(chat: Chat, work: Path) -> None:
    (work / FILE_NAME).write_bytes(b"\xff\xfe")
    chat.app.composer.focus()
    chat.app.composer.insert("@wordfile")
    await chat.pilot.pause()
    await chat.pilot.press("tab")


@place("a name of a file, completed", "wordfile")
async def _completed(chat: Chat, work: Path) -> None:
    chat.app.clear_notifications()
    chat.app.composer.focus()
    chat.app.composer.insert("@wordfile")


@place("a file that was put in", "wordfile")
async def _put_in(chat: Chat, work: Path) -> None:
    (work / FILE_NAME).write_text("wordcontent" + EVIL)
    chat.app.composer.focus()
    chat.app.composer.insert("@wordfile")
    await chat.pilot.pause()
    await chat.pilot.press("tab")


@place("a folder whose name is no text", "wordbytes")
async def _bytes(chat: Chat, work: Path) -> None:
    os.makedirs(os.fsencode(work) + b"/wordbytes\xff\x9b", exist_ok=True)
    chat.app.composer.focus()
    chat.app.composer.insert("@wordb")
    await chat.pilot.pause()
    await chat.pilot.press("tab")


@place("what was asked before: up", "wordasked")
async def _up(chat: Chat, work: Path) -> None:
    chat.app.composer.focus()
    await chat.pilot.press("up")
    assert chat.app.composer.text.startswith("wordasked")


@place("what was asked before: the list", "wordasked")
async def _list(chat: Chat, work: Path) -> None:
    chat.app.action_history()


@place("what was asked before: taken", "wordasked")
async def _taken(chat: Chat, work: Path) -> None:
    chat.app.action_history()
    await chat.pilot.pause()
    await chat.pilot.press("enter")
    assert chat.app.composer.text.startswith("wordasked")


@place("a question, to be edited", "wordasked")
async def _edited(chat: Chat, work: Path) -> None:
    chat.app.action_edit()
    assert chat.app.composer.text.startswith("wordasked")


@place("figures of an answer", "wordanswer")
async def _figures(chat: Chat, work: Path) -> None:
    chat.app.action_stats()


@place("what was typed into a field", "wordtyped")
async def _typed(chat: Chat, work: Path) -> None:
    chat.app.action_history()
    await chat.pilot.pause()
    chat.app.screen.query_one(Input).value = "wordtyped" + EVIL


@place("what was pasted", "wordpasted")
async def _pasted(chat: Chat, work: Path) -> None:
    chat.app.composer.focus()
    chat.app.composer.post_message(events.Paste("wordpasted" + EVIL))


@place("where a link leads", "wordlink")
async def _link(chat: Chat, work: Path) -> None:
    markdown = chat.app.query(Markdown).last()
    markdown.post_message(Markdown.LinkClicked(markdown, "http://wordlink" + EVIL))


@place("a toast: what was deleted", "wordtitle")
async def _deleted(chat: Chat, work: Path) -> None:
    await chat.app.action_delete()
    await chat.pilot.pause()
    await chat.app.action_undo()


# --- what the model says --------------------------------------------------------------------------

MARKDOWN = {
    "text": f"wordtext {EVIL}",
    "a heading": f"# wordheading {EVIL}",
    "code": f"```py{EVIL}\nwordcode = 1 {EVIL}\n```",
    "a table": f"| wordtable | b |\n|---|---|\n| {EVIL} | {EVIL} |",
    "a list": f"- wordlist {EVIL}\n  1. {EVIL}",
    "a quote": f"> wordquote {EVIL}",
    "a link": f"[wordlinked {EVIL}](http://evil.example/{EVIL.replace(' ', '')})",
    "an address": f"wordaddress <http://evil.example/{EVIL}> http://evil.example/\x9b",
    "an image": f"wordimage ![{EVIL}](http://evil.example/{EVIL})",
    "entities": "wordentities &#27;]0;PWNED&#7; &#x9b;7777m &#x202e; &#127; &#8232; `&#27;` **&#x1b;[7777m**",
    "HTML": f"<wordhtml {EVIL}>",
}


def _said(kind: str, text: str) -> None:
    @place(f"an answer: {kind}", re.search("word[a-z]+", text)[0])  # type: ignore[index]
    async def said(chat: Chat, work: Path) -> None:
        await chat.app.action_new()
        await chat.send("Speak")
        chat.engine.events += [
            Text(text[start : start + 11]) for start in range(0, len(text), 11)
        ]  # sequences are cut
        await chat.say(done(text))


for _kind, _text in MARKDOWN.items():
    _said(_kind, _text)


@place("an answer that fails", "wordfailed")
async def _failed(chat: Chat, work: Path) -> None:
    await chat.send("Fail")
    await chat.say(Failed("wordfailed" + EVIL))


@place("a model that fails", "wordfatal")
async def _fatal(chat: Chat, work: Path) -> None:
    await chat.app.action_new()
    await chat.say(Failed("wordfatal" + EVIL, fatal=True))


# --- models ---------------------------------------------------------------------------------------


@place("the list of models", "wordfolder")
async def _models(chat: Chat, work: Path) -> None:
    folder = work / ("wordfolder" + EVIL.replace("/", ""))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "wordtype" + EVIL, "architectures": [EVIL]}))
    chat.session.configure(chat.session.settings.changed({"model": folder.name}))
    await chat.exchange("Who are you?", "I am.")
    chat.app.action_model()
    await _listed(chat)


@place("a model by name that is not there", "wordnowhere")
async def _nowhere(chat: Chat, work: Path) -> None:
    chat.app.action_model()
    await _listed(chat)
    chat.app.screen.query_one(Input).value = "./wordnowhere" + EVIL
    chat.app.screen.query_one(Input).focus()
    await chat.pilot.press("enter")


@place("a download that fails", "wordhub")
async def _hub(chat: Chat, work: Path) -> None:
    async def fetch(name: str, progress: jobs.Progress) -> Path:
        progress(1, 2, "wordprogress" + EVIL)
        raise RunError("wordhub" + EVIL)

    before, jobs.fetch = jobs.fetch, fetch
    try:
        chat.app.action_model("org/word")
        await _listed(chat)
    finally:
        jobs.fetch = before


async def _listed(chat: Chat) -> None:
    for _ in range(100):
        await chat.pilot.pause(0.05)
        if chat.app.screen.query_one(OptionList).option_count:
            return


# --- going through all of them --------------------------------------------------------------------


def settings() -> Settings:
    return Settings(model="wordmodel" + EVIL, system="wordsystem" + EVIL, stop=("wordstop" + EVIL,))


def config(folder: Path) -> Config:
    name = "wordpreset" + EVIL
    keys = {"wordaction" + EVIL: "ctrl+t", "new": "wordkey" + EVIL.replace(",", "")}
    return Config(folder / "config.toml", {}, {name: {"temperature": 0.5}}, "wordtheme" + EVIL, keys)


async def go_through(
    chat: Chat,
    work: Path,
    look: Callable[[Place], None],
    written: Callable[[], str],
) -> None:
    """Show each place, wait until its word is seen and written, let `look` see it, leave it."""
    for one in PLACES:
        await one.show(chat, work)
        shown = time.monotonic()
        until = shown + 30  # a machine may be busy
        while time.monotonic() < until:
            await asyncio.sleep(0.05)  # Pilot would wait until nothing is to be done
            if one.fades and time.monotonic() > shown + 7:
                shown = time.monotonic()
                await one.show(chat, work)
            seen = chat.shown().replace("\n", "")  # a toast may break a word
            if one.word in seen and one.word in written():
                await asyncio.sleep(0.1)  # Textual is still bringing it up
                break
        look(one)
        while len(chat.app.screen_stack) > 1:
            chat.app.pop_screen()
            await chat.pilot.pause()
        chat.app.composer.reset()
        if chat.app.drafts.edited is not None:
            chat.app.drafts.leave_edit()
            chat.app.composer.reset()
        chat.app.clear_notifications()
        await chat.pilot.pause()
        if chat.app.state == "no model":
            await chat.say(READY)


def drawn(chat: Chat) -> list[str]:
    """What all widgets of all screens draw."""
    return [
        segment.text
        for screen in chat.app.screen_stack
        for strip in screen._compositor.render_strips(chat.app.size)
        for segment in strip
    ]


def main(folder: Path) -> None:
    """Show all places on a real terminal, and end with a line: "went through", and what was unsafe.

    Unsafe is a place where a widget draws a control character.
    """
    os.chdir(folder)
    unsafe: list[str] = []
    with Store(folder / "chats.db") as store:
        engine = ScriptedEngine()
        session = Session(store, engine, settings())
        parts = Parts(engine, session, config(folder), environment_in(folder))
        app = ChatApp(parts, folder=folder)

        async def drive(pilot: Pilot[Any]) -> None:
            chat = Chat(app, engine, session, pilot)
            written: list[str] = []
            write = app._driver.write  # type: ignore[union-attr]

            def noted(data: str) -> None:
                written.append(data)
                write(data)

            def look(one: Place) -> None:
                if UNSAFE.search("".join(drawn(chat))):
                    unsafe.append(one.name)

            app._driver.write = noted  # type: ignore[union-attr, method-assign]
            await chat.say(READY)
            await go_through(chat, folder, look, lambda: "".join(written))
            app.copy_to_clipboard("copied" + EVIL)
            app.exit()

        app.run(auto_pilot=drive)
        print("failed" if app.return_code else f"went through, unsafe: {unsafe}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
