"""Digests tell content from content, whatever its name, place and time."""

import hashlib
import json
import os

import pytest

from edgesched.data.digests import content_digest, json_text, settings_of, text_digest
from edgesched.generation.scores import SampleScore


def test_a_texts_digest_is_the_beginning_of_its_sha256():
    for text in ("", "a red circle", "É, 日本"):
        assert text_digest(text) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_json_of_a_value_does_not_depend_on_the_order_of_its_keys():
    assert json_text({"b": 1, "a": [2, None]}) == json_text({"a": [2, None], "b": 1})
    assert json.loads(json_text({"ä": "日本"})) == {"ä": "日本"}


def filled(folder, **files):
    for name, text in files.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_a_folder_is_its_names_and_bytes_and_not_its_place_or_time(tmp_path):
    one = filled(tmp_path / "one", unet__weights="abc", config="x")
    two = filled(tmp_path / "two", config="x", unet__weights="abc")
    digest = content_digest(one)
    assert content_digest(two) == digest
    os.utime(two / "config", ns=(1, 1))
    assert content_digest(two) == digest
    assert content_digest(filled(tmp_path / "renamed", unet__weight="abc", config="x")) != digest
    assert content_digest(filled(tmp_path / "moved", weights="abc", config="x")) != digest
    assert content_digest(filled(tmp_path / "more", unet__weights="abc", config="x", extra="")) != digest
    os.utime(filled(two, config="y") / "config", ns=(2, 2))
    assert content_digest(two) != digest


def test_what_desktops_downloads_and_python_leave_in_a_folder_does_not_count(tmp_path):
    folder = filled(tmp_path / "model", weights="abc")
    digest = content_digest(folder)
    litter = {".DS_Store": "x", ".cache__huggingface__download": "now", "code__.hidden": "x"}
    filled(folder, **litter)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__/code.pyc").write_text("x")
    assert content_digest(folder) == digest
    hidden = filled(tmp_path, **{".scores.csv": "1"}) / ".scores.csv"
    before = content_digest(hidden)
    hidden.write_text("two")
    assert content_digest(hidden) != before  # a file that is named counts, hidden or not


def test_links_lead_to_content_once_and_broken_ones_are_an_error(tmp_path):
    real = filled(tmp_path / "blobs", weights="abc")
    folder = filled(tmp_path / "snapshot", config="x")
    (folder / "weights").symlink_to(real / "weights")
    digest = content_digest(folder)
    assert digest == content_digest(filled(tmp_path / "copied", config="x", weights="abc"))
    (folder / "again").symlink_to(folder, target_is_directory=True)
    assert content_digest(folder) == digest
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="No such file"):
        content_digest(folder)
    with pytest.raises(OSError, match="No such file"):
        content_digest(tmp_path / "nothing")


def test_a_components_settings_are_its_class_arguments_and_the_content_of_its_folder(tmp_path):
    class Score(SampleScore):
        def __init__(self, path, *, factor=1.0):
            super().__init__()
            self.path, self.factor = path, factor

    folder = filled(tmp_path / "judge", weights="abc")
    told = settings_of(Score(str(folder), factor=2.0))
    assert told["class"].endswith("Score")
    assert told["factor"] == 2.0
    assert told["path"] == str(folder)
    assert told["content"] == content_digest(folder)
    assert "content" not in settings_of(Score("hub/judge"))
    assert json.loads(json.dumps(told)) == told
