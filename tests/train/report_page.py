"""Pages of the report, taken apart."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from nckernels.train.report.load import find, load_all
from nckernels.train.report.page import make_page
from nckernels.train.report.rows import Row, group

from .made_up import write

VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """The headings, the tables and the text of a page; a tag that is not closed is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[str] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "div" and ("role", "region") in attrs:
            self.rows = self.tables.setdefault(dict(attrs)["aria-label"] or "", [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        data = data.replace("\N{NO-BREAK SPACE}", " ")
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if "h2" in self.open:
            self.headings[-1] += data
        if not {"style", "svg"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def column(self, table: str, heading: str) -> dict[str, str]:
        head, *lines = self.tables[table]
        return {line[0]: line[head.index(heading)] for line in lines}


def report(tmp_path: Path, *contents: dict[str, Any], **arguments: Any) -> Page:
    for i, content in enumerate(contents):
        write(tmp_path / f"run-{i:03}", content)
    records, problems = load_all(find([tmp_path]).histories)
    assert not problems
    return Page(make_page(records, **arguments))


def rows_of(tmp_path: Path, *contents: dict[str, Any]) -> tuple[Row, ...]:
    for i, content in enumerate(contents):
        write(tmp_path / f"run-{i:03}", content)
    (data,) = group(load_all(find([tmp_path]).histories)[0])
    return data.rows
