"""Rows that the tests of this room write, and the templates that they are read by."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.protocol.template import TextTemplate

PROMPT, COMPLETION = TextTemplate("{text}:"), TextTemplate("{label}")
ROWS = [{"text": "in the rain", "label": "yes"}, {"text": "on a mat", "label": "no"}]

BY_DEFAULT = TextTemplate("{prompt}"), TextTemplate("{completion}")
MESSAGES = [
    {"role": "user", "content": "in the rain"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "on a mat"},
    {"role": "assistant", "content": "no"},
]


def write(path: Path, *lines: object) -> LocalData:
    """JSON Lines of these objects; a string stands as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return LocalData.from_jsonl(path)


def workbook(rows: Sequence[Sequence[object]], first: int = 1) -> bytes:
    """A workbook with one sheet of these rows, from the sheet's row `first` on; "" is a cell that is not there."""
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006/relationships"

    def cell(place: str, value: object) -> str:
        match value:
            case bool():
                return f'<c r="{place}" t="b"><v>{int(value)}</v></c>'
            case int() | float():
                return f'<c r="{place}"><v>{value}</v></c>'
        return f'<c r="{place}" t="inlineStr"><is><t>{value}</t></is></c>' if value != "" else ""

    written = "".join(
        f'<row r="{at}">{"".join(cell(f"{chr(65 + column)}{at}", value) for column, value in enumerate(row))}</row>'
        for at, row in enumerate(rows, start=first)
    )
    sheets = '<sheets><sheet name="rows" sheetId="1" r:id="r1"/></sheets>'
    files = {
        "_rels/.rels": ("officeDocument", "xl/workbook.xml"),
        "xl/_rels/workbook.xml.rels": ("worksheet", "worksheets/sheet1.xml"),
    }
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as book:
        for name, (kind, target) in files.items():
            relation = f'<Relationship Id="r1" Type="{office}/{kind}" Target="{target}"/>'
            book.writestr(name, f'<Relationships xmlns="{package}">{relation}</Relationships>')
        book.writestr("xl/workbook.xml", f'<workbook xmlns="{main}" xmlns:r="{office}">{sheets}</workbook>')
        book.writestr(
            "xl/worksheets/sheet1.xml", f'<worksheet xmlns="{main}"><sheetData>{written}</sheetData></worksheet>'
        )
    return sink.getvalue()
