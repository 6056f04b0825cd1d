"""Files of rows: JSON lines, JSON, CSV and Parquet, also compressed, as a list or a pattern.

bondlm reads JSON lines itself, strictly, and names every bad line.
"""

import bz2
import glob
import gzip
import json
import lzma
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from bondlm.data.paths import expanded
from bondlm.data.rows import Line, RowCheck, check_columns, good_rows, has_surrogate, kind_of, warn_of_media
from bondlm.errors import DataError

LINES = (".jsonl", ".jsonlines", ".json-lines", ".ndjson")
JSON, TABLES = (*LINES, ".json"), (".csv", ".tsv", ".parquet")
_OPENERS: Mapping[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_KNOWN = "Give .jsonl, .json, .csv, .tsv or .parquet; all but the last may be compressed (.gz, .bz2, .xz)."
# Texts that would not survive conversion to a number: 007 is a name, and a float has 15 digits.
_LEADING_ZERO, _ROUNDED, _NO_NUMBER = r"^[+-]?0\d", r"^[+-]?\d{16,}$", "(?i)nan|inf"
# Columns that are text in every file, whatever they look like: an answer 12 is not a number.
_TEXT_COLUMNS = ("prompt", "completion", "chosen", "rejected")


def suffix_of(path: str) -> str:
    """The kind of a file by its name, for any compression."""
    name = Path(path)
    packed = name.suffix.lower() in _OPENERS
    suffix = (Path(name.stem) if packed else name).suffix.lower()
    return "" if packed and suffix == ".parquet" else suffix


def files_of(source: Any) -> list[str] | None:
    """The files named by a path, a pattern or a list of these; None if `source` is something else.

    Raises:
        DataError: no file matches a pattern, a list contains something else or a file twice, or files are of different
            kinds.
    """
    if isinstance(source, str | Path):
        return _matching(expanded(str(source)))
    if not (isinstance(source, list | tuple) and source and all(isinstance(part, str | Path) for part in source)):
        return None
    found: list[str] = []
    for part in source:
        paths = _matching(expanded(str(part)))
        if paths is None and Path(expanded(str(part))).is_dir():
            raise DataError(
                f"{part}: a list cannot contain a folder. Give the folder by itself, or its files as {part}/*.jsonl."
            )
        if paths is None:
            raise DataError(
                f"{part}: no such file. A list of texts names files; prompts themselves are rows such as "
                '{"prompt": "..."}.'
            )
        found += paths
    resolved = [Path(path).resolve() for path in found]
    if len(set(resolved)) < len(resolved):
        twice = next(path for i, path in enumerate(found) if resolved[i] in resolved[:i])
        raise DataError(f"{twice} is named twice: its prompts would count twice")
    if len({suffix_of(path) in JSON for path in found}) > 1:
        raise DataError(f"{', '.join(found[:4])}: JSON files and tables are mixed; give files of one kind")
    return found


def _matching(path: str) -> list[str] | None:
    if Path(path).is_dir():
        return None
    if Path(path).is_file():
        if suffix_of(path) not in (*JSON, *TABLES):
            raise DataError(f"{path}: unknown kind of file. {_KNOWN}")
        return [path]
    if glob.has_magic(path.partition(":")[0]):  # after a colon there may be a slice of a split
        found = sorted(each for each in glob.glob(path, recursive=True) if Path(each).is_file())
        if not found:
            raise DataError(f"{path}: no file matches this pattern")
        return [each for one in found for each in _matching(one) or ()]
    return [path] if suffix_of(path) in (*JSON, *TABLES) else None  # it does not exist, which reading it will report


def rows_of_files(source: Any, text_column: str = "completion") -> list[Line]:
    """The rows of one or several files, all with a usable prompt; a CSV's `text_column` is text whatever it looks like.

    Raises:
        DataError: no file is named, one cannot be read, or rows are bad.
    """
    files = files_of(source)
    if files is None:
        raise DataError(f"{source}: no such file. {_KNOWN} recipes/prepare.py writes one of a hub data set.")
    in_json = suffix_of(files[0]) in JSON
    lines = list(json_rows(files) if in_json else (line for path in files for line in _table_rows(path, text_column)))
    name = ", ".join(files)
    good = [lines[i] for i in good_rows(lines, RowCheck(typed=True), name, None)]
    columns = {key: None for line in good for key in line.row}
    check_columns(columns, name)
    warn_of_media(columns, name)
    return good


def _table_rows(path: str, text_column: str) -> Iterator[Line]:
    table, places, odd = read_table(path, text_column)
    yield from odd
    yield from map(Line, places, table.to_pylist())


def json_rows(paths: Sequence[str]) -> Iterator[Line]:
    """The rows of JSON files, one by one.

    Raises:
        DataError: a file cannot be read.
    """
    for path in paths:
        whole = suffix_of(path) == ".json" and _is_whole(path)
        yield from _json_array(path) if whole else json_lines(path)


def json_lines(path: str) -> Iterator[Line]:
    """One row for each non-blank line, with its place `path:line`, read strictly.

    The file is UTF-8; a byte-order mark is allowed only at its start. Lines end with LF or CRLF. Not accepted: NaN and
    infinities, numbers beyond float64, a key twice in one object, and lone surrogates, which no UTF-8 file can hold.
    """
    for number, line in enumerate(_binary_lines(path), start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip(b" \t\r\n"):
            continue
        place = f"{path}:{number}"
        try:
            yield Line(place, _parse_line(line.rstrip(b"\r\n")))
        except ValueError as error:
            yield Line(place, None, str(error))


def read_table(path: str, text_column: str = "completion") -> tuple[pyarrow.Table, list[str], list[Line]]:
    """A CSV or Parquet file with the places of its rows, and its lines with too few or too many values.

    A CSV's `text_column` is text.

    Raises:
        DataError: it cannot be read, or `check_columns` refuses its columns.
    """
    try:
        is_parquet = suffix_of(path) == ".parquet"
        table, odd = (pyarrow.parquet.read_table(path), []) if is_parquet else _read_csv(path, text_column)
    except (UnicodeDecodeError, OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        if isinstance(error, UnicodeDecodeError | pyarrow.ArrowInvalid) and suffix_of(path) != ".parquet":
            _refuse_other_encoding(path)
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    check_columns(table.column_names, path)
    left_out = {line.place for line in odd}
    places = [f"{path}: row {i}" for i in range(table.num_rows + len(odd))]
    return table, [place for place in places if place not in left_out], odd


def _refuse_other_encoding(path: str) -> None:
    """Name the first line that is not UTF-8, which spreadsheets often do not write; Arrow names columns, or bytes."""
    for number, line in enumerate(_binary_lines(path), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 (byte 0x{line[error.start]:02x}): save it as UTF-8") from error


def _binary_lines(path: str) -> Iterator[bytes]:
    try:
        with _open(path) as file:
            yield from file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}. Check the path.") from error


def _open(path: str) -> IO[bytes]:
    opened: IO[bytes] = _OPENERS.get(Path(path).suffix.lower(), open)(path, "rb")
    return opened


def _is_whole(path: str) -> bool:
    """Whether a .json file holds a single value; many have one object per line."""
    for line in _binary_lines(path):
        if start := line.removeprefix(b"\xef\xbb\xbf").strip(b" \t\r\n"):
            return start.startswith(b"[") or (start.startswith(b"{") and start.endswith((b"{", b"[", b",")))
    return False


def _json_array(path: str) -> Iterator[Line]:
    data = b"".join(_binary_lines(path)).removeprefix(b"\xef\xbb\xbf")
    try:
        rows = _parse(data)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: {_json_problem(error)}") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {kind_of(rows)}, not rows. Give a list of rows, or one row per line.")
    for i, row in enumerate(rows):
        yield Line(f"{path}: row {i}", row)


def _read_csv(path: str, text_column: str) -> tuple[pyarrow.Table, list[Line]]:
    odd: list[Line] = []

    def note(row: Any) -> str:
        text = f"{row.actual_columns} values, but the header names {row.expected_columns}: {row.text:.60}"
        odd.append(Line(f"{path}: row {row.number - 2}", None, text))  # the header is number 1
        return "skip"

    def read(types: Mapping[str, pyarrow.DataType]) -> pyarrow.Table:
        odd.clear()
        with _open(path) as file:
            return pyarrow.csv.read_csv(
                file,
                read_options=pyarrow.csv.ReadOptions(use_threads=False),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter="\t" if suffix_of(path) == ".tsv" else ",",
                    newlines_in_values=True,
                    invalid_row_handler=note,
                ),
                convert_options=pyarrow.csv.ConvertOptions(column_types=types, null_values=[""]),
            )

    types = dict.fromkeys((*_TEXT_COLUMNS, text_column), pyarrow.string())
    table = read(types)
    typed = [each.name for each in table.schema if _loses(each.type) is not None]
    if typed:
        written = read(types | dict.fromkeys(typed, pyarrow.string()))
        columns = zip(table.schema, written.columns, strict=True)
        kept = [each.name for each, texts in columns if _is_changed(texts, _loses(each.type))]
        table = read(types | dict.fromkeys(kept, pyarrow.string())) if kept else table
    for i, each in enumerate(table.schema):
        if pyarrow.types.is_binary(each.type):
            _refuse_other_encoding(path)
        if table.column_names.index(each.name) != i:
            raise DataError(f"{path}: two columns are called {each.name!r}")
    return table, odd


def _loses(kind: pyarrow.DataType) -> str | None:
    """A pattern of texts that would change when converted to this type; None if there are none."""
    if pyarrow.types.is_temporal(kind):
        return ""
    if pyarrow.types.is_integer(kind):
        return _LEADING_ZERO
    return f"{_LEADING_ZERO}|{_ROUNDED}|{_NO_NUMBER}" if pyarrow.types.is_floating(kind) else None


def _is_changed(texts: pyarrow.ChunkedArray, pattern: str | None) -> bool:
    return pattern is not None and bool(
        pyarrow.compute.any(pyarrow.compute.match_substring_regex(texts, pattern)).as_py()
    )


def _parse_line(line: bytes) -> dict[str, Any]:
    """Parse one line to an object, or raise ValueError with the reason."""
    try:
        row = _parse(line)
    except json.JSONDecodeError as error:
        raise ValueError(_json_problem(error)) from error
    if not isinstance(row, dict):
        raise ValueError(f'a row must be an object such as {{"prompt": ...}}, not {kind_of(row)}')
    return row


def _json_problem(error: json.JSONDecodeError) -> str:
    return f"invalid JSON: {error.msg.removesuffix(' at')} (column {error.colno})"


def _parse(data: bytes) -> Any:
    """Strict JSON, or ValueError with the reason."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{data[error.start]:02x} at column {error.start + 1})") from error
    try:
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite_float, object_pairs_hook=_unique_keys
        )
    except RecursionError as error:
        raise ValueError("invalid JSON: nested too deeply") from error
    # Only escapes can bring a surrogate past the UTF-8 decoder.
    if "\\u" in text and isinstance(value, dict) and has_surrogate(value):
        raise ValueError("lone surrogate: half of a character, which UTF-8 cannot hold")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number; use null for a missing value")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"number {text} is too large for float64")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice!r} appears twice")
    return row
