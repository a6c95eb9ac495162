"""Rows of a table with a header line, and what is wrong with them in one line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from ...runtime.errors import UsageError


def read_csv(table: Path, needed: tuple[str, ...], hint: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, columns by lower-case name) of each row that is not blank; `where` is 'captions.csv:3', for messages.

    UsageError for a file that cannot be read as UTF-8 text, or whose first line lacks a needed column (`hint` says
    what it must hold).
    """
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            header = [name.strip().lower() for name in next(reader, [])]
            if not set(needed) <= set(header):
                raise UsageError(f"{table}: the first line must name the columns {hint}")
            for fields in reader:
                if any(field.strip() for field in fields):
                    yield f"{table.name}:{reader.line_num}", dict(zip(header, fields, strict=False))
    except OSError as error:
        raise UsageError(f"cannot read {table}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"cannot read {table}: it is not UTF-8 text") from None
    except csv.Error as error:
        raise UsageError(f"cannot read {table}: {error}") from None
