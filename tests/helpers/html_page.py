"""Reading a page as a browser would: its text, tables and what it would load."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Parses a whole page and fails where tags do not match.

    Attributes:
        tables: Rows of cells' texts, one list a table.
        links: Every address that the page could load or lead to.
        tags: Every tag's name.
        text: All text outside of `<style>`.
        best: Texts of cells that are marked as best.
    """

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, html):
        super().__init__()
        self.tables, self.links, self.tags, self.text, self.best = [], [], [], "", []
        self._open = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.links += [attributes[name] for name in ("src", "href", "srcset", "action", "data") if name in attributes]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in self.VOID:
            self._open.append((tag, "best" in attributes.get("class", "").split()))

    def handle_endtag(self, tag):
        opened, best = self._open.pop()
        assert opened == tag
        if best:
            self.best.append(self.tables[-1][-1][-1])

    def handle_data(self, data):
        tags = [tag for tag, _ in self._open]
        if "style" in tags:
            assert "url(" not in data
            assert "@import" not in data
            return
        self.text += data
        if "td" in tags or "th" in tags:
            self.tables[-1][-1][-1] += data
