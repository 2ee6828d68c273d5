"""The database of conversations: what it is made of, and how an older one is brought up to date."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from m7mlx.errors import DiskError, M7Error, RunError
from m7mlx_chat.store.errors import StoreError
from m7mlx_chat.store.sound import decoded

APPLICATION_ID = 0x6D376D78  # "m7mx"
_BUSY_SECONDS = 5.0

# One tuple of statements for each version; never change one that has been released, append another.
# A parent is an earlier message of the same conversation: the database itself sees to it that trees
# are trees. Small columns come first, so that a walk along the parents does not read the texts.
_VERSION_1 = (
    """CREATE TABLE conversation (
        id         INTEGER PRIMARY KEY AUTOINCREMENT,
        archived   INTEGER NOT NULL,
        deleted_at REAL,
        created    REAL NOT NULL,
        updated    REAL NOT NULL,
        leaf       INTEGER,
        automatic  INTEGER NOT NULL,
        title      TEXT NOT NULL,
        model      TEXT NOT NULL,
        system     TEXT NOT NULL,
        settings   TEXT NOT NULL,
        FOREIGN KEY (id, leaf) REFERENCES message (conversation, id)
    )""",
    """CREATE TABLE message (
        id           INTEGER PRIMARY KEY AUTOINCREMENT,
        conversation INTEGER NOT NULL REFERENCES conversation (id) ON DELETE CASCADE,
        parent       INTEGER CHECK (parent < id),
        role         TEXT NOT NULL CHECK (role IN ('user', 'assistant')),
        status       TEXT NOT NULL
                     CHECK (status IN ('complete', 'stopped', 'length', 'error', 'answering', 'interrupted')),
        created      REAL NOT NULL,
        owner        TEXT CHECK ((owner IS NOT NULL) = (status = 'answering')),
        model        TEXT NOT NULL,
        settings     TEXT NOT NULL,
        statistics   TEXT NOT NULL,
        text         TEXT NOT NULL,
        ids          BLOB,
        UNIQUE (conversation, id),
        FOREIGN KEY (conversation, parent) REFERENCES message (conversation, id)
    )""",
    "CREATE INDEX conversation_updated ON conversation (archived, updated) WHERE deleted_at IS NULL",
    "CREATE INDEX message_parent ON message (conversation, parent)",
    "CREATE INDEX message_asked ON message (created) WHERE role = 'user'",
    "CREATE INDEX message_answering ON message (owner) WHERE status = 'answering'",
    """CREATE VIRTUAL TABLE message_words USING fts5 (
        text, content = 'message', content_rowid = 'id', tokenize = 'unicode61 remove_diacritics 2'
    )""",
    """CREATE TRIGGER message_added AFTER INSERT ON message BEGIN
        INSERT INTO message_words (rowid, text) VALUES (new.id, new.text);
    END""",
    """CREATE TRIGGER message_changed AFTER UPDATE OF text ON message BEGIN
        INSERT INTO message_words (message_words, rowid, text) VALUES ('delete', old.id, old.text);
        INSERT INTO message_words (rowid, text) VALUES (new.id, new.text);
    END""",
    """CREATE TRIGGER message_removed AFTER DELETE ON message BEGIN
        INSERT INTO message_words (message_words, rowid, text) VALUES ('delete', old.id, old.text);
    END""",
)
# Texts that have not been sent, by the place that they were written in (see drafts.py).
_VERSION_2 = (
    """CREATE TABLE draft (
        place        TEXT PRIMARY KEY,
        conversation INTEGER REFERENCES conversation (id) ON DELETE CASCADE,
        updated      REAL NOT NULL,
        shown        TEXT NOT NULL,
        pastes       TEXT NOT NULL
    )""",
    "CREATE INDEX draft_conversation ON draft (conversation)",
)
# Every three characters that follow each other: for parts of words, and scripts without spaces.
_VERSION_3 = (
    "CREATE VIRTUAL TABLE message_parts USING fts5 (text, content='message', content_rowid='id', tokenize='trigram')",
    "INSERT INTO message_parts (message_parts) VALUES ('rebuild')",
    """CREATE TRIGGER message_parts_added AFTER INSERT ON message BEGIN
        INSERT INTO message_parts (rowid, text) VALUES (new.id, new.text);
    END""",
    """CREATE TRIGGER message_parts_changed AFTER UPDATE OF text ON message BEGIN
        INSERT INTO message_parts (message_parts, rowid, text) VALUES ('delete', old.id, old.text);
        INSERT INTO message_parts (rowid, text) VALUES (new.id, new.text);
    END""",
    """CREATE TRIGGER message_parts_removed AFTER DELETE ON message BEGIN
        INSERT INTO message_parts (message_parts, rowid, text) VALUES ('delete', old.id, old.text);
    END""",
)
# A draft belongs to the instance that it is written in, its `owner`; to none when that has ended.
_VERSION_4 = (
    """CREATE TABLE owned_draft (
        place        TEXT NOT NULL,
        owner        TEXT,
        conversation INTEGER REFERENCES conversation (id) ON DELETE CASCADE,
        updated      REAL NOT NULL,
        shown        TEXT NOT NULL,
        pastes       TEXT NOT NULL,
        UNIQUE (place, owner)
    )""",
    """INSERT INTO owned_draft (place, conversation, updated, shown, pastes)
        SELECT place, conversation, updated, shown, pastes FROM draft""",
    "DROP TABLE draft",
    "ALTER TABLE owned_draft RENAME TO draft",
    "CREATE INDEX draft_conversation ON draft (conversation)",
)
# Tags are words, with a space between two. The indexes hold the few that have them, or are pinned.
_VERSION_5 = (
    "ALTER TABLE conversation ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE conversation ADD COLUMN tags TEXT NOT NULL DEFAULT ''",
    "CREATE INDEX conversation_pinned ON conversation (archived, updated) WHERE pinned",
    "CREATE INDEX conversation_tagged ON conversation (tags) WHERE tags != ''",
)
MIGRATIONS: tuple[tuple[str, ...], ...] = (_VERSION_1, _VERSION_2, _VERSION_3, _VERSION_4, _VERSION_5)


def open_database(path: Path, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> sqlite3.Connection:
    """Open the database, made or brought up to date as needed.

    Not for two at once: hold the opening lock.

    Raises StoreError if the file is damaged, another program's or newer, and leaves it as it was;
    DiskError.
    """
    with one_line(path):
        _touch(path)
        db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            _check(db, path, len(migrations))
            # A commit is on the disk when it returns, and readers never wait for writers.
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            _sync_fully(db)
            _migrate(db, path, migrations)
            db.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            db.close()
            raise
    db.row_factory = sqlite3.Row
    db.text_factory = decoded
    return db


def _sync_fully(db: sqlite3.Connection) -> None:
    """Have fsync reach the drive on macOS too, where it stops at the drive's cache by default."""
    db.execute("PRAGMA fullfsync = ON")
    db.execute("PRAGMA checkpoint_fullfsync = ON")


def _check(db: sqlite3.Connection, path: Path, newest: int) -> None:
    (version,), (program,) = (
        db.execute("PRAGMA user_version").fetchone(),
        db.execute("PRAGMA application_id").fetchone(),
    )
    tables = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if program != APPLICATION_ID and (program or version or tables):
        raise StoreError(f"{path} is not a database of m7mlx-chat; move it away, or set M7MLX_DATA to another folder")
    if version > newest:
        raise StoreError(
            f"{path} was written by a newer m7mlx (its version is {version}, this one knows {newest}); update m7mlx"
        )


def _migrate(db: sqlite3.Connection, path: Path, migrations: Sequence[Sequence[str]]) -> None:
    """Go up one version at a time, each in one transaction, with a copy made before it."""
    is_new = db.execute("PRAGMA user_version").fetchone()[0] == 0
    for version, statements in enumerate(migrations):
        with transaction(db):
            if db.execute("PRAGMA user_version").fetchone()[0] != version:
                continue
            if not is_new:
                _back_up(path, version)
            for statement in statements:
                db.execute(statement)
            if db.execute("PRAGMA foreign_key_check").fetchone():
                raise StoreError(f"{path} is damaged: messages refer to what is not there; put a backup in its place")
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {version + 1}")


def _back_up(path: Path, version: int) -> None:
    """Copy the database to chats.db.v<version>.<time>.bak; only a whole copy has that name."""
    target = path.with_name(f"{path.name}.v{version}.{time.strftime('%Y%m%dT%H%M%S')}.bak")
    partial = target.with_name(target.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        _touch(partial)
        # By a connection of its own: the one that migrates holds the lock for writing, and reads
        # are not blocked.
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(partial)) as copy:
            _sync_fully(copy)
            source.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # one file, whole by itself
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


def _touch(path: Path) -> None:
    """Make sure that there is a file, and that only the user can read what is in it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Write all that the block changes, or nothing.

    It takes the lock for writing at once, so it waits at its beginning and nowhere else.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.rollback()


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Raise what SQLite and the disk say as errors of the tree; what is a bug of ours stays."""
    try:
        yield
    except sqlite3.Error as error:
        known = _translated(path, error)
        if known is None:
            raise
        raise known from None
    except UnicodeDecodeError as error:  # in SQLite's message, which quotes a damaged table
        raise damaged(path, error) from None
    except OSError as error:
        raise DiskError(f"{path} cannot be written ({error.strerror}); check the folder, or set M7MLX_DATA") from None


def damaged(path: Path, error: Exception) -> StoreError:
    """The error for a database that cannot be what this project wrote."""
    # A -wal file left beside another database would be taken for its own.
    mend = f"move it and {path.name}-wal away, then begin anew or put a backup ({path.name}.*.bak) in its place"
    return StoreError(f"{path} is damaged ({error}); {mend}")


def _translated(path: Path, error: sqlite3.Error) -> M7Error | None:
    # the rest says which kind of it
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return RunError(f"another program keeps {path} locked; close it, or try again")
    if code == sqlite3.SQLITE_FULL:
        return DiskError(f"the disk is full: {path} cannot grow; make room")
    if code == sqlite3.SQLITE_TOOBIG:
        return StoreError(f"a message is too long to be stored in {path}; cut it")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM):
        return DiskError(f"{path} cannot be written ({error}); check the folder, or set M7MLX_DATA")
    if isinstance(error, sqlite3.IntegrityError):
        return StoreError(f"{path} refused a change ({error}) and is as it was; try again, and please report it")
    # another thread, a closed store
    if isinstance(error, sqlite3.ProgrammingError | sqlite3.InterfaceError):
        return None
    return damaged(path, error)  # also where tables or columns are not those that were made
