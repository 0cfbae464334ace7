"""Pages escape what they show and ask the network for nothing."""

import re
from html.parser import HTMLParser

import pytest

from sapwood.report import Figure, Page, Section, Stat, Table, plots, render
from sapwood.report.page import Chapter

HOSTILE = "<script>alert('&')</script>"
VOID = {"meta", "path", "circle", "line", "rect", "use"}


class Outline(HTMLParser):
    """Collects tags, checks that they nest, and joins the text."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def drawing() -> str:
    with plots.style():
        figure, (left, right) = plots.panels(2)
        left.plot([0, 1], [1, 2], color=plots.SERIES[0], label="a")
        left.set(title="A title", ylim=(0.5, 1.5))  # clipped, so that a clip path is needed
        left.legend()
        right.bar([0], [1], color=plots.SERIES[1])
        return plots.svg(figure, 'x < y & "z"')


@pytest.fixture(name="page", scope="module")
def full_page() -> Page:
    table = Table([HOSTILE, "b"], [[HOSTILE, "2"]], caption=HOSTILE)
    section = Section(HOSTILE, [HOSTILE], [Figure(drawing(), HOSTILE), table])
    chapter = Chapter(HOSTILE, HOSTILE, [section, section])
    return Page(HOSTILE, HOSTILE, HOSTILE, [Stat(HOSTILE, HOSTILE)], [chapter], [(HOSTILE, "1")])


def test_every_text_is_escaped_and_shown(page: Page) -> None:
    document = render(page)
    outline = Outline(document)
    assert "<script" not in document
    assert outline.open == []
    # title, brand, h1, subtitle, stat x2, fact, chapter x2; heading, text and three captions twice
    assert outline.text.count(HOSTILE) == 21
    assert outline.tags.count("svg") == 3
    assert outline.tags.count("table") == 2


def test_page_refers_to_nothing_outside(page: Page) -> None:
    document = render(page)
    assert "://" not in document
    assert "@import" not in document
    assert not re.search(r"url\((?!#)", document)
    names = dict(Outline(document).attributes)
    assert "src" not in names
    assert all(value and value.startswith("#") for name, value in names.items() if name == "href")
    assert "default-src 'none'" in document


def test_missing_field_is_an_error_not_a_gap() -> None:
    with pytest.raises(Exception, match="title"):
        render(object())  # type: ignore[arg-type]


def test_prose_and_broken_lines_in_tables() -> None:
    figures = Table(["a", "b"], [["x", "1\n2"]])
    prose = Table(["a", "b"], [["x", "words"]], prose=True)
    chapter = Chapter("c", "l", [Section("s", [], [figures, prose])])
    document = render(Page("t", "h", "s", chapters=[chapter]))
    assert document.count('<table class="prose">') == 1
    assert "<td>1\n2</td>" in document
    assert "td { white-space: pre-line; }" in document


@pytest.mark.parametrize("count", [1, 2])
def test_one_chapter_has_no_number(count: int) -> None:
    chapters = [Chapter("title", "lead", [])] * count
    assert ("Chapter 1" in render(Page("t", "h", "s", chapters=chapters))) == (count > 1)


def test_svg_takes_the_page_colours() -> None:
    svg = drawing()
    for variable in ("--ink", "--muted", "--line", "--series-0", "--series-1"):
        assert f"var({variable})" in svg
    assert not re.search(r"#0[1-8]0[1-8]0[1-8]", svg)
    assert "font-family" not in svg
    assert 'aria-label="x &lt; y &amp; &quot;z&quot;"' in svg


def test_svg_is_reproducible_and_its_names_are_its_own() -> None:
    first = drawing()
    assert drawing() == first
    with plots.style():
        figure, _ = plots.panels(1)
        other = plots.svg(figure, "another")
    names = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (first, other)]
    assert not names[0] & names[1]
    used = set(re.findall(r"url\(#([^)]+)\)", first)) | set(re.findall(r'href="#([^"]+)"', first))
    assert used
    assert used <= names[0]


def test_style_leaves_matplotlib_as_it_was() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    drawing()
    assert dict(matplotlib.rcParams) == before
