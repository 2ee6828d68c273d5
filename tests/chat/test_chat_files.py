"""Files that go into messages and come out of conversations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pypdf
import pytest
from m7mlx_chat.attach import attached
from m7mlx_chat.files import MOST_BYTES, free_name, write_new

from m7mlx.errors import DiskError, InputError


def test_a_file_in_a_message(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfx = 1\r\ny = '```'\r\n")
    assert attached(str(tmp_path / "a.py")) == "a.py:\n````\nx = 1\ny = '```'\n````"
    (tmp_path / "empty").write_text("")
    assert attached(str(tmp_path / "empty")) == "empty:\n```\n\n```"


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "nul").write_bytes(b"a\0b")
    (tmp_path / "big").write_bytes(b"a" * (MOST_BYTES + 1))
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("image.png", "not text"), ("nul", "NUL"), ("big", "more than 2 MB"), ("none", "No such file")):
        with pytest.raises(InputError, match=why):
            attached(str(tmp_path / name))
    with pytest.raises(InputError, match="no regular file"):
        attached(str(tmp_path / "pipe"))
    with pytest.raises(InputError, match="no regular file"):
        attached("/dev/zero")


def pdf(*pages: str, more: Sequence[str] = ()) -> bytes:
    """A PDF with a line of text on each page, and `more` objects."""
    objects = ["<</Type/Catalog/Pages 2 0 R>>"]
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects += [f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>", "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"]
    for i, text in enumerate(pages):
        content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        objects.append(f"<</Type/Page/Parent 2 0 R/Contents {5 + 2 * i} 0 R/Resources<</Font<</F1 3 0 R>>>>>>")
        objects.append(f"<</Length {len(content)}>>stream\n{content}\nendstream")
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate([*objects, *more], 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n{table}"
    return data + f"{end}trailer<</Size {len(places) + 1}/Root 1 0 R>>\nstartxref\n{len(data)}\n%%EOF".encode()


def test_the_text_of_a_pdf(tmp_path: Path) -> None:
    (tmp_path / "paper.PDF").write_bytes(pdf("Sliding windows", "", "Rolling buffers"))
    text = "[page 1]\nSliding windows\n\n[page 3]\nRolling buffers"
    assert attached(str(tmp_path / "paper.PDF")) == f"paper.PDF:\n```\n{text}\n```"


def test_a_pdf_that_gives_no_text_is_refused(tmp_path: Path) -> None:
    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(tmp_path / "pictures.pdf")
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(tmp_path / "locked.pdf")
    (tmp_path / "no.pdf").write_bytes(b"hello")
    (tmp_path / "half.pdf").write_bytes(pdf("Sliding windows")[:150])
    (tmp_path / "empty.pdf").touch()
    for name, why in (
        ("pictures.pdf", "its pages are pictures"),
        ("locked.pdf", "password"),
        ("no.pdf", "damaged, or no PDF"),
        ("half.pdf", "damaged, or no PDF"),
        ("empty.pdf", "damaged, or no PDF"),
        ("none.pdf", "No such file"),
    ):
        with pytest.raises(InputError, match=why):
            attached(str(tmp_path / name))


def test_a_folder_is_all_text_files_below_it(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    for name in ("b/deep/c.py", "a.md", ".git/config", "node_modules/x.js", "b/.hidden"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}\n")
    (folder / "image.png").write_bytes(b"\x89PNG\xff")
    os.mkfifo(folder / "pipe")
    told = "project/ (2 files; 2 more, which are not text, are left out):\n\n"
    blocks = "a.md:\n```\ntext of a.md\n```\n\nb/deep/c.py:\n```\ntext of b/deep/c.py\n```"
    assert attached(str(folder)) == told + blocks
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="has no text files"):
        attached(str(tmp_path / "nothing"))
    for i in range(3):
        (folder / f"{i}.txt").write_text("a" * (MOST_BYTES // 2))
    with pytest.raises(InputError, match="more than 2 MB of text"):
        attached(str(folder))


def test_names_for_new_files(tmp_path: Path) -> None:
    assert free_name(tmp_path, "What is *this*, então?", ".md").name == "What-is-this-então.md"
    assert free_name(tmp_path, "../../etc/passwd", ".md").name == "etc-passwd.md"
    assert free_name(tmp_path, "???", ".md").name == "conversation.md"
    (tmp_path / "a.md").touch()
    (tmp_path / "a-2.md").touch()
    assert free_name(tmp_path, "a", ".md").name == "a-3.md"
    with pytest.raises(InputError, match="exists"):
        write_new(tmp_path / "a.md", "x")
    with pytest.raises(DiskError, match="cannot be written"):
        write_new(tmp_path / "no" / "folder.md", "x")
