"""A campaign keeps what is done, goes on after any stop, and says in one line why it cannot."""

import os

import numpy as np
import pandas as pd
import pytest
import torch

from edgesched.campaign import run_campaign
from edgesched.errors import CampaignError
from edgesched.generate import DiffusionModel
from edgesched.micro.world import prompt_set

PROMPTS = prompt_set(2, seed=5)


class Painter(DiffusionModel):
    """Images that depend on the seed alone; counts its work, and fails when told to."""

    def __init__(self, path="painter", *, fail_after=None, most=None, steps=None):
        super().__init__(path, steps=steps)
        self.made, self.fail_after, self.most = 0, fail_after, most

    def generate(self, texts, steps, seeds):
        """Grey images of a level set by the seed."""
        if self.most is not None and len(texts) > self.most:
            raise torch.OutOfMemoryError("too many")
        if self.fail_after is not None and self.made >= self.fail_after:
            raise KeyboardInterrupt
        self.made += len(texts)
        return np.stack([np.full((8, 8, 3), s % 256, np.uint8) for s in seeds])


class Meter:
    """Scores an image by its mean level."""

    path, revision, truncated = "meter", None, frozenset()

    def score(self, images, texts):
        """Mean level."""
        return torch.tensor(images.reshape(len(images), -1).mean(1)).float()


def campaign(out, model, **options):
    settings = {"steps": [1, 4], "seeds": 2, "batch_size": 3, "timing_repeats": 1, "progress": False} | options
    return run_campaign(PROMPTS, {"painter": model}, {"clip_score": Meter()}, out=out, **settings)


def test_a_campaign_has_every_key_once_and_a_manifest(tmp_path):
    table = campaign(tmp_path, Painter())
    assert len(table) == 8 * 2 * 2
    for key in ("device", "dtype", "libraries", "models", "prompts_sha256", "scores", "date", "timing"):
        assert table.manifest[key], key
    assert {(r["steps"], r["batch_size"]) for r in table.manifest["timing"]} == {(1, 1), (1, 3), (4, 1), (4, 3)}
    assert (tmp_path / "scores.parquet").exists()


def test_what_is_done_is_never_done_again(tmp_path):
    first = campaign(tmp_path, Painter())
    again = Painter()
    second = campaign(tmp_path, again)
    assert again.made == 0
    assert second.digest() == first.digest()
    more = Painter()
    longer = campaign(tmp_path, more, seeds=3)
    timed = 2 * 2 * (1 + 3)
    assert len(longer) == 48
    assert more.made <= 16 + timed


def test_stopped_anywhere_it_ends_with_the_same_table(tmp_path):
    whole = campaign(tmp_path / "whole", Painter())
    for stop in (1, 7, 13, 20, 31):
        out = tmp_path / f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            campaign(out, Painter(fail_after=stop))
        ended = campaign(out, Painter())
        columns = ["prompt_id", "model", "steps", "seed", "clip_score"]
        pd.testing.assert_frame_equal(ended.frame[columns], whole.frame[columns])


def test_a_torn_shard_is_made_again(tmp_path):
    whole = campaign(tmp_path, Painter())
    shard = sorted((tmp_path / "shards").glob("*.parquet"))[0]
    shard.write_bytes(shard.read_bytes()[:40])
    again = campaign(tmp_path, Painter())
    assert set(map(tuple, again.frame[["prompt_id", "steps", "seed"]].values)) == set(
        map(tuple, whole.frame[["prompt_id", "steps", "seed"]].values)
    )


def test_out_of_memory_halves_the_batch_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(Painter, "seconds_per_image", lambda *_: 0.1)
    table = campaign(tmp_path / "a", Painter(most=2), batch_size=8)
    assert len(table) == 32
    with pytest.raises(CampaignError, match="out of memory on a single image"):
        campaign(tmp_path / "b", Painter(most=0))


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    campaign(tmp_path, Painter())
    other = Painter()
    other.guidance_scale = 9.0
    with pytest.raises(CampaignError, match=r"another guidance_scale of painter \(5.0, now 9.0\)"):
        campaign(tmp_path, other)


def test_models_skip_step_counts_they_may_not_run(tmp_path):
    table = campaign(tmp_path, Painter(steps=[4]))
    assert table.steps == (4,)
    with pytest.raises(CampaignError, match="no model may run"):
        campaign(tmp_path / "x", Painter(steps=[7]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_said(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CampaignError, match="cannot be written"):
        campaign(tmp_path / "x", Painter())


def test_a_file_in_place_of_the_folder_is_said(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(CampaignError, match="cannot be written"):
        campaign(tmp_path / "x", Painter())


@pytest.mark.parametrize("options", [{"seeds": 0}, {"batch_size": 0}, {"steps": []}, {"steps": [0, 1]}])
def test_bad_sizes_are_refused(tmp_path, options):
    with pytest.raises(CampaignError, match="expected positive"):
        campaign(tmp_path, Painter(), **options)
