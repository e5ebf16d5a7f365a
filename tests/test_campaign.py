"""A campaign keeps what is done, goes on after any stop, and says in one line why it cannot."""

import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from composing import run_task
from tiny import save_tiny

from edgesched.data.table import KEY, ScoreTable
from edgesched.errors import CampaignError, PromptError
from edgesched.generation.campaign import UnfinishedError, run_campaign
from edgesched.generation.diffusion import DiffusionModel, image_seed
from edgesched.generation.jobs import Generation, Job
from edgesched.generation.scores import CLIPScore, Colourfulness, SampleScore
from edgesched.generation.shards import CampaignFolder
from edgesched.micro.world import prompt_set
from edgesched.types import PromptSet

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = prompt_set(2, seed=5)
JUDGE = "package:micro/weights/judge"


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

    def check(self):
        """Always there."""

    def truncates(self, text):
        """Long prompts are cut."""
        return len(text) > 60


class Meter(SampleScore):
    """Scores an image by its mean level."""

    path = "meter"

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
    assert table.scores == ("clip_score",)
    assert ScoreTable.load(tmp_path, min_prompts=1).digest() == table.digest()


def test_a_model_is_used_by_one_thread_only(tmp_path):
    seen = set()

    class Watched(Painter):
        def generate(self, texts, steps, seeds):
            seen.add(threading.get_ident())
            return super().generate(texts, steps, seeds)

        def truncates(self, text):
            seen.add(threading.get_ident())  # a fast tokenizer keeps its padding as state: no two threads may share it
            return super().truncates(text)

    campaign(tmp_path, Watched())
    assert len(seen) == 1


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


def test_a_full_disk_is_said_and_what_is_done_is_kept(tmp_path, monkeypatch):
    real, left = os.fsync, [4]

    def full(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CampaignError, match=r"cannot be written \(No space left on device\); what is done is kept"):
        campaign(tmp_path, Painter())
    assert len(list((tmp_path / "shards").glob("*.parquet"))) == 3
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.setattr(os, "fsync", real)
    assert len(campaign(tmp_path, Painter())) == 32


def test_long_prompts_are_flagged_in_the_table(tmp_path):
    table = campaign(tmp_path, Painter())
    long = {pid: len(text) > 60 for pid, text in zip(PROMPTS.ids, PROMPTS.texts, strict=True)}
    assert 0 < sum(long.values()) < len(long)
    assert (table.frame["truncated"] == table.frame["prompt_id"].map(long)).all()
    assert table.manifest["truncated_prompts"] == sum(long.values())


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "PixArtSigmaPipeline"])
def test_pipelines_of_the_hub_run_from_a_folder_with_several_scores(tmp_path, kind):
    folder = save_tiny(kind, tmp_path / kind)
    model = DiffusionModel(str(folder), resolution=32, guidance_scale=3.0, steps=[1, 2], channels_last=True)
    scorers = {"clip_score": CLIPScore(JUDGE), "colourfulness": Colourfulness()}
    table = run_campaign(PROMPTS, {"tiny": model}, scorers, steps=[1, 2, 3], seeds=2, out=tmp_path / "out",
                         batch_size=5, timing_repeats=1, progress=False)  # fmt: skip
    assert type(model.pipeline).__name__ == kind
    assert table.steps == (1, 2)
    assert table.scores == ("clip_score", "colourfulness")
    assert len(table) == 8 * 2 * 2
    assert table.frame[["clip_score", "colourfulness"]].std().min() > 0
    assert not table.frame["truncated"].any()
    # Prompts encoded once give the images of the pipeline's own call.
    seeds = [image_seed(text, 0) for text in PROMPTS.texts[:2]]
    mine = model.generate(PROMPTS.texts[:2], 2, seeds).astype(int)
    model.pipeline.scheduler = model._fresh_scheduler()
    extra = {"use_resolution_binning": False, "clean_caption": False} if "PixArt" in kind else {}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    theirs = model.pipeline(list(PROMPTS.texts[:2]), num_inference_steps=2, guidance_scale=3.0, height=32, width=32,
                            generator=generators, output_type="np", **extra).images  # fmt: skip
    assert np.abs(mine - (theirs * 255).round()).max() <= 1


class Wordy(Painter):
    """Images of a level that is the length of the text; a folder, where it has one, is its content."""

    def generate(self, texts, steps, seeds):
        """Grey images of a level set by the text."""
        self.made += len(texts)
        return np.stack([np.full((8, 8, 3), len(text), np.uint8) for text in texts])


class Scaled(Meter):
    """Mean level times a factor."""

    def __init__(self, path="meter", *, factor=1.0):
        super().__init__()
        self.path, self.factor = path, factor

    def score(self, images, texts):
        """Mean level, scaled."""
        return super().score(images, texts) * self.factor


class Other(Scaled):
    """The same arguments, another class."""


def prompts_of(*texts, categories=("easy", "hard")):
    return PromptSet(["1", "2"], texts, categories)


def worded(out, prompts, model=None, scorer=None, name="wordy", **options):
    settings = {"steps": [2], "seeds": 1, "batch_size": 2, "timing_repeats": 1, "progress": False} | options
    model = model or Wordy()
    return run_campaign(prompts, {name: model}, {"level": scorer or Meter()}, out=out, **settings), model


def facts(table, *columns):
    return table.frame[list(columns)].values.tolist()


@pytest.fixture
def untimed(monkeypatch):
    """No image is made for the timing pass: whatever is made, is made for the table."""
    monkeypatch.setattr(Painter, "seconds_per_image", lambda self, steps, batch, repeats: 0.1 * steps)


def test_another_text_under_the_same_id_is_made_anew_and_the_old_one_is_gone(tmp_path, untimed, caplog):
    worded(tmp_path, prompts_of("a", "bb"))
    table, model = worded(tmp_path, prompts_of("a", "four"))
    assert model.made == 1
    assert facts(table, "prompt_id", "level") == [["1", 1.0], ["2", 4.0]]
    assert "1 images of other prompts, or of other texts" in caplog.text
    back, model = worded(tmp_path, prompts_of("a", "bb"))
    assert model.made == 0
    assert facts(back, "prompt_id", "level") == [["1", 1.0], ["2", 2.0]]


def test_another_category_alone_makes_no_image_and_is_the_tables(tmp_path, untimed):
    first, _ = worded(tmp_path, prompts_of("a", "bb"))
    table, model = worded(tmp_path, prompts_of("a", "bb", categories=("easy", "harder")))
    assert model.made == 0
    assert facts(table, "prompt_id", "category", "level") == [["1", "easy", 1.0], ["2", "harder", 2.0]]
    assert table.manifest["prompts_sha256"] != first.manifest["prompts_sha256"]


def test_a_score_of_other_arguments_class_or_content_is_refused(tmp_path, untimed):
    judge = tmp_path / "judge"
    judge.mkdir()
    (judge / "weights").write_text("one")
    out, prompts = tmp_path / "out", prompts_of("a", "bb")
    worded(out, prompts, scorer=Scaled(str(judge)))
    refusal = r"was begun with another {} of level \(.*, now .*\); choose another campaign.out$"
    with pytest.raises(CampaignError, match=refusal.format("factor")):
        worded(out, prompts, scorer=Scaled(str(judge), factor=2.0))
    with pytest.raises(CampaignError, match=refusal.format("class")):
        worded(out, prompts, scorer=Other(str(judge)))
    (judge / "weights").write_text("two, under the same path")
    with pytest.raises(CampaignError, match=refusal.format("content")):
        worded(out, prompts, scorer=Scaled(str(judge)))
    with pytest.raises(CampaignError, match=r"was begun with other scores \(level, now mine\)"):
        run_campaign(prompts, {"wordy": Wordy()}, {"mine": Meter()}, steps=[2], seeds=1, out=out, progress=False)


def test_other_content_in_the_models_folder_is_refused(tmp_path, untimed):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "unet").write_text("one")
    worded(tmp_path / "out", prompts_of("a", "bb"), Wordy(str(folder)))
    (folder / ".DS_Store").write_text("what a desktop leaves is no weight")
    _, model = worded(tmp_path / "out", prompts_of("a", "bb"), Wordy(str(folder)))
    assert model.made == 0
    (folder / "unet").write_text("two")
    with pytest.raises(CampaignError, match="another content of wordy"):
        worded(tmp_path / "out", prompts_of("a", "bb"), Wordy(str(folder)))
    (folder / "unet").unlink()
    (folder / "unet").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CampaignError, match=r"^wordy: .*unet cannot be read \(No such file or directory\)$"):
        worded(tmp_path / "out", prompts_of("a", "bb"), Wordy(str(folder)))


def test_models_and_steps_added_later_stand_beside_those_before(tmp_path, untimed):
    prompts = prompts_of("a", "bb")
    worded(tmp_path, prompts, name="first")
    worded(tmp_path, prompts, name="second", steps=[2, 4])
    table, _ = worded(tmp_path, prompts, name="first", steps=[8])
    assert table.models == ("first", "second")
    cells = {("first", 2), ("first", 8), ("second", 2), ("second", 4)}
    assert set(map(tuple, facts(table, "model", "steps"))) == cells
    assert {(r["model"], r["steps"]) for r in table.manifest["timing"]} == cells
    assert table.frame["latency_s"].to_numpy() == pytest.approx(0.1 * table.frame["steps"].to_numpy())
    assert list(table.manifest["models"]) == ["first", "second"]


def test_a_start_that_makes_no_image_binds_nothing(tmp_path):
    wrong = Painter(most=0)
    wrong.guidance_scale = 99.0
    with pytest.raises(UnfinishedError, match="nothing is complete") as refused:
        campaign(tmp_path, wrong)
    assert refused.value.table is None
    assert len(campaign(tmp_path, Painter())) == 32


class Picky(Painter):
    """Refuses two steps, in the words of its pipeline."""

    def generate(self, texts, steps, seeds):
        """Grey images, at other step counts."""
        if steps == 2:
            raise ValueError("operands could not\nbe broadcast")
        return super().generate(texts, steps, seeds)


def test_a_refused_step_count_is_named_at_the_end_and_stops_nothing_else(tmp_path):
    models = {"picky": Picky(), "painter": Painter("other")}
    options = {"steps": [1, 2, 4], "seeds": 2, "batch_size": 3, "timing_repeats": 1, "progress": False}
    told = r"^campaign: not made: picky at 2 steps: ValueError: operands could not \(the other 80 images are in .*\)$"
    with pytest.raises(UnfinishedError, match=told) as refused:
        run_campaign(PROMPTS, models, {"clip_score": Meter()}, out=tmp_path, **options)
    table = ScoreTable.load(tmp_path, min_prompts=1)
    assert refused.value.table.digest() == table.digest()
    cells = table.frame.groupby(["model", "steps"]).size().to_dict()
    assert cells == {("picky", 1): 16, ("picky", 4): 16, ("painter", 1): 16, ("painter", 2): 16, ("painter", 4): 16}


def test_a_time_that_could_not_be_had_once_is_tried_again(tmp_path, monkeypatch):
    real = Painter.seconds_per_image

    def broken(self, steps, batch, repeats):
        if steps == 4:
            raise RuntimeError("the device was busy")
        return real(self, steps, batch, repeats)

    monkeypatch.setattr(Painter, "seconds_per_image", broken)
    with pytest.raises(UnfinishedError, match="painter at 4 steps: timing: RuntimeError: the device was busy"):
        campaign(tmp_path, Painter())
    monkeypatch.setattr(Painter, "seconds_per_image", real)
    assert campaign(tmp_path, Painter()).steps == (1, 4)


def test_settings_of_starts_beside_each_other_are_never_mixed(tmp_path):
    class Disturbed(Painter):
        def generate(self, texts, steps, seeds):
            rows = {"prompt_id": ["x"], "text_digest": ["0"], "model": ["painter"], "steps": [1], "seed": [0],
                    "clip_score": [0.0], "truncated": [False]}  # fmt: skip
            kept = CampaignFolder(tmp_path).read()
            if kept.frame is not None:
                other = kept.models["painter"][0] | {"guidance_scale": 9.0}
                CampaignFolder(tmp_path).write(rows, other, kept.scores[0])
            return super().generate(texts, steps, seeds)

    with pytest.raises(CampaignError, match="another guidance_scale of painter"):
        campaign(tmp_path, Disturbed())
    assert not (tmp_path / "scores.parquet").exists()


def test_a_disk_that_does_not_answer_costs_no_shard(tmp_path, monkeypatch):
    campaign(tmp_path, Painter())
    before = shards(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", lambda self: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
        with pytest.raises(CampaignError, match=r"parquet: cannot be read \(I/O error\)"):
            campaign(tmp_path, Painter())
    assert shards(tmp_path) == before
    again = Painter()
    campaign(tmp_path, again)
    assert again.made == 0


@pytest.mark.parametrize(("scores", "told"), [(np.nan, "finite scores, got nan"), (None, "each of 3 images, got 0")])
def test_a_score_that_is_no_number_is_refused_before_it_is_kept(tmp_path, scores, told):
    class Broken(Meter):
        def score(self, images, texts):
            return torch.full((len(images),), scores) if scores is not None else torch.empty(0)

    with pytest.raises(CampaignError, match=f"^score level of wordy at 1 steps: expected .*{told}$"):
        run_campaign(PROMPTS, {"wordy": Wordy()}, {"level": Broken()}, steps=[1], seeds=1, batch_size=3,
                     out=tmp_path, progress=False)  # fmt: skip
    assert shards(tmp_path) == 0


def test_images_of_an_older_version_are_not_mixed_in(tmp_path, caplog):
    (tmp_path / "shards").mkdir()
    old = {"prompt_id": PROMPTS.ids, "model": "painter", "steps": 1, "seed": 0, "clip_score": -1.0, "truncated": False}
    pd.DataFrame(old).to_parquet(tmp_path / "shards" / "0123456789abcdef0123.parquet")
    (tmp_path / "settings.json").write_text(
        '{"models": {"painter": {"path": "painter"}}, "scores": {"clip_score": {}}}'
    )
    (tmp_path / "timing.json").write_text('[{"model": "painter", "steps": 1, "batch_size": 3, "latency_s": 99.0}]')
    table = campaign(tmp_path, Painter())
    assert f"{len(PROMPTS)} images do not say what text and settings made them, and are not used" in caplog.text
    assert table.frame["clip_score"].min() >= 0
    assert table.frame["latency_s"].max() < 99
    assert len(table) == 32


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", [2.5]), ("steps", [4.0]), ("steps", ["4"]), ("steps", [True]), ("steps", 4.5), ("steps", "14"),
        ("seeds", 1.5), ("seeds", True), ("seeds", None), ("batch_size", 2.0), ("timing_repeats", "3"),
        ("num_nodes", 0), ("num_nodes", 1.0), ("devices", 2.7), ("devices", 0), ("devices", True), ("devices", "-1"),
        ("devices", "two"), ("devices", [0, 1]), ("accelerator", "quantum"), ("strategy", "divide"),
    ],
)  # fmt: skip
def test_a_number_that_is_no_positive_whole_one_is_refused_by_its_key(tmp_path, key, value):
    with pytest.raises(CampaignError, match=rf"^campaign.*{key}[^\n]*$"):
        campaign(tmp_path, Painter(), **{key: value})
    assert not (tmp_path / "scores.parquet").exists()


@pytest.mark.parametrize("count", [0, -1])
def test_no_prompts_of_a_category_are_refused_by_the_key(tmp_path, count):
    with pytest.raises(PromptError, match=rf"^prompts_per_category: expected a positive whole number, got {count}$"):
        run_task(tmp_path, "+experiment=campaign", f"campaign.prompts_per_category={count}")


@pytest.mark.parametrize("processes", [2, 8])
def test_processes_beyond_the_last_job_take_part_with_nothing(tmp_path, processes):
    job = Job("wordy", 2, ((0, 0), (1, 0)))
    prompts = prompts_of("a", "bb")
    dealt = []
    for rank in range(processes):
        generation = Generation(prompts, {"wordy": Wordy()}, {}, [job], CampaignFolder(tmp_path), ({}, {}))
        generation._trainer = SimpleNamespace(
            world_size=processes, global_rank=rank, strategy=SimpleNamespace(global_rank=rank)
        )
        dealt.append([int(number) for number in generation.predict_dataloader()])
        if rank:
            assert generation.predict_step(dealt[-1][0]) == 0
    assert dealt == [[0]] + [[-1]] * (processes - 1)


def test_one_job_left_for_two_processes_is_made(tmp_path):
    whole = campaign(tmp_path, Painter())
    sorted((tmp_path / "shards").glob("*.parquet"))[0].unlink()
    again = campaign(tmp_path, Painter(), accelerator="cpu", devices=2)
    columns = ["prompt_id", "model", "steps", "seed", "clip_score"]
    pd.testing.assert_frame_equal(again.frame[columns], whole.frame[columns])


# --- stops from outside, and several processes, with the real micro pipeline ------------------------------


def real_campaign(out, **options):
    """A small campaign with a shipped pipeline and the judge."""
    model = DiffusionModel("package:micro/weights/micro_small", resolution=64, guidance_scale=2.0)
    settings = {"steps": [1, 2, 3], "seeds": 2, "batch_size": 4, "timing_repeats": 1, "progress": False} | options
    return run_campaign(prompt_set(5, seed=3), {"small": model}, {"clip_score": CLIPScore(JUDGE)}, out=out, **settings)


def _child(out):
    torch.set_num_threads(1)
    try:
        real_campaign(out)
    except KeyboardInterrupt:
        os._exit(130)


@pytest.fixture(scope="module")
def forks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["edgesched.generation.campaign", "edgesched.generation.scores", "diffusers", "transformers"]
    )
    return context


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, forks):
    out = tmp_path_factory.mktemp("undisturbed")
    child = forks.Process(target=_child, args=(out,))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    return ScoreTable.load(out, min_prompts=1)


def assert_same(table, other, atol=1e-3):
    pd.testing.assert_frame_equal(table.frame[list(KEY)], other.frame[list(KEY)])
    assert np.abs(table.frame["clip_score"] - other.frame["clip_score"]).max() <= atol


def shards(out: Path) -> int:
    return len(list((out / "shards").glob("*.parquet")))


def started(forks, out, new_shards, patience=60.0):
    """A campaign in another process that has written so many more shards."""
    before, child = shards(out), forks.Process(target=_child, args=(out,))
    child.start()
    limit = time.monotonic() + patience
    while child.is_alive() and shards(out) < before + new_shards and time.monotonic() < limit:
        time.sleep(0.002)
    return child


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.timeout(300)
def test_killed_twenty_times_it_ends_with_the_table_of_an_undisturbed_run(tmp_path, forks, undisturbed):
    rng = np.random.default_rng(0)
    kills = 0
    while kills < 20:
        child = started(forks, tmp_path, int(rng.integers(0, 3)))
        time.sleep(float(rng.uniform(0, 0.1)))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, "the campaign ended before it was killed"
        kills += 1
    assert 0 < shards(tmp_path) < 30
    _finish(tmp_path, forks)
    assert_same(ScoreTable.load(tmp_path, min_prompts=1), undisturbed)


def _finish(out, forks):
    last = forks.Process(target=_child, args=(out,))
    last.start()
    last.join(120)
    assert last.exitcode == 0


@pytest.mark.weights
def test_ctrl_c_ends_cleanly_and_the_same_call_goes_on(tmp_path, forks, undisturbed):
    child = started(forks, tmp_path, 2)
    os.kill(child.pid, signal.SIGINT)
    child.join(60)
    assert child.exitcode == 130
    assert shards(tmp_path) >= 2
    assert not list(tmp_path.rglob("*.part"))
    _finish(tmp_path, forks)
    assert_same(ScoreTable.load(tmp_path, min_prompts=1), undisturbed)


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.timeout(300)
def test_two_processes_make_what_one_makes(tmp_path, undisturbed):
    table = real_campaign(tmp_path, accelerator="cpu", devices=2)
    assert shards(tmp_path) == 30
    assert_same(table, undisturbed)


def _beside(out, name, counts):
    """One of several starts in one folder; exit code 0 if its table has all it was asked for."""
    torch.set_num_threads(1)
    table, _ = worded(out, PROMPTS, name=name, steps=counts, seeds=3)
    os._exit(0 if set(counts) <= set(table.frame.loc[table.frame["model"] == name, "steps"]) else 3)


def test_starts_at_once_in_one_folder_lose_nothing(tmp_path, forks):
    work = [("first", [1, 2]), ("second", [1, 2]), ("first", [2, 4])]
    children = [forks.Process(target=_beside, args=(tmp_path, name, counts)) for name, counts in work[:2]]
    for child in children:
        child.start()
    while shards(tmp_path) == 0 and any(child.is_alive() for child in children):
        time.sleep(0.01)
    worded(tmp_path, PROMPTS, name=work[2][0], steps=work[2][1], seeds=3)
    for child in children:
        child.join(100)
    assert [child.exitcode for child in children] == [0, 0]
    table = ScoreTable.load(tmp_path, score="level", min_prompts=1)
    cells = {(name, k) for name, counts in work for k in counts}
    assert table.frame.groupby(["model", "steps"]).size().to_dict() == dict.fromkeys(cells, 3 * len(PROMPTS))
    assert {(r["model"], r["steps"]) for r in table.manifest["timing"]} == cells
    lengths = dict(zip(PROMPTS.ids, map(len, PROMPTS.texts), strict=True))
    assert (table.frame["level"] == table.frame["prompt_id"].map(lengths)).all()
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.weights
def test_the_command_ends_with_1_and_one_line_for_what_it_could_not_make(tmp_path):
    command = [
        sys.executable, str(ROOT / "scripts/run.py"), "+experiment=campaign", "model=[micro_small]", "logger.mode=disabled",
        "campaign.seeds=1", "campaign.timing_repeats=1", "campaign.progress=false", "campaign.prompts_per_category=1",
        "campaign.steps=[2,5]", "model.micro_small.scheduler=PNDMScheduler", f"campaign.out={tmp_path / 'out'}",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(
        r"^error: campaign: not made: micro_small at 2 steps: .* \(the other \d+ images", done.stderr, re.M
    )
    assert ScoreTable.load(tmp_path / "out", min_prompts=1).steps == (5,)
    assert (tmp_path / "run/metrics.json").exists()


class Refusing(Painter):
    """Fails in whatever process it runs."""

    def generate(self, texts, steps, seeds):
        """Never makes an image."""
        raise CampaignError("painter: out of paint")


@pytest.mark.slow
def test_an_error_in_one_of_several_processes_is_told_in_one_line(tmp_path):
    with pytest.raises(CampaignError, match="^painter: out of paint$"):
        campaign(tmp_path, Refusing(), accelerator="cpu", devices=2)
