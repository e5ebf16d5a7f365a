"""The drawn world: captions say what is drawn, and a wrong caption differs in exactly one attribute."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgesched.errors import PromptError
from edgesched.micro import world
from edgesched.micro.build import MAX_TOKENS, SPECIAL, build_tokenizer

TOKENIZER = build_tokenizer()
categories = st.sampled_from(world.CATEGORIES)
seeds = st.integers(0, 10_000)


@given(categories, seeds)
def test_caption_uses_only_known_words_and_fits_the_token_limit(category, seed):
    text = world.caption(world.sample_scene(category, np.random.default_rng(seed)))
    assert set(text.split()) <= set(world.vocabulary())
    ids = TOKENIZER(text).input_ids
    assert len(ids) <= MAX_TOKENS
    assert SPECIAL["<unknown>"] not in ids


@given(categories, seeds)
def test_mutate_changes_one_attribute_and_the_caption(category, seed):
    rng = np.random.default_rng(seed)
    scene = world.sample_scene(category, rng)
    for attribute in world.attributes(scene):
        wrong = world.mutate(scene, attribute, rng)
        assert world.caption(wrong) != world.caption(scene)
        fields = [
            (a, b)
            for one, two in zip(scene.things, wrong.things, strict=True)
            for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(two), strict=True)
        ]
        fields += [(scene.relation, wrong.relation), (scene.background, wrong.background)]
        assert sum(a != b for a, b in fields) == 1


def test_mutate_refuses_an_attribute_that_is_not_stated():
    scene = world.Scene("Basic", (world.Thing("circle", "red"),))
    with pytest.raises(PromptError, match="count"):
        world.mutate(scene, "count", np.random.default_rng(0))


@given(categories, seeds)
def test_render_is_an_image_and_repeats_with_its_seed(category, seed):
    scene = world.sample_scene(category, np.random.default_rng(seed))
    first = world.render(scene, np.random.default_rng(seed))
    again = world.render(scene, np.random.default_rng(seed))
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert (first == again).all()


@pytest.mark.parametrize("colour", world.COLOURS)
@pytest.mark.parametrize("shape", world.SHAPES)
def test_render_shows_the_colour_asked_for(colour, shape):
    scene = world.Scene("Detail", (world.Thing(shape, colour, texture="plain", size="large"),), background="gray")
    image = world.render(scene, np.random.default_rng(0)).astype(int)
    near = np.abs(image - np.array(world.COLOURS[colour])).max(-1) <= 2
    assert 0.1 < near.mean() < 0.7


def test_counted_objects_are_all_drawn():
    for count in (1, 2, 3):
        things = (world.Thing("square", "red", count=count), world.Thing("square", "blue", count=1))
        scene = world.Scene("Complex", things, "above")
        image = world.render(scene, np.random.default_rng(3)).astype(int)
        red = np.abs(image - np.array(world.COLOURS["red"])).max(-1) <= 2
        starts = np.diff(np.concatenate([[0], red[:32].any(0).astype(int)])) == 1
        assert starts.sum() == count
        assert not red[33:].any()


def test_prompt_set_is_distinct_nested_and_refuses_too_many():
    longer, shorter = world.prompt_set(40, seed=3), world.prompt_set(25, seed=3)
    assert len(set(longer.texts)) == len(longer) == 160
    assert longer.per_category(25) == shorter
    with pytest.raises(PromptError, match="only 216"):
        world.prompt_set(217, categories=("Basic",))


def test_sample_scene_refuses_an_unknown_category():
    with pytest.raises(PromptError, match="Fancy"):
        world.sample_scene("Fancy", np.random.default_rng(0))
