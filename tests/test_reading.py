"""Text files with columns: fields stay text and fit their header, and what is wrong is named by its line."""

import gzip

import pytest

from edgesched.data import prompts
from edgesched.data.reading import read_records
from edgesched.data.table import ScoreTable
from edgesched.errors import PromptError, RequestError, ScoreTableError
from edgesched.streams.arrivals import trace


def read(file, content, **options):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_records(file, error=PromptError, **options)


def test_fields_are_text_and_places_are_lines_of_the_file(tmp_path):
    content = '\ufefftext,n\r\n"a\r\nb, ""c""",NA\r\n\r\n   \r\n007,None,\r\n'
    found = read(tmp_path / "a.csv", content)
    assert found.columns == {"text": ['a\r\nb, "c"', "007"], "n": ["NA", "None"]}
    assert found.places == ["line 2", "line 6"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("\n \n", "the file is empty"),
        ("a,b\n", "there is a header and no record"),
        ("a,a\n1,2\n", "line 1: the header names the column 'a' twice"),
        (",a\n0,1\n", "line 1: column 1 of the header has no name"),
        ("a,b\n1,2,3\n", "line 2: 3 fields, the header has 2"),
        ("a,b\n1,2,,\n", "line 2: 4 fields, the header has 2"),
        ('a,b\n"x\ny",2\n1\n', "line 4: 1 fields, the header has 2"),
        ("a,b,\n1,2,3\n", "line 2: 3 fields, the header has 2"),
        ('a,b\n1,2\n"never,closed\n3,4\n', "line 3: a quote is opened and never closed"),
        ('a,b\n"x \\"y\\" z",2\n', "line 2: text after a closing quote"),
        (b"a,b\n1,2\n\xe9,3\n", "line 3: byte 0xe9 is not UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        (b"a,b\n1,\0\n", "line 2: a zero byte"),
    ],
)
def test_what_breaks_the_form_is_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(PromptError, match=message) as caught:
        read(tmp_path / "a.csv", content)
    assert "\n" not in str(caught.value)


def test_numbers_whole_numbers_booleans_and_names(tmp_path):
    found = read(tmp_path / "a.csv", "x,k,b,n\n 1.5,4,True, NA\n-2e3,4.0,0,x\n.5,9007199254740993,FALSE,y\n")
    assert found.numbers("x") == [1.5, -2000.0, 0.5]
    assert found.integers("k") == [4, 4, 9_007_199_254_740_993]
    assert found.booleans("b") == [True, False, False]
    assert found.names("n") == ["NA", "x", "y"]


@pytest.mark.parametrize("value", ["", "nan", "inf", "-Infinity", "1e999", "1_000", '"1,5"', "0x10", "many", "None"])
def test_what_is_no_finite_number_is_refused_with_line_and_column(tmp_path, value):
    with pytest.raises(PromptError, match="line 3: x is"):
        read(tmp_path / "a.csv", f"x,y\n1,2\n{value},2\n").numbers("x")


@pytest.mark.parametrize("value", ["4.9", "1e30", "9223372036854775808", "True"])
def test_what_is_no_whole_number_is_refused(tmp_path, value):
    with pytest.raises(PromptError, match="line 2: k is"):
        read(tmp_path / "a.csv", f"k\n{value}\n").integers("k")


@pytest.mark.parametrize("value", ["yes", "2", "1.0", ""])
def test_what_is_neither_true_nor_false_is_refused(tmp_path, value):
    with pytest.raises(PromptError, match="line 2: b is"):
        read(tmp_path / "a.csv", f"b,c\n{value},1\n").booleans("b")


def test_a_column_takes_the_place_of_one_of_its_new_name(tmp_path):
    found = read(tmp_path / "a.csv", "old,new\n1,2\n", rename={"old": "new"})
    assert found.columns == {"new": ["1"]}
    swapped = read(tmp_path / "a.csv", "a,b\n1,2\n", rename={"a": "b", "b": "a"})
    assert swapped.columns == {"b": ["1"], "a": ["2"]}
    with pytest.raises(PromptError, match="two columns are to be named 'x'"):
        read(tmp_path / "a.csv", "a,b\n1,2\n", rename={"a": "x", "b": "x"})
    with pytest.raises(PromptError, match="column 'x' is missing"):
        read(tmp_path / "a.csv", "a,b\n1,2\n", needed=("a",), rename={"a": "c", "x": "d"})


def test_packed_files_are_read_and_broken_ones_refused(tmp_path):
    packed = gzip.compress(b"a,b\n1,2\n")
    assert read(tmp_path / "a.csv.gz", packed).columns == {"a": ["1"], "b": ["2"]}
    for broken in (packed[:-9], b"a,b\n1,2\n"):
        with pytest.raises(PromptError, match="cannot be read"):
            read(tmp_path / "b.csv.gz", broken)


def parts(folder, *contents, done=True):
    folder.mkdir()
    for number, content in enumerate(contents):
        (folder / f"part-{number:05d}-1f2e-c000.csv").write_text(content)
        (folder / f".part-{number:05d}-1f2e-c000.csv.crc").write_bytes(b"crc")
    if done:
        (folder / "_SUCCESS").touch()
    return folder


def test_a_folder_of_parts_is_read_in_the_order_of_its_parts(tmp_path):
    folder = parts(tmp_path / "p.csv", "text,category\na,X\n", "", "text,category\nb,Y\nc,X\n")
    assert prompts.csv(folder).texts == ("a", "b", "c")
    streamed = parts(tmp_path / "t.csv", "t\n1\n", "t\n4\n")
    assert trace(streamed, ["a"], tasks=None, time_column="t", length_column=None).arrival_s.tolist() == [[0, 3]]
    head = "prompt_id,category,model,clip_score,latency_s\n"
    table = parts(tmp_path / "s.csv", *(head + "".join(f"{k}-{p},X,m,30,1\n" for p in range(12)) for k in range(2)))
    assert len(ScoreTable.from_csv(table)) == 24


def test_a_folder_that_is_no_whole_set_of_parts_is_refused_by_name(tmp_path):
    good = "text,category\na,X\n"
    with pytest.raises(PromptError, match=r"half\.csv: a folder of parts without _SUCCESS"):
        prompts.csv(parts(tmp_path / "half.csv", good, done=False))
    with pytest.raises(PromptError, match=r"part-00001-1f2e-c000\.csv: its header differs"):
        prompts.csv(parts(tmp_path / "other.csv", good, "b,Y\nc,Z\n"))
    with pytest.raises(PromptError, match=r"part-00001-1f2e-c000\.csv: line 3: 3 fields"):
        prompts.csv(parts(tmp_path / "wide.csv", good, "text,category\nb,Y\nc,d,Z\n"))
    columnar = parts(tmp_path / "t.parquet")
    (columnar / "part-00000-1f2e.snappy.parquet").write_bytes(b"PAR1")
    with pytest.raises(RequestError, match=r"t\.parquet: a folder with 'part-00000-1f2e\.snappy\.parquet' in it"):
        trace(columnar, ["a"])
    with pytest.raises(ScoreTableError, match=r"t\.parquet"):
        ScoreTable.from_csv(columnar)
    with pytest.raises(ScoreTableError, match=r"t\.parquet"):
        ScoreTable.load(columnar)
    (tmp_path / "empty.csv").mkdir()
    with pytest.raises(PromptError, match="a folder without parts"):
        prompts.csv(tmp_path / "empty.csv")
    (parts(tmp_path / "by.csv", good) / "category=X").mkdir()
    with pytest.raises(PromptError, match="'category=X' in it"):
        prompts.csv(tmp_path / "by.csv")
