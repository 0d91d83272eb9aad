"""A report's page, read without a browser: what it shows, what it asks of the network, what a foreign text may do."""

import re
from html.parser import HTMLParser

VOID = {"meta", "br"}

EVIL = '<script>alert("x")</script>&amp;'


class Page(HTMLParser):
    """Reads a page: its words, tables, classes, and whether every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.tables and self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def offline(text: str) -> bool:
    """Return whether a page loads nothing and runs nothing."""
    text = re.sub(r' src="data:image/png;base64,[A-Za-z0-9+/=]*"', "", text)  # a picture in the page itself
    text = re.sub(r' xlink:href="#\w+"|"url\(#\w+\)"', "", text)  # a place in the page itself
    text = re.sub(r' xmlns(:xlink)?="http://www\.w3\.org/(2000/svg|1999/xlink)"', "", text)  # names, which nobody loads
    loads = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}
    page = Page(text)
    return (
        not any(loads & attributes.keys() or any(a.startswith("on") for a in attributes) for _, attributes in page.tags)
        and not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
        and not re.search(r"https?:|url\(|@import|//[a-z]", text)
    )
