"""Reports: written once in Markdown, published as Markdown, PNG and one HTML file that needs no network."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Template
from markdown_it import MarkdownIt
from markdown_it.token import Token

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report", "markdown_table", "write_json"]

MOST_CARDS = 24  # rows of a table that a narrow page shows as cards
_NUMBER = re.compile(r"[-+−]?[\d,]*\.?\d+")
_NOTHING = {"", "-", "–", "failed"}


class Report:
    """A report that grows by headings, paragraphs, tables and figures, in the order of the calls.

    Args:
        title: Heading of the page.
        lead: First paragraph, in Markdown.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self._parts: list[str | _Folded] = [f"# {title}"]
        self._figures: dict[str, Figure] = {}
        self.text(lead)

    def heading(self, text: str, level: int = 2) -> None:
        """Open a section; the title of the page is level 1."""
        self._parts.append(f"{'#' * level} {text}")

    def text(self, markdown: str) -> None:
        """Add a paragraph, or any other Markdown."""
        if markdown:
            self._parts.append(markdown)

    def table(self, rows: Sequence[Sequence[str]], caption: str = "") -> None:
        """Add a table, the header first, with a line of explanation under it."""
        self._parts.append(markdown_table(rows))
        self.text(caption)

    def folded(self, summary: str, rows: Sequence[Sequence[str]], caption: str = "") -> None:
        """Add a table that a click on the summary opens: long ones that few read."""
        self._parts.append(_Folded(summary, "\n\n".join(filter(None, [markdown_table(rows), caption]))))

    def figure(self, figure: "Figure", name: str, caption: str) -> None:
        """Add a matplotlib figure, written to ``<name>.png``; the caption is also what a screen reader says.

        Raises:
            ValueError: If the report has a figure of that name.
        """
        if name in self._figures:
            raise ValueError(f"The report already has a figure {name!r}. Give each figure a name of its own.")
        self._figures[name] = figure
        self._parts += [f"![{_plain(caption)}]({name}.png)", caption]

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Add a list of names and values: command, versions, device."""
        self._parts.append("\n".join(f"- {name}: `{value}`" for name, value in facts.items()))

    def markdown(self) -> str:
        """Return the report; its figures are files beside it."""
        return "\n\n".join(map(str, self._parts)) + "\n"

    def write(self, folder: str | Path) -> list[Path]:
        """Write report.md, report.html and the figures; return their paths in this order."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {}
        for name, figure in self._figures.items():
            file = folder / f"{name}.png"
            figure.savefig(file, dpi=150)
            pictures[file.name] = file
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")
        (folder / "report.html").write_text(self._html(pictures), encoding="utf-8")
        return [folder / "report.md", folder / "report.html", *pictures.values()]

    def _html(self, pictures: Mapping[str, Path]) -> str:
        body = "\n".join(
            f"<details><summary>{escape(part.summary)}</summary>\n{_render(part.markdown)}</details>\n"
            if isinstance(part, _Folded)
            else _render(part)
            for part in self._parts
        )
        for name, file in pictures.items():
            data = base64.b64encode(file.read_bytes()).decode()
            width = round(96 * self._figures[file.stem].get_size_inches()[0])  # a CSS pixel is 1/96 of an inch
            broad = ' class="broad"' if width > 700 else ""
            body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{data}" width="{width}"{broad}')
        return _PAGE.render(title=self.title, body=body)


class _Folded(NamedTuple):
    """Markdown behind a summary."""

    summary: str
    markdown: str

    def __str__(self) -> str:
        return f"<details><summary>{escape(self.summary)}</summary>\n\n{self.markdown}\n\n</details>"


def _render(markdown: str) -> str:
    """Return HTML in which every cell knows its column's name: a narrow page shows a row as a card of them.

    Tables of more than MOST_CARDS rows scroll sideways there instead, with their first column held.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    names: list[str] = []
    for i, token in enumerate(tokens):
        if token.type == "table_open":
            names, column = [], 0
            rows = sum(later.type == "tr_open" for later in tokens[i : _end_of_table(tokens, i)]) - 1
            token.attrSet("class", "cards" if rows <= MOST_CARDS else "long")
        elif token.type == "th_open":
            names.append(tokens[i + 1].content)
        elif token.type == "tr_open":
            column = 0
        elif token.type == "td_open":
            token.attrSet("data-name", names[column])
            column += 1
    body = parser.renderer.render(tokens, parser.options, {})
    return body.replace("<table", '<div class="wide"><table').replace("</table>", "</table></div>")


def _end_of_table(tokens: Sequence[Token], start: int) -> int:
    return next(i for i in range(start, len(tokens)) if tokens[i].type == "table_close")


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the header first, as a table in Markdown; columns of numbers are set to the right.

    Raises:
        ValueError: If a row has not as many cells as the header.
    """
    if odd := [row for row in rows if len(row) != len(rows[0])]:
        raise ValueError(f"The header has {len(rows[0])} cells, but this row {len(odd[0])}: {list(odd[0])}.")
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    columns = list(zip(*cells, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [len(rows) > 1 and all(_is_number(cell) for cell in column[1:]) for column in columns]
    lines = []
    for row in cells:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        lines.append("| " + " | ".join(padded) + " |")
    rule = ("-" * (w + 1) + ":" if r else "-" * (w + 2) for w, r in zip(widths, right, strict=True))
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def write_json(path: Path, value: Any) -> Path:
    """Write numbers for programs to read, null for NaN and infinity, which JSON has not; return the path."""
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None)
    path.write_text(json.dumps(plain, indent=1) + "\n")
    return path


def _is_number(cell: str) -> bool:
    return cell.strip() in _NOTHING or bool(_NUMBER.match(cell.strip()))


def _plain(markdown: str) -> str:
    return re.sub(r"[\[\]`*]", "", markdown)


_PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title|e }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --link: light-dark(#0550ae, #79b8ff); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2rem; }
h1, h2, h3, p, li { overflow-wrap: anywhere; }
p, li { max-width: 48rem; }
p:has(> img) { max-width: none; overflow-x: auto; }
code { background: var(--soft); border-radius: 3px; padding: 0 .25em; font-size: .9em; }
img { max-width: 100%; height: auto; background: #fff; }
img.broad { max-width: max(100%, 45rem); } /* of several panels: on a phone it scrolls, still legible */
.wide { overflow-x: auto; }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: left; white-space: nowrap; }
tbody tr:hover { background: var(--soft); }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--link); }
th button::after { content: " \\2195"; opacity: .35; }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
@media (max-width: 40rem) {
  /* A row is a card: its first cell the heading, the others behind it, each with its column's name. */
  .cards, .cards tbody, .cards tr, .cards td { display: block; }
  .cards thead { display: none; }
  .cards tr { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; padding: .3rem .6rem; }
  .cards td { border: 0; padding: .1rem 0; white-space: normal; overflow-wrap: anywhere; text-align: left !important; }
  .cards td:first-child { font-weight: 600; }
  .cards td:not(:first-child) { display: inline; }
  .cards td:not(:first-child)::before { content: attr(data-name) ": "; opacity: .7; }
  .cards td:not(:first-child):not(:last-child)::after { content: " \\00b7  "; opacity: .5; }
  .cards td:empty { display: none; }
  /* What is too long for that scrolls, says so, and keeps its first column in sight. */
  .wide:has(.long)::before, p:has(> img.broad)::before {
    content: "scroll sideways \\2192"; font-size: .85em; opacity: .7; position: sticky; left: 0; display: block;
  }
  .long th:first-child, .long td:first-child { position: sticky; left: 0; background: Canvas; }
}
</style>
</head>
<body>
{{ body }}
<script>
// A click on a header sorts by that column: numbers by their first number, everything else as text.
const first = text => parseFloat(text.replace(/,/g, "").replace("−", "-"));
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (!body || body.rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const text = row => row.cells[i].textContent.trim();
      const rows = [...body.rows];
      const numbers = rows.some(row => !isNaN(first(text(row))));
      const order = (a, b) => {
        if (!numbers) return (down ? -1 : 1) * text(a).localeCompare(text(b), "en", {numeric: true});
        const [x, y] = [first(text(a)), first(text(b))];
        if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
        return down ? y - x : x - y;
      };
      body.append(...rows.sort(order));
    });
  });
}
</script>
</body>
</html>
"""
)
