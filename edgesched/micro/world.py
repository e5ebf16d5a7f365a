"""A drawn world of captioned 64×64 scenes in the four prompt categories.

- **Basic**: one object by colour, shape and sometimes size ("a small red circle").
- **Detail**: one object with size, texture, colour and background.
- **Imagination**: objects that do not exist: one shape inside another, or one half this and half that.
- **Complex**: two groups of counted objects in a spatial relation.

A :class:`Scene` is a specification; :func:`caption` says it, :func:`render` draws it, :func:`mutate`
changes exactly one attribute of it, which makes the hard negatives that a judge must tell apart.
What a caption leaves open (the background, positions, sizes) is drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from edgesched.data.prompts import CATEGORIES
from edgesched.errors import PromptError
from edgesched.types import PromptSet

ATTRIBUTES = ("colour", "shape", "texture", "count", "size", "relation", "background")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 40),
    "orange": (250, 140, 20),
    "purple": (130, 50, 190),
    "cyan": (60, 205, 225),
    "pink": (250, 150, 200),
    "brown": (125, 75, 40),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (12, 12, 12),
    "gray": (150, 150, 150),
    "beige": (236, 220, 185),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
SOLID_SHAPES = ("circle", "square", "heart", "diamond")
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "large")
COUNTS = ("one", "two", "three")
RELATIONS = ("left of", "right of", "above", "below")
IMAGE_SIZE = 64
_SUPERSAMPLE = 2
_GROUP_RADIUS = {1: (10.0, 12.0), 2: (9.0, 10.5), 3: (8.0, 9.0)}  # pixels, so that three stand apart in a row


@dataclass(frozen=True)
class Thing:
    """One object, or a group of ``count`` equal ones; ``None`` is what the caption leaves unsaid.

    Args:
        shape: One of ``SHAPES``.
        colour: One of ``COLOURS``.
        second_colour: Colour of its other half.
        texture: One of ``TEXTURES``.
        size: One of ``SIZES``.
        count: How many there are, 1 to 3.
    """

    shape: str
    colour: str
    second_colour: str | None = None
    texture: str | None = None
    size: str | None = None
    count: int | None = None


@dataclass(frozen=True)
class Scene:
    """What a caption says: one or two things, how they stand to each other, and the background.

    Args:
        category: One of ``CATEGORIES``.
        things: One thing or two.
        relation: One of ``RELATIONS``, or ``"inside"``; None with one thing.
        background: One of ``BACKGROUNDS``, or None where unsaid.
    """

    category: str
    things: tuple[Thing, ...]
    relation: str | None = None
    background: str | None = None


def _pick(rng: np.random.Generator, options: tuple[str, ...] | dict[str, tuple[int, int, int]], *taken: str) -> str:
    left = [o for o in options if o not in taken]
    return left[int(rng.integers(len(left)))]


def sample_scene(category: str, rng: np.random.Generator) -> Scene:
    """Draw a scene of a category.

    Args:
        category: Its name.
        rng: What it is drawn from.

    Raises:
        PromptError: If the category is not one of :data:`CATEGORIES`.

    Example:
        >>> caption(sample_scene("Basic", np.random.default_rng(0)))
        'a small purple heart'
    """
    shape, colour = _pick(rng, SHAPES), _pick(rng, COLOURS)
    if category == "Basic":
        size = (None, "small", "large")[int(rng.integers(3))]
        return Scene(category, (Thing(shape, colour, size=size),))
    if category == "Detail":
        thing = Thing(shape, colour, texture=_pick(rng, TEXTURES), size=_pick(rng, SIZES))
        return Scene(category, (thing,), background=_pick(rng, BACKGROUNDS))
    if category == "Imagination":
        background = _pick(rng, BACKGROUNDS)
        if rng.random() < 0.4:
            halves = Thing(shape, colour, second_colour=_pick(rng, COLOURS, colour))
            return Scene(category, (halves,), background=background)
        outer = Thing(_pick(rng, SOLID_SHAPES), _pick(rng, COLOURS, colour), texture=_pick(rng, TEXTURES))
        return Scene(category, (Thing(shape, colour), outer), "inside", background)
    if category == "Complex":
        groups = []
        for _ in range(2):
            texture = _pick(rng, TEXTURES) if rng.random() < 0.5 else None
            group = Thing(_pick(rng, SHAPES), _pick(rng, COLOURS), texture=texture, count=int(rng.integers(1, 4)))
            groups.append(group)
        if (groups[0].shape, groups[0].colour) == (groups[1].shape, groups[1].colour):
            groups[1] = replace(groups[1], colour=_pick(rng, COLOURS, groups[0].colour))
        return Scene(category, tuple(groups), _pick(rng, RELATIONS))
    raise PromptError(f"category: {category!r} is not one of {', '.join(CATEGORIES)}")


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _phrase(thing: Thing) -> str:
    if thing.second_colour is not None:
        return f"a {thing.shape} half {thing.colour} and half {thing.second_colour}"
    count = "a" if thing.count is None else COUNTS[thing.count - 1]
    noun = thing.shape if thing.count in (None, 1) else _plural(thing.shape)
    return " ".join(w for w in (count, thing.size, thing.texture, thing.colour, noun) if w)


def caption(scene: Scene) -> str:
    """Say a scene in words out of :func:`vocabulary`."""
    text = f" {scene.relation} ".join(_phrase(thing) for thing in scene.things)
    return text if scene.background is None else f"{text} on a {scene.background} background"


def vocabulary() -> tuple[str, ...]:
    """Every word a caption can hold, in a fixed order."""
    words = ["a", "on", "background", "half", "and", "inside", *SIZES, *COUNTS, *TEXTURES, *COLOURS, *BACKGROUNDS]
    words += [w for r in RELATIONS for w in r.split()]
    words += [*SHAPES, *(_plural(s) for s in SHAPES)]
    return tuple(dict.fromkeys(words))


def attributes(scene: Scene) -> tuple[str, ...]:
    """The attributes that a scene's caption states, so that one of them can be made wrong."""
    stated = ["colour", "shape"]
    things = scene.things
    if any(t.texture for t in things):
        stated.append("texture")
    if any(t.count for t in things):
        stated.append("count")
    if any(t.size for t in things):
        stated.append("size")
    if scene.relation in RELATIONS:
        stated.append("relation")
    if scene.background:
        stated.append("background")
    return tuple(stated)


LABELS: dict[str, tuple[str, ...]] = {
    **{
        f"{kind}_{place}": options
        for place in ("first", "second")
        for kind, options in {"shape": SHAPES, "colour": tuple(COLOURS), "texture": TEXTURES, "count": COUNTS}.items()
    },
    "size": SIZES,
    "second_colour": tuple(COLOURS),
    "arrangement": ("alone", "halves", "inside", "across", "down"),
    "background": tuple(BACKGROUNDS),
}


def labels(scene: Scene) -> tuple[int, ...]:
    """What a caption says, as class indices that do not depend on how it says it.

    Things are numbered as they stand in the image, from left to right or from top to bottom (inner before
    outer), so that "a left of b" and "b right of a" have equal labels.

    Returns:
        For every entry of :data:`LABELS` the index of its value, −1 where the caption is silent.
    """
    things, relation = scene.things, scene.relation
    if relation in ("right of", "below"):
        things = things[::-1]
    said: dict[str, str | None] = {}
    for place, thing in zip(("first", "second"), things, strict=False):
        said[f"shape_{place}"], said[f"colour_{place}"] = thing.shape, thing.colour
        said[f"texture_{place}"] = thing.texture
        said[f"count_{place}"] = None if thing.count is None else COUNTS[thing.count - 1]
    said["size"], said["second_colour"] = things[0].size, things[0].second_colour
    said["background"] = scene.background
    if relation is None:
        said["arrangement"] = "alone" if things[0].second_colour is None else "halves"
    else:
        said["arrangement"] = {"inside": "inside", "left of": "across", "right of": "across"}.get(relation, "down")
    return tuple(-1 if (value := said.get(name)) is None else LABELS[name].index(value) for name in LABELS)


def mutate(scene: Scene, attribute: str, rng: np.random.Generator) -> Scene:
    """Change exactly one attribute of a scene to another value.

    Args:
        scene: The true scene.
        attribute: One of :func:`attributes` of the scene.
        rng: Source of randomness.

    Raises:
        PromptError: If the scene's caption does not state that attribute.
    """
    if attribute not in attributes(scene):
        raise PromptError(
            f"attribute: {attribute!r} is not one of {', '.join(attributes(scene))} that the scene states"
        )
    if attribute == "background":
        assert scene.background is not None
        return replace(scene, background=_pick(rng, BACKGROUNDS, scene.background))
    if attribute == "relation":
        return replace(scene, relation=_pick(rng, RELATIONS, scene.relation or ""))
    stated: dict[str, Callable[[Thing], object]] = {
        "colour": lambda t: True,
        "shape": lambda t: True,
        "texture": lambda t: t.texture,
        "count": lambda t: t.count,
        "size": lambda t: t.size,
    }
    where = [i for i, t in enumerate(scene.things) if stated[attribute](t)]
    i = where[int(rng.integers(len(where)))]
    thing = scene.things[i]
    if attribute == "colour":
        if thing.second_colour is not None and rng.random() < 0.5:
            new = replace(thing, second_colour=_pick(rng, COLOURS, thing.colour, thing.second_colour))
        else:
            new = replace(thing, colour=_pick(rng, COLOURS, thing.colour, thing.second_colour or ""))
    elif attribute == "shape":
        options = SOLID_SHAPES if scene.relation == "inside" and i == 1 else SHAPES
        new = replace(thing, shape=_pick(rng, options, thing.shape))
    elif attribute == "texture":
        new = replace(thing, texture=_pick(rng, TEXTURES, thing.texture or ""))
    elif attribute == "size":
        new = replace(thing, size=_pick(rng, SIZES, thing.size or ""))
    else:
        new = replace(thing, count=COUNTS.index(_pick(rng, COUNTS, COUNTS[(thing.count or 1) - 1])) + 1)
    return replace(scene, things=(*scene.things[:i], new, *scene.things[i + 1 :]))


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points of local coordinates (v points down, radius about 1) a shape covers."""
    if shape == "circle":
        return u * u + v * v < 1
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) < 0.88
    if shape == "triangle":
        return (v < 0.8) & (np.abs(u) < (v + 1.0) * 0.58)
    if shape == "diamond":
        return np.abs(u) + np.abs(v) < 1.1
    if shape == "ring":
        r = u * u + v * v
        return (r < 1) & (r > 0.3)
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return (np.minimum(a, b) < 0.34) & (np.maximum(a, b) < 1)
    if shape == "heart":
        x, y = 1.25 * u, 0.3 - 1.35 * v
        return x * x + (y - np.sqrt(np.abs(x))) ** 2 * 0.75 < 1
    tip, notch, k = 1.12, 0.46, np.pi / 5
    angle = np.abs((np.arctan2(v, u) + np.pi / 2) % (2 * k) - k)
    angle = k - angle
    r = np.hypot(u, v)
    x2, y2 = notch * np.cos(k), notch * np.sin(k)
    return r * (y2 * np.cos(angle) + (tip - x2) * np.sin(angle)) < y2 * tip


def _paint(
    canvas: np.ndarray, owner: np.ndarray, thing: Thing, place: int, centre: tuple[float, float], radius: float
) -> None:
    """Draw one object onto a float canvas of shape (side, side, 3), coordinates in image pixels.

    Its pixels of ``owner``, shape (side, side), become ``place``.
    """
    side = canvas.shape[0]
    axis = (np.arange(side) + 0.5) / _SUPERSAMPLE
    x, y = axis[None, :] - centre[0], axis[:, None] - centre[1]
    mask = _inside(thing.shape, *np.broadcast_arrays(x / radius, y / radius))
    colour = np.array(COLOURS[thing.colour], np.float32)
    dark = colour * 0.3
    owner[mask] = place
    period = max(6.0, radius * 0.55)
    if thing.second_colour is not None:
        canvas[mask & (x < 0)] = colour
        canvas[mask & (x >= 0)] = np.array(COLOURS[thing.second_colour], np.float32)
        return
    canvas[mask] = colour
    if thing.texture == "striped":
        canvas[mask & ((y / period) % 1 < 0.42)] = dark
    elif thing.texture == "checkered":
        canvas[mask & ((np.floor(x / period * 1.5) + np.floor(y / period * 1.5)) % 2 == 0)] = dark
    elif thing.texture == "dotted":
        du, dv = (x / period) % 1 - 0.5, (y / period) % 1 - 0.5
        canvas[mask & (du * du + dv * dv < 0.085)] = dark


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: What to draw.
        rng: Draws what the caption leaves open.

    Returns:
        Image, shape (64, 64, 3), uint8.
    """
    return draw(scene, rng)[0]


def draw(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene, and say which thing every pixel shows.

    Args:
        scene: What to draw.
        rng: Decides what the scene leaves unsaid.

    Returns:
        Image, shape (64, 64, 3), uint8, and owners, shape (64, 64), int8: 0 for the first thing and 1 for
        the second, numbered as in :func:`labels`, −1 for the background.
    """
    side = IMAGE_SIZE * _SUPERSAMPLE
    background = scene.background or _pick(rng, BACKGROUNDS)
    canvas = np.empty((side, side, 3), np.float32)
    canvas[:] = BACKGROUNDS[background]
    owner = np.full((side, side), -1, np.int8)
    if scene.relation is None or scene.relation == "inside":
        main = scene.things[-1]
        low, high = {"small": (8, 10), "large": (21, 24)}.get(main.size or "", (13, 17))
        if scene.relation == "inside":
            low, high = 25, 28
        radius = float(rng.uniform(low, high))
        room = max(IMAGE_SIZE / 2 - radius - 2, 0)
        spread = min(room, 10.0)
        centre = tuple(IMAGE_SIZE / 2 + rng.uniform(-spread, spread, 2))
        _paint(canvas, owner, main, len(scene.things) - 1, centre, radius)
        if scene.relation == "inside":
            inner = float(rng.uniform(9, 11))
            _paint(canvas, owner, scene.things[0], 0, (centre[0], centre[1] + 0.06 * radius), inner)
    else:
        across = scene.relation in ("left of", "right of")
        first = 0 if scene.relation in ("left of", "above") else 1
        for half, thing in enumerate((scene.things[first], scene.things[1 - first])):
            count = thing.count or 1
            radius = float(rng.uniform(*_GROUP_RADIUS[count]))
            along = (np.arange(count) + 0.5) / count * (IMAGE_SIZE - 4) + 2 + rng.uniform(-1.5, 1.5, count)
            middle = IMAGE_SIZE * (0.25 + 0.5 * half) + rng.uniform(-2.5, 2.5)
            for a in along:
                _paint(canvas, owner, thing, half, (middle, float(a)) if across else (float(a), middle), radius)
    small = canvas.reshape(IMAGE_SIZE, _SUPERSAMPLE, IMAGE_SIZE, _SUPERSAMPLE, 3).mean((1, 3))
    return np.round(small).astype(np.uint8), owner[::_SUPERSAMPLE, ::_SUPERSAMPLE]


def prompt_set(per_category: int = 128, seed: int = 0, categories: tuple[str, ...] = CATEGORIES) -> PromptSet:
    """Distinct captions of every category.

    Args:
        per_category: Prompts in each category.
        seed: Seed of the draw; a longer set begins with the shorter one.
        categories: Categories, a subset of :data:`CATEGORIES`.

    Raises:
        PromptError: If the number is not positive, or a category has fewer distinct captions (Basic has 216).

    Example:
        >>> prompt_set(2, seed=1, categories=("Basic",)).ids
        ('basic-00000', 'basic-00001')
    """
    if per_category < 1:
        raise PromptError(f"prompts_per_category: expected a positive whole number, got {per_category}")
    ids: list[str] = []
    texts: list[str] = []
    labels: list[str] = []
    for category in categories:
        rng = np.random.default_rng([seed, CATEGORIES.index(category) if category in CATEGORIES else len(CATEGORIES)])
        seen: dict[str, None] = {}
        for _ in range(200 * per_category + 2000):
            if len(seen) >= per_category:
                break
            seen.setdefault(caption(sample_scene(category, rng)))
        if len(seen) < per_category:
            raise PromptError(f"per_category: {category} has only {len(seen)} distinct captions, {per_category} asked")
        for i, text in enumerate(seen):
            ids.append(f"{category.lower()}-{i:05d}")
            texts.append(text)
            labels.append(category)
    return PromptSet(tuple(ids), tuple(texts), tuple(labels))
