"""Tables can be read from any row on, and the rows made of them do not depend on where reading began."""

import itertools
import json
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.commands.rows import choose_columns, read_rows
from data_pipeline.commands.tables import open_table
from tests.support.pack_inputs import RECORDS, write_pictures, write_table


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "embedded", "folder", "dataset"])
def test_reading_from_any_row_on(kind, tmp_path):
    table = open_table(write_table(kind, write_pictures(tmp_path / "input")))
    columns = choose_columns(table, "", [], "", "label")
    everything = list(table.read(0, columns.names))
    assert len(table) == len(everything) == len(RECORDS)
    for start in range(len(RECORDS) + 1):
        assert list(table.read(start, columns.names)) == everything[start:]
    for (record, cause), expected in zip(everything, RECORDS, strict=True):
        assert cause == ""
        assert (record["label"] if kind != "csv" else int(record["label"])) == expected["label"]


@pytest.mark.parametrize(("name", "delimiter"), [("t.tsv", "\t"), ("t.csv", ",")])
@pytest.mark.parametrize("rest", ["", 'e.png|"whole"\n', 'e.png|the 6" one\n'])
def test_an_unbalanced_quote_swallows_nothing(name, delimiter, rest, tmp_path):
    """In a CSV the row is skipped with its cause; in a TSV the quote is a letter."""
    good = 'image|caption\na.png|"two\nlines"\nb.png|"with ""quotes"""\n\nc.png|a 5" disk\n'
    table = f'{good}d.png|"The Night" by Vincent\n{rest}'
    (tmp_path / name).write_text(good.replace("|", delimiter))
    captions = [record["caption"] for record, _ in open_table(tmp_path / name).read()]
    assert captions == ["two\nlines", 'with "quotes"', 'a 5" disk']
    for opened in (table, table.replace('Night" by', "Night by")):
        (tmp_path / name).write_text(opened.replace("|", delimiter))
        records = list(open_table(tmp_path / name).read())
        assert len(records) == 4 + bool(rest)
        record, cause = records[3]
        if delimiter == "\t":
            caption = "The Night by Vincent" if opened != table else 'The Night" by Vincent'
            assert (record, cause) == ({"image": "d.png", "caption": f'"{caption}'}, "")
        else:
            assert "line 7 has an unbalanced quote" in cause
        assert all(cause == "" for _, cause in records[4:])


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_row_groups_larger_and_smaller_than_a_batch(rows, tmp_path):
    parquet.write_table(arrow.table({"number": list(range(300))}), tmp_path / "t.parquet", row_group_size=rows)
    table = open_table(tmp_path / "t.parquet")
    for start in (0, 1, 62, 64, 65, 150, 299, 300):
        assert [record["number"] for record, _ in table.read(start, ["number"])] == list(range(start, 300))


RECORD = st.fixed_dictionaries(
    {"image": st.sampled_from(["a.png", "b.png", "", None]), "caption": st.sampled_from(["x", "y", "", None])},
    optional={"name": st.sampled_from(["k", "l", "m"])},
)


@given(st.lists(RECORD | st.just("no object"), min_size=1, max_size=12), st.booleans())
def test_rows_are_the_same_wherever_reading_began(tmp_path_factory, records, with_key):
    path = Path(tmp_path_factory.getbasetemp(), "t.jsonl")
    first = {"image": "first.png", "caption": "first", "name": "first"}
    path.write_text("\n".join(map(json.dumps, [first, *records])))
    table = open_table(path)
    columns = choose_columns(table, "", [], "name" if with_key else "", "")
    rows = list(read_rows(table, columns))
    # Records between two rows belong to an image that an earlier row is of.
    assert all(row.start >= before.stop for before, row in itertools.pairwise(rows)) and rows[0].start == 0
    usable = [row for row in rows if not row.cause]
    assert len({row.key for row in usable}) == len(usable)
    for number, row in enumerate(rows):
        assert list(read_rows(table, columns, row.stop)) == rows[number + 1 :]


@pytest.mark.parametrize("flag", ["", "validation"])
def test_parquet_files_named_by_split(flag, tmp_path):
    (tmp_path / "data").mkdir()
    for name, rows in (("train-00000-of-00002", 3), ("train-00001-of-00002", 2), ("test-00000-of-00001", 1)):
        parquet.write_table(arrow.table({"image": ["x"] * rows}), tmp_path / f"data/{name}.parquet")
    assert len(open_table(tmp_path, "train")) == 5
    assert len(open_table(tmp_path, "test")) == 1
    with pytest.raises(ValueError, match="test, train"):
        open_table(tmp_path, flag)
