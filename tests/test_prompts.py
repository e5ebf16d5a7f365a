"""Prompt sources and their errors."""

import pytest

from edgesched.data import prompts
from edgesched.errors import PromptError
from edgesched.micro.world import prompt_set


def test_parti_maps_challenges_and_leaves_the_others_out(tmp_path):
    rows = ["Prompt\tCategory\tChallenge\tNote", "one\tA\tBasic\t", "two\tA\tFine-grained Detail\t",
            "three\tA\tSimple Detail\t", "four\tA\tImagination\t", "five\tA\tComplex\t", "six\tA\tQuantity\t"]  # fmt: skip
    (tmp_path / "p.tsv").write_text("\n".join(rows))
    found = prompts.parti(tmp_path / "p.tsv")
    assert found.categories == ("Basic", "Detail", "Detail", "Imagination", "Complex")
    assert prompts.parti(tmp_path / "p.tsv", other_challenges=True).categories[-1] == "Quantity"
    assert len(prompts.parti(tmp_path / "p.tsv", per_category=1)) == 4


def test_csv_and_its_errors(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("text,category\na red boat,Sea\na cow,Land\n")
    found = prompts.csv(file)
    assert found.texts == ("a red boat", "a cow")
    assert prompts.csv(file) == found
    file.write_text("prompt,category\na,b\n")
    with pytest.raises(PromptError, match="column 'text' is missing; present: prompt, category"):
        prompts.csv(file)
    assert prompts.csv(file, columns={"prompt": "text"}).texts == ("a",)
    file.write_text("text,category\na,\n")
    with pytest.raises(PromptError, match="line 2: category is empty"):
        prompts.csv(file)
    with pytest.raises(PromptError, match="is no file"):
        prompts.csv(tmp_path / "none.csv")


def test_micro_prompts_have_the_four_categories():
    assert tuple(dict.fromkeys(prompt_set(3).categories)) == prompts.CATEGORIES


def test_parti_comes_from_the_hub_where_no_path_is_given(tmp_path, monkeypatch):
    import huggingface_hub

    def absent(*_, **__):
        raise OSError("no network")

    file = tmp_path / "PartiPrompts.tsv"
    file.write_text("Prompt\tCategory\tChallenge\tNote\na cat\tAnimals\tBasic\t\na red cat\tAnimals\tSimple Detail\t\n")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(file))
    assert prompts.parti().categories == ("Basic", "Detail")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", absent)
    with pytest.raises(PromptError, match=r"cannot be fetched from the hub \(no network\).*prompts.path=<file>"):
        prompts.parti()
