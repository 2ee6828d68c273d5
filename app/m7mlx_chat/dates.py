"""When something was said, as people read it: in local time, short where space is dear."""

from __future__ import annotations

from datetime import date, datetime, timedelta


def today() -> date:
    """The day of now, in local time."""
    return date.today()


def short_time(seconds: float) -> str:
    """A time of today, else the day; "" where it is not known (0)."""
    if (when := _local(seconds)) is None:
        return ""
    days = (today() - when.date()).days
    if days == 0:
        return f"{when:%H:%M}"
    if days == 1:
        return "yesterday"
    return f"{when.day} {when:%b}" if when.year == today().year else f"{when.day} {when:%b} {when.year}"


def full_time(seconds: float) -> str:
    """Day and time; "" where they are not known (0)."""
    when = _local(seconds)
    return "" if when is None else f"{when:%Y-%m-%d %H:%M}"


def exact_time(seconds: float) -> str:
    """A time to the second with its offset from UTC, for programs; "" where it is not known (0)."""
    when = _local(seconds)
    return "" if when is None else when.isoformat(timespec="seconds")


def group_of(seconds: float) -> str:
    """The heading that a day stands under in a list, the newest first."""
    day, now = date.fromtimestamp(seconds), today()
    for days, name in ((0, "Today"), (1, "Yesterday"), (7, "This week"), (31, "This month")):
        if day >= now - timedelta(days=days):
            return name
    return str(day.year)


def _local(seconds: float) -> datetime | None:
    return datetime.fromtimestamp(seconds).astimezone() if seconds else None
