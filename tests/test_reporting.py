"""Reports: Markdown tables, and one HTML file that carries its pictures and asks for nothing."""

import base64
import re
from html.parser import HTMLParser

import matplotlib
import pytest

from normplug.reporting import Report, markdown_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Page(HTMLParser):
    """The cells of the tables, and the address of everything that a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.loads, self._in_cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self._in_cell = tag in ("td", "th")

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1][-1] += data.strip()


@pytest.fixture
def report():
    report = Report("BN & <GN>", "Both at `2` per batch.")
    report.table([["norm", "AP"], ["BN | trained", "14.8 ± 2.3"], ["<b>GN</b>", "-"]], "Three seeds.")
    figure, ax = plt.subplots()
    ax.plot([0, 1])
    report.figure(figure, "curves", "The `loss`")
    report.facts({"torch": "2.15"})
    yield report
    plt.close(figure)


def test_the_page_carries_everything(report, tmp_path):
    markdown, html, picture = report.write(tmp_path / "new" / "folder")
    text = html.read_text()
    page = Page(text)
    [source] = page.loads
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == picture.read_bytes()
    assert not re.search(r"https?://|@import|url\(", text)
    assert page.rows == [["norm", "AP"], ["BN | trained", "14.8 ± 2.3"], ["<b>GN</b>", "-"]]
    assert "<title>BN &amp; &lt;GN&gt;</title>" in text
    assert "![The loss](curves.png)" in markdown.read_text()


def test_numbers_are_set_to_the_right():
    text = markdown_table([["norm", "AP", "loss"], ["BN", "1,234.5 ± 2", "−1"], ["GN", "failed", "nan?"]])
    assert text.splitlines() == [
        "| norm |          AP | loss |",
        "|------|------------:|------|",
        "| BN   | 1,234.5 ± 2 | −1   |",
        "| GN   |      failed | nan? |",
    ]


def test_what_cannot_be_a_report(report):
    with pytest.raises(ValueError, match=r"header has 2 cells, but this row 1: \['x'\]"):
        markdown_table([["a", "b"], ["x"]])
    with pytest.raises(ValueError, match="already has a figure 'curves'"):
        report.figure(None, "curves", "again")


def test_a_narrow_page_shows_every_cell_with_the_name_of_its_column(tmp_path):
    """As a card where the table is short; a long one scrolls and says so. Nobody looks for what is off the screen."""
    report = Report("Cards")
    report.table([["metric", "verdict"], ["AP", "B is better"]])
    report.table([["layer", "dead"], *([str(i), "0"] for i in range(30))])
    report.folded("All <layers>", [["layer", "scale"], ["bn1", "1.0"]], "In %.")
    text = report.write(tmp_path)[1].read_text()
    assert '<td data-name="metric">AP</td>\n<td data-name="verdict">B is better</td>' in text
    assert re.findall(r'<table class="(\w+)"', text) == ["cards", "long", "cards"]
    assert re.search(r"<details><summary>All &lt;layers&gt;</summary>\s*<div.*scale.*</details>", text, re.DOTALL)
    assert "scroll sideways" in text
    assert "<details><summary>All &lt;layers&gt;</summary>\n\n| layer | scale |" in report.markdown()
