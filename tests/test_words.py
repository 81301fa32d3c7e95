"""Colours of words, synonyms, fonts and names inside regions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from cliptteacher import drawing
from cliptteacher.data.miniworld import CLASS_NAMES
from cliptteacher.drawing import draw_names, find_room, font_for, outline, shortened
from cliptteacher.palette import _VISIONS, _seen_by, class_palette, word_palette
from cliptteacher.synonyms import split_synonyms
from cliptteacher.visualize import overlay


def test_colours_stay_apart_for_every_eye() -> None:
    colours = class_palette(16)
    for vision in _VISIONS:
        seen = _seen_by(colours, vision)
        distances = np.linalg.norm(seen[:, None] - seen, axis=-1) + 1000 * np.eye(16)
        assert distances.min() > 15


def test_a_word_keeps_its_colour() -> None:
    words = ["tall grass", "cow", "Dog", "horse"]
    alone = {word: word_palette([word])[0].tolist() for word in words}
    together = word_palette(words).tolist()
    again = word_palette(words[::-1]).tolist()[::-1]
    assert together == again == [alone[word] for word in words]


def test_words_of_one_colour_are_told_apart() -> None:
    world = word_palette(CLASS_NAMES)
    for vision in _VISIONS:
        seen = _seen_by(world, vision)
        distances = np.linalg.norm(seen[:, None] - seen, axis=-1) + 1000 * np.eye(20)
        assert distances.min() > 8
    sofa, cow, tree = word_palette(["sofa", "cow", "tree"])  # whose letters choose one colour
    assert cow.tolist() == word_palette(["cow"])[0].tolist()
    assert len({tuple(colour) for colour in (sofa, cow, tree)}) == 3
    words = [f"word {k}" for k in range(200)]
    colours = word_palette(words)
    assert len({tuple(colour) for colour in colours.tolist()}) == 200
    assert word_palette([]).shape == (0, 3)
    with pytest.raises(ValueError, match="at most 256, got 257"):
        word_palette([str(k) for k in range(257)])


def test_synonyms() -> None:
    synonyms = split_synonyms(["sofa / couch", "sky", "hound/dog/puppy"])
    assert synonyms.words == ("sofa", "couch", "sky", "hound", "dog", "puppy")
    assert synonyms.merge(torch.tensor([[0, 1, 2], [3, 4, 5]])).tolist() == [[0, 0, 1], [2, 2, 2]]
    assert synonyms.unseen([1, 2, 3, 4, 5]) == (1, 2)  # "sofa" is seen, so "couch" is
    assert synonyms.words_of((0, 2)) == (0, 1, 3, 4, 5)
    with pytest.raises(ValueError, match="both sides of '/', got 'sofa/'"):
        split_synonyms(["sofa/"])
    with pytest.raises(ValueError, match="got 'couch' in 'couch/seat' and in 'sofa/couch'"):
        split_synonyms(["sofa/couch", "couch/seat"])


def test_room_for_a_name_is_inside_its_region() -> None:
    mask = np.zeros((60, 100), dtype=bool)
    mask[5:15, 5:95] = True  # long and low
    mask[20:55, 10:60] = True  # and a block
    x, y = find_room(mask, 40, 20)
    assert mask[y - 10 : y + 10, x - 20 : x + 20].all()
    assert find_room(np.ones((60, 100), dtype=bool), 20, 10) == (50, 30)  # in the middle
    x, y = find_room(mask, 80, 8)
    assert mask[y - 4 : y + 4, x - 40 : x + 40].all()
    assert find_room(mask, 80, 20) is None and find_room(mask, 200, 5) is None
    large = np.kron(mask, np.ones((30, 30), dtype=bool))
    x, y = find_room(large, 1200, 600)
    assert large[y - 300 : y + 300, x - 600 : x + 600].all()


def test_names_are_written_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((100, 200), dtype=np.uint8)
    values[:, 100:], values[:4, :4] = 255, 1
    drawn: list[str] = []
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, xy, text, *_, **__: drawn.append(text)
    )
    draw_names(Image.new("RGB", (200, 100)), values, ["grass", "sky"], 14)
    assert drawn == ["grass"]


def test_outline_is_between_regions() -> None:
    values = np.array([[0, 0, 1], [0, 2, 2]], dtype=np.uint8)
    assert outline(values).tolist() == [[False, True, True], [True, False, False]]


def test_long_texts_are_cut() -> None:
    font = font_for("x", 14)
    short = shortened("a very long name " * 9, font, 80)
    assert short.endswith("…") and font.getlength(short) <= 80
    assert shortened("cat", font, 80) == "cat"
    picture = overlay(
        torch.zeros(3, 90, 90), torch.zeros(90, 90, dtype=torch.int64), ["very long " * 30]
    )
    assert (np.asarray(picture)[:, -12:] == 255).all()  # the margin stays free


def test_other_scripts_take_a_font_of_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    font_for.cache_clear()
    (tmp_path / "broken.ttf").write_text("no font")
    looked: list[Path] = []
    own = ImageFont.load_default(14.0)
    monkeypatch.setattr(drawing, "_system_fonts", lambda: (tmp_path / "broken.ttf", Path("a.ttf")))
    monkeypatch.setattr(drawing, "_has_letters", lambda font, letters: font == "large")
    original = ImageFont.truetype

    def truetype(path: object, *arguments: object, **more: object) -> object:
        if not isinstance(path, Path):
            return original(path, *arguments, **more)  # Pillow's own
        looked.append(path)
        return "large" if path == Path("a.ttf") else original(path, *arguments, **more)

    monkeypatch.setattr(ImageFont, "truetype", truetype)
    assert font_for("猫", 14) == "large"
    assert [path.name for path in looked] == ["broken.ttf", "a.ttf"]
    monkeypatch.setattr(drawing, "_system_fonts", lambda: ())
    font_for.cache_clear()
    assert type(font_for("猫", 14)) is type(own)
    font_for.cache_clear()
