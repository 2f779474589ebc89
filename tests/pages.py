"""HTML pages as a parser sees them, and texts that must not become part of one."""

from __future__ import annotations

from html.parser import HTMLParser

DESKTOP, PHONE = (1280, 800), (390, 844)  # pixels
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"' onmouseover='alert(1)",
    "</style></title></i><base href=//x>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;<!--",
    "\x00\x1b]0;\x07",
    "\u202eevil\u2066",
    "\ud800",
]


class Reader(HTMLParser):
    """What a page holds: tags, attributes, texts, headings, table rows, addresses, and the tokens of completions."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.texts = set(), set(), []
        self.completions, self.opened, self.rows, self._stack = [], [], [], []
        self.headings, self.addresses = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.attributes |= set(attrs)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if tag == "details":
            self.opened.append("open" in attrs)
        if tag == "div" and attrs.get("class") == "text":
            self.completions.append([])
        self.addresses += [value for name, value in attrs.items() if name in ("href", "src", "srcset")]
        if tag == "h2":
            self.headings.append("")
        if tag not in ("meta", "br", "img", "source"):
            self._stack.append((tag, attrs))

    def handle_endtag(self, tag):
        assert self._stack.pop()[0] == tag, "tags are well nested"

    def handle_data(self, data):
        self.texts.append(data)
        if self._stack and self._stack[-1][0] == "h2":
            self.headings[-1] += data
        if any(tag == "td" for tag, _ in self._stack):
            self.rows[-1][-1] += data
        if self._stack and self._stack[-1][0] == "i" and any(a.get("class") == "text" for _, a in self._stack):
            self.completions[-1].append((data, self._stack[-1][1]))

    @property
    def text(self):
        return " ".join("".join(self.texts).split())

    @property
    def token_lists(self):
        return [completion for completion in self.completions if completion]
