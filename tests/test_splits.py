"""Which tiles become val, and the table of splits that a user gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apacs_ray.data.slide_tables import read_mpps, read_splits, read_table_text
from apacs_ray.data.splits import assign_val
from apacs_ray.errors import UsageError


def tiles(slides, images_a_slide=1, tiles_an_image=1):
    return [
        {"slide_id": f"s{slide}", "image": f"s{slide}/i{image}.jpg", "tile_id": f"s{slide}_i{image}_{tile}"}
        for slide in range(slides)
        for image in range(images_a_slide)
        for tile in range(tiles_an_image)
    ]


@given(
    st.integers(0, 7),
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(0.01, 0.99),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_val_is_made_of_whole_units_and_leaves_some(slides, images, parts, fraction, seed, known):
    rows = tiles(slides, images, parts)
    is_val, unit = assign_val(rows, fraction, seed, slides_known=known)
    assert unit == ("slide" if known and slides >= 3 else "image" if slides * images >= 3 else "tile")
    column = {"slide": "slide_id", "image": "image", "tile": "tile_id"}[unit]
    units = {row[column] for row in rows}
    val = {row[column] for row, chosen in zip(rows, is_val, strict=True) if chosen}
    train = {row[column] for row, chosen in zip(rows, is_val, strict=True) if not chosen}
    assert not val & train
    assert val | train == units
    if len(units) >= 2:
        assert val
        assert train
        assert abs(len(val) - fraction * len(units)) <= 1
    else:
        assert not val


@given(st.permutations(tiles(5, 2, 2)), st.integers(0, 100))
def test_the_choice_does_not_depend_on_the_order(shuffled, seed):
    rows = tiles(5, 2, 2)
    chosen, _ = assign_val(rows, 0.4, seed, slides_known=True)
    again, _ = assign_val(shuffled, 0.4, seed, slides_known=True)
    assert {r["tile_id"] for r, v in zip(rows, chosen, strict=True) if v} == {
        r["tile_id"] for r, v in zip(shuffled, again, strict=True) if v
    }


def test_the_seed_decides_and_every_unit_can_be_val():
    rows = tiles(10)
    choices = [tuple(assign_val(rows, 0.2, seed, slides_known=False)[0]) for seed in range(60)]
    assert choices[0] == tuple(assign_val(rows, 0.2, 0, slides_known=False)[0])
    assert all(sum(choice) == 2 for choice in choices)
    assert all(any(choice[unit] for choice in choices) for unit in range(10))


def test_read_splits():
    text = '\ufeffslide_id,split,remark\r\nA,train,"cut\nbadly"\r\n\r\n Zo\u0065\u0308 ,Test,\r\n"B,1",val,x\r\n'
    assert read_splits(text) == {"A": "train", "Zo\u00eb": "test", "B,1": "val"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("A,train\n", "line 1: the header must be slide_id,split"),
        ("slide_id,split\nA,train\nB,training\n", "line 3: split 'training' of slide 'B'"),
        ("slide_id,split\nA\n", "line 2: 1 fields where the header has 2"),
        ("slide_id,split\n ,train\n", "line 2: the slide_id is empty"),
        ("slide_id,split\nA,train\n\nA,test\n", "line 4: slide 'A' is on line 2 already"),
        ('slide_id,split\n"A,train\n', "line 2: unexpected end of data"),
    ],
)
def test_a_wrong_table_is_refused_by_line(text, says):
    with pytest.raises(UsageError, match=r"data\.splits") as caught:
        read_splits(text)
    assert says in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_as_spreadsheets_write_them(tmp_path, encoding, delimiter):
    text = f"slide_id{delimiter}split\r\nZoë 1{delimiter}train\r\n"
    (tmp_path / "splits.csv").write_bytes(text.encode(encoding))
    assert read_splits(read_table_text(str(tmp_path / "splits.csv"))) == {"Zoë 1": "train"}


def test_utf_16_with_either_mark(tmp_path):
    for mark, encoding in (("\ufeff", "utf-16-le"), ("\ufeff", "utf-16-be")):
        (tmp_path / "splits.csv").write_bytes(f"{mark}slide_id,split\nA,val\n".encode(encoding))
        assert read_splits(read_table_text(str(tmp_path / "splits.csv"))) == {"A": "val"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("slide_id,split\nA,train\nZoë,test\n".encode("latin-1"), "byte 0xeb on line 3); save it as CSV UTF-8"),
        (b"\xff\xfes\0l\0i", "save it as CSV UTF-8"),
        (b"PK\x03\x04\xff\xfe", "save it as CSV UTF-8"),  # a spreadsheet itself
    ],
)
def test_a_table_in_another_encoding_is_named(tmp_path, content, says):
    (tmp_path / "splits.csv").write_bytes(content)
    with pytest.raises(UsageError, match=r"splits\.csv: no text in UTF-8 or UTF-16") as caught:
        read_table_text(str(tmp_path / "splits.csv"))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_that_is_not_there(tmp_path):
    for name, says in (("none.csv", "no such text file"), (".", "cannot be read")):
        with pytest.raises(UsageError, match=says):
            read_table_text(f"{tmp_path}/{name}")


def test_read_mpps():
    assert read_mpps(None) == {}
    text = '\ufeffslide_id,mpp\r\nA,0.25\r\n"B,1", 0.5 \r\n'
    assert read_mpps(text) == {"A": 0.25, "B,1": 0.5}
    assert read_mpps("slide_id;mpp\nA;0,25\n") == {"A": 0.25}
    for line, says in (
        ("B,", "'' of slide 'B' is not a number"),
        ("B,-1", "must be positive, not -1"),
        ("A,1", "line 2"),
    ):
        with pytest.raises(UsageError, match=rf"data\.mpps, line 3: .*{says}"):
            read_mpps(f"slide_id,mpp\nA,0.25\n{line}\n")
