"""What is asked of a clip: seven kinds of questions, several phrasings each, one right answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .world import COLOURS, MOTIONS, SHAPES, Clip, Thing

KINDS = ("colour", "shape", "motion", "count", "existence", "order", "description")
# Asked in training only: who can say where a thing is at first and at last, learns sooner how it
# moves. Its answers are rough where a thing is between two places, so it is not measured.
PLACE = "place"
_ROWS = ("top", "middle", "bottom")
_COLUMNS = ("left", "centre", "right")
_NUMBERS = ("none", "one", "two", "three")

_PHRASINGS: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is the {shape}?",
        "Which colour does the {shape} have?",
        "The {shape} is of what colour?",
        "Tell me the colour of the {shape}.",
    ),
    "shape": (
        "What shape is the {colour} object?",
        "Which shape does the {colour} thing have?",
        "The {colour} object is of what shape?",
        "Tell me the shape of the {colour} object.",
    ),
    "motion": (
        "Which way does the {name} move?",
        "Where is the {name} going?",
        "How does the {name} move?",
        "In what direction does the {name} travel?",
    ),
    "place_first": ("Where is the {name} at first?", "Where does the {name} begin?"),
    "place_last": ("Where is the {name} at last?", "Where does the {name} end?"),
    "count": (
        "How many objects are there?",
        "How many things do you see?",
        "Count the objects in the video.",
        "What is the number of objects?",
    ),
    "count_shape": (
        "How many {shape} shapes are there?",
        "Count the {shape} shapes.",
        "What is the number of {shape} shapes?",
    ),
    "existence": (
        "Is there {name}?",
        "Do you see {name}?",
        "Does {name} occur in the video?",
        "Can you find {name}?",
    ),
    "order": (
        "Which comes first, the {first} or the {second}?",
        "What appears earlier, the {first} or the {second}?",
        "Which of the two is seen first, the {first} or the {second}?",
    ),
    "order_end": (
        "Which leaves first, the {first} or the {second}?",
        "What disappears earlier, the {first} or the {second}?",
        "Which of the two is gone first, the {first} or the {second}?",
    ),
    "description": (
        "Describe the video.",
        "What is shown in the video?",
        "Tell me what you see.",
        "What does the video show?",
    ),
}


@dataclass(frozen=True)
class Question:
    """A question with its answer, one wrong answer, and the things that it is about."""

    kind: str
    text: str
    answer: str
    wrong: str
    about: tuple[int, ...]


def _other(rng: np.random.Generator, options: tuple[str, ...], right: str) -> str:
    return str(rng.choice([option for option in options if option != right]))


def _with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _listing(names: list[str]) -> str:
    *rest, last = map(_with_article, names)
    return f"{', '.join(rest)} and {last}" if rest else last


def _phrase(rng: np.random.Generator, key: str, **words: str) -> str:
    return str(rng.choice(_PHRASINGS[key])).format(**words)


def _colour(clip: Clip, rng: np.random.Generator) -> Question | None:
    shapes = [thing.shape for thing in clip.things]
    unique = [i for i, shape in enumerate(shapes) if shapes.count(shape) == 1]
    if not unique:
        return None
    i = int(rng.choice(unique))
    thing = clip.things[i]
    wrong = _other(rng, tuple(COLOURS), thing.colour)
    text = _phrase(rng, "colour", shape=thing.shape)
    return Question("colour", text, thing.colour, wrong, (i,))


def _shape(clip: Clip, rng: np.random.Generator) -> Question | None:
    i = int(rng.integers(len(clip.things)))
    thing = clip.things[i]
    text = _phrase(rng, "shape", colour=thing.colour)
    return Question("shape", text, thing.shape, _other(rng, SHAPES, thing.shape), (i,))


def _motion(clip: Clip, rng: np.random.Generator) -> Question | None:
    i = int(rng.integers(len(clip.things)))
    thing = clip.things[i]
    text = _phrase(rng, "motion", name=thing.name)
    return Question("motion", text, thing.motion, _other(rng, tuple(MOTIONS), thing.motion), (i,))


def _place(clip: Clip, rng: np.random.Generator) -> Question | None:
    i = int(rng.integers(len(clip.things)))
    thing = clip.things[i]
    first = rng.random() < 0.5
    x, y = thing.start if first else thing.end
    text = _phrase(rng, "place_first" if first else "place_last", name=thing.name)
    places = tuple(f"{row} {column}" for row in _ROWS for column in _COLUMNS)
    answer = f"{_ROWS[min(int(3 * y), 2)]} {_COLUMNS[min(int(3 * x), 2)]}"
    return Question(PLACE, text, answer, _other(rng, places, answer), (i,))


def _count(clip: Clip, rng: np.random.Generator) -> Question | None:
    about = tuple(range(len(clip.things)))
    if rng.random() < 0.6:
        number, text = len(clip.things), _phrase(rng, "count")
    else:
        shapes = [thing.shape for thing in clip.things]
        shape = str(rng.choice(SHAPES)) if rng.random() < 0.4 else str(rng.choice(shapes))
        about = tuple(i for i, other in enumerate(shapes) if other == shape)
        number, text = len(about), _phrase(rng, "count_shape", shape=shape)
    return Question("count", text, _NUMBERS[number], _other(rng, _NUMBERS, _NUMBERS[number]), about)


def _existence(clip: Clip, rng: np.random.Generator) -> Question | None:
    i = int(rng.integers(len(clip.things)))
    thing = clip.things[i]
    if rng.random() < 0.5:
        return Question(
            "existence",
            _phrase(rng, "existence", name=_with_article(thing.name)),
            "yes",
            "no",
            (i,),
        )
    present = {other.name for other in clip.things}
    colour = thing.colour if rng.random() < 0.6 else str(rng.choice(list(COLOURS)))
    options = [f"{colour} {shape}" for shape in SHAPES if f"{colour} {shape}" not in present]
    if rng.random() < 0.3:
        options = [f"{c} {thing.shape}" for c in COLOURS if f"{c} {thing.shape}" not in present]
    text = _phrase(rng, "existence", name=_with_article(str(rng.choice(options))))
    return Question("existence", text, "no", "yes", ())


def _order(clip: Clip, rng: np.random.Generator) -> Question | None:
    pairs: list[tuple[str, int, int]] = []
    for i, a in enumerate(clip.things):
        for j, b in enumerate(clip.things):
            if a.appears < b.appears:
                pairs.append(("order", i, j))
            if a.disappears < b.disappears:
                pairs.append(("order_end", i, j))
    if not pairs:
        return None
    key, i, j = pairs[int(rng.integers(len(pairs)))]
    right, wrong = clip.things[i], clip.things[j]
    named: list[Thing] = [right, wrong] if rng.random() < 0.5 else [wrong, right]
    text = _phrase(rng, key, first=named[0].name, second=named[1].name)
    return Question("order", text, f"the {right.name}", f"the {wrong.name}", (i, j))


def _description(clip: Clip, rng: np.random.Generator) -> Question | None:
    rank = list(COLOURS)
    ordered = sorted(clip.things, key=lambda thing: rank.index(thing.colour))
    names = [thing.name for thing in ordered]
    spoiled = list(names)
    at = int(rng.integers(len(names)))
    colour, shape = spoiled[at].split()
    spoiled[at] = f"{colour} {_other(rng, SHAPES, shape)}"
    about = tuple(range(len(names)))
    text = _phrase(rng, "description")
    return Question("description", text, _listing(names), _listing(spoiled), about)


_ASK = {
    "colour": _colour,
    "shape": _shape,
    "motion": _motion,
    PLACE: _place,
    "count": _count,
    "existence": _existence,
    "order": _order,
    "description": _description,
}


def ask(clip: Clip, kind: str, rng: np.random.Generator) -> Question | None:
    """Returns a question of a kind (`KINDS` or `PLACE`), None where the clip has no answer."""
    return _ASK[kind](clip, rng)


def all_texts() -> list[str]:
    """Returns every question and answer that can occur, for building the tokenizers."""
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    texts = [*COLOURS, *SHAPES, *MOTIONS, *_NUMBERS, "yes", "no", *(f"the {n}" for n in names)]
    for name in names:
        colour, shape = name.split()
        for key, phrasings in _PHRASINGS.items():
            if key.startswith(PLACE):
                continue  # written with the pieces that the others need
            words = {"name": name, "colour": colour, "shape": shape}
            texts += [p.format(first=name, second=name, **words) for p in phrasings]
        texts += [p.format(name=_with_article(name)) for p in _PHRASINGS["existence"]]
        texts.append(_listing([name, name, name]))
    return texts
