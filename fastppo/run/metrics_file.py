"""metrics.csv: a full disk loses no row while the run lives, a kill loses at most one, and a half-written row is ignored.

Knows nothing of what the metrics mean, except which may have no value in a row.
"""

import contextlib
import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastppo.run.files import replace_file
from fastppo.run.metrics import may_be_empty

END = b"\r\n"  # of a row


class MetricsFile:
    """Rows of metrics in a CSV file, unbuffered.

    The columns are those of the first row, and of the rows before a resume. A name that comes later gets a new column, which is
    empty in the rows before.
    """

    def __init__(self, path: Path, resume_at: int | None = None) -> None:
        """resume_at: the iteration that the run resumes from; later rows are dropped."""
        self._path = path
        self._kept = [] if resume_at is None else [row for row in read_rows(path) if int(row["iteration"]) <= resume_at]
        self._columns: list[str] | None = None
        self._replaced = False  # the old file stays until the new one holds as much
        self._file: io.FileIO | None = None
        self._unwritten = b""

    @property
    def last_kept(self) -> Mapping[str, str] | None:
        """The last row before the iteration that the run resumes from."""
        return self._kept[-1] if self._kept else None

    def write(self, row: dict[str, Any]) -> None:
        """Append one row. Raises OSError if the disk is full; the row is then written before the next one."""
        if self._columns is None:
            self._columns = list(row | (self._kept[0] if self._kept else {}))
            head = io.StringIO()
            csv.writer(head).writerow(self._columns)
            self._unwritten = head.getvalue().encode() + b"".join(map(self._line, self._kept))
        later = [name for name in row if name not in self._columns]
        if later:
            self._add_columns(later)
        self._unwritten += self._line(row)
        self._flush()

    def close(self) -> None:
        """Write the remaining rows and close the file. Raises OSError if the disk is still full."""
        try:
            self._flush()
        finally:
            if self._file is not None:
                self._file.close()

    def _add_columns(self, names: list[str]) -> None:
        """Add columns at the end, empty in all rows so far. The file is written anew. Raises OSError."""
        assert self._columns is not None
        head, *lines = ((self._path.read_bytes() if self._replaced else b"") + self._unwritten).split(END)
        more = io.StringIO()
        csv.writer(more, lineterminator="").writerow(names)
        empty = b"," * len(names)
        lines = [line + empty for line in lines if line]
        self._unwritten = END.join([head + b"," + more.getvalue().encode(), *lines, b""])
        self._columns += names
        if self._file is not None:
            self._file.close()
        self._file, self._replaced = None, False

    def _flush(self) -> None:
        if not self._unwritten:
            return
        if not self._replaced:
            replace_file(self._path, self._unwritten)  # opened after that: Windows cannot rename an open file
            self._unwritten, self._replaced = b"", True
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def _line(self, row: Mapping[str, Any]) -> bytes:
        line = io.StringIO()
        csv.writer(line).writerow([row.get(column, "") for column in self._columns or ()])
        return line.getvalue().encode()


def read_rows(path: Path) -> list[dict[str, str]]:
    """The complete rows, oldest first: with an iteration, a step, and a value in every column that has one in each row.

    [] if there is no such file.
    """
    rows = []
    with contextlib.suppress(OSError, csv.Error):
        text = path.read_bytes().decode("utf-8", "replace")
        whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last row
        for row in csv.DictReader(io.StringIO(whole, newline="")):
            if (
                all(value or may_be_empty(name) for name, value in row.items() if name is not None)
                and None not in row
                and None not in row.values()
                and all(re.fullmatch(r"[0-9]{1,18}", row.get(key) or "") for key in ("iteration", "global_step"))
            ):
                rows.append(row)
    return rows
