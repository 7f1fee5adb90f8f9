"""The renderer says in pixels what the prompt says in words."""

import numpy as np
import pytest

from kutils.generation import shape_objects, shape_scenes, shapes
from kutils.generation.shapes import Scene, Thing


def pixels(image) -> np.ndarray:
    return np.asarray(image, float)


def test_language_is_large_enough_and_can_all_be_drawn():
    assert len(shapes.OBJECTS) >= 20 and set(shapes.OBJECTS) == set(shape_objects.GLYPHS)
    assert len(shapes.COLOURS) >= 12 and set(shapes.COLOURS) == set(shapes.RGB)
    assert len(shapes.BACKGROUNDS) >= 8 and set(shapes.BACKGROUNDS) == set(shape_scenes.BACKGROUNDS)
    assert len(shapes.STYLES) >= 8 and set(shapes.STYLES) == set(shape_scenes.STYLES)


def test_no_wording_has_two_meanings():
    wordings = [wording for words in shapes.VOCABULARY.values() for group in words.values() for wording in group]
    assert len(wordings) == len(set(wordings))


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("a tiny crimson goldfish", Scene((Thing("fish", "red", "small"),))),
        (
            "an oil painting of a trio of cobalt blue butterflies in deep water, 4k",
            Scene((Thing("butterfly", "blue", count=3),), background="ocean", style="oil"),
        ),
        (
            "A White KEY floating above an orange house, at dusk, glowing horizon",
            Scene((Thing("key", "white"), Thing("house", "orange")), relation="above", background="sunset"),
        ),
        ("candle inside one huge top hat", Scene((Thing("candle"), Thing("hat", size="large")), relation="inside")),
    ],
)
def test_prompt_is_read(prompt, scene):
    assert shapes.parse(prompt) == scene


def test_prompt_without_an_object_is_refused():
    with pytest.raises(ValueError, match=r"'red sunset' names nothing .* knows apple, balloon"):
        shapes.parse("red sunset")


def test_prompts_are_distinct_repeatable_and_a_longer_list_begins_with_the_shorter():
    prompts = shapes.generate_prompts(300, seed=3)
    assert len(set(prompts)) == 300
    assert shapes.generate_prompts(50, seed=3) == prompts[:50]
    assert shapes.generate_prompts(50, seed=4) != prompts[:50]


def test_every_generated_prompt_is_read_back_with_all_its_parts():
    scenes = [shapes.parse(prompt) for prompt in shapes.generate_prompts(2000)]
    seen = {(thing.name, thing.colour) for scene in scenes for thing in scene.things}
    assert {name for name, _ in seen} == set(shapes.OBJECTS)
    assert {colour for _, colour in seen} == set(shapes.COLOURS) | {None}
    assert {scene.background for scene in scenes} == set(shapes.BACKGROUNDS)
    assert {scene.style for scene in scenes} == set(shapes.STYLES)
    assert {scene.relation for scene in scenes} == set(shapes.RELATIONS) | {None}
    assert {thing.count for scene in scenes for thing in scene.things} == set(shapes.COUNTS)
    assert all((scene.relation is None) == (len(scene.things) == 1) for scene in scenes)


def test_picture_is_decided_by_prompt_and_seed():
    prompt = "two red apples in falling snow, comic book panel"
    image = shapes.render(prompt, seed=5, size=96)
    assert image.size == (96, 96) and image.mode == "RGB"
    np.testing.assert_array_equal(pixels(image), pixels(shapes.render(prompt, seed=5, size=96)))
    assert np.abs(pixels(image) - pixels(shapes.render(prompt, seed=6, size=96))).mean() > 3


@pytest.mark.parametrize("colour", ["red", "green", "blue"])
def test_colour_is_visible(colour):
    image = pixels(shapes.render(f"a large {colour} heart on a plain background", seed=0))
    middle = image[44:84, 44:84].mean(axis=(0, 1))
    assert middle.argmax() == ["red", "green", "blue"].index(colour)
    assert middle.max() > 1.5 * np.delete(middle, middle.argmax()).max()


def test_relation_and_count_are_visible():
    def dark_rows(prompt):
        image = pixels(shapes.render(prompt, seed=1)).min(axis=2) < 90
        return image[:64].sum(), image[64:].sum()

    top, bottom = dark_rows("a jet black heart above a white heart on a plain background")
    assert top > 2 * bottom
    top, bottom = dark_rows("a jet black heart below a white heart on a plain background")
    assert bottom > 2 * top

    def reddish(prompt):
        image = pixels(shapes.render(prompt, seed=2))
        return ((image[..., 0] > 150) & (image[..., 1] < 90)).sum()

    assert reddish("one tiny red heart in a studio") < reddish("one red heart in a studio")
    assert reddish("one red heart in a studio") < reddish("one giant red heart in a studio")


@pytest.mark.parametrize("kind", ["BACKGROUNDS", "STYLES"])
def test_every_background_and_style_changes_the_picture(kind):
    wordings = {meaning: words[0] for meaning, words in getattr(shapes, kind).items()}
    images = {meaning: pixels(shapes.render(f"a blue cat, {words}", seed=0)) for meaning, words in wordings.items()}
    for first in images:
        for second in images:
            if first < second:
                assert np.abs(images[first] - images[second]).mean() > 8, (first, second)


@pytest.mark.slow
def test_mean_prompt_says_little():
    """The baseline that a network has to beat is at most 0.60."""
    from kutils.prompts.embedding import encode_prompts

    embeddings = encode_prompts(shapes.generate_prompts(600), progress=False)
    mean = embeddings[:400].mean(axis=0)
    assert (embeddings[400:] @ (mean / np.linalg.norm(mean))).mean() <= 0.60
