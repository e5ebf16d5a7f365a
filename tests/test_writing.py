"""Results are written whole or not at all, and JSON holds only what JSON has."""

import json
import logging
import math
import os

import numpy as np
import pytest
import torch

from edgesched.data.writing import json_document, left_out, write_bytes, write_json
from edgesched.errors import ArgumentError, OutputError


def strict(text):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_nan_and_infinity_become_null_at_any_depth():
    value = {
        "a": math.nan, "b": [math.inf, (-math.inf, 1.5)], 3: {"c": torch.tensor([1.0, math.nan])},
        "d": np.float32(np.inf), "e": np.array([[1, 2]]), "f": np.int64(7), "g": True, "h": None, "i": "ünï",
    }  # fmt: skip
    expected = {
        "a": None, "b": [None, [None, 1.5]], "3": {"c": [1.0, None]},
        "d": None, "e": [[1, 2]], "f": 7, "g": True, "h": None, "i": "ünï",
    }  # fmt: skip
    assert strict(json_document(value)) == expected


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    file = tmp_path / "metrics.json"
    write_json(file, {"old": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"metrics.json: cannot be written \(No space left on device\)"):
        write_json(file, {"new": 2})
    assert strict(file.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["metrics.json"]
    with pytest.raises(OSError, match="No space"):
        write_bytes(file, b"other")
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_json(tmp_path / "file" / "metrics.json", {})


def test_an_optional_part_that_fails_is_said_and_lets_the_rest_go_on(caplog):
    with caplog.at_level(logging.WARNING), left_out("the check"):
        raise ZeroDivisionError("division\nby zero")
    assert caplog.messages == ["the check: left out (ZeroDivisionError: division)"]
    with pytest.raises(ArgumentError), left_out("the check"):
        raise ArgumentError("repeats: expected at least 1, got 0")
    with pytest.raises(KeyboardInterrupt), left_out("the check"):
        raise KeyboardInterrupt
