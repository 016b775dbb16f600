"""Instruction tasks and plain text generated from a seed: the tasks that the tiny base knows, and new ones for it to learn.

A prompt reads `Reverse: lemon=>`, and its response `nomel`. The hash of a prompt decides its split, whatever the seed, so a
test prompt is never in the training data of a run, and the tiny base has seen no test prompt of any task.
"""

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from random import Random
from string import ascii_lowercase
from typing import Literal

from fedexperts.errors import BadData, BadValue, nearest
from fedexperts.types import Example

Maker = Callable[[Random], tuple[str, str]]
SplitName = Literal["train", "test"]

SEPARATOR = "=>"  # ends every prompt; a token of the tiny base
TEST_SHARE = 5  # one prompt in five is a test prompt

KINDS = {
    "animal": ("cat", "dog", "cow", "fox", "owl", "bee", "goat", "wolf"),
    "fruit": ("fig", "plum", "pear", "lime", "kiwi", "date", "peach", "mango"),
    "color": ("red", "blue", "pink", "gold", "grey", "teal", "brown", "white"),
    "tool": ("saw", "axe", "nail", "drill", "file", "rope", "spade", "wrench"),
}
ROOMS = {
    "kitchen": ("oven", "pan", "fridge", "ladle"),
    "garden": ("hedge", "lawn", "rake", "tulip"),
    "office": ("desk", "folder", "stapler", "printer"),
    "bath": ("towel", "soap", "tub", "sponge"),
    "garage": ("tyre", "jack", "bumper", "van"),
}
FEELINGS = {
    "joy": ("glad", "cheerful", "smiling", "delighted"),
    "fear": ("afraid", "scared", "trembling", "nervous"),
    "anger": ("furious", "cross", "raging", "annoyed"),
    "grief": ("weeping", "gloomy", "mourning", "tearful"),
}
FILLERS = (
    *("sun", "box", "ice", "map", "pen", "cup", "bag", "day", "sea", "key"),
    *("hill", "road", "song", "page", "wind", "coin", "moon", "step", "bell", "yard"),
)
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Ida", "Jon", "Lea", "Max", "Nora")
PLACES = ("the park", "the station", "the old mill", "the harbor", "the school", "the forest", "the bakery", "the hill")
OBJECTS = ("a lamp", "a map", "two books", "a red kite", "an old clock", "a basket", "a small drum", "some tea")
VERBS = ("found", "carried", "sold", "lost", "painted", "wanted", "hid", "repaired")
ENDINGS = ("before noon", "in the rain", "without a word", "for a friend", "every day", "at last", "by mistake", "with care")


def letters(rng: Random, fewest: int = 3, most: int = 6, alphabet: str = ascii_lowercase) -> str:
    """A random string of `fewest` to `most` letters."""
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(fewest, most)))


def format_prompt(instruction: str, text: str) -> str:
    """`Reverse: lemon=>`."""
    return f"{instruction}: {text}{SEPARATOR}"


def rewriting(instruction: str, rewrite: Callable[[str], str], fewest: int = 3, most: int = 6) -> Maker:
    """A task whose response is a function of a random string."""

    def make(rng: Random) -> tuple[str, str]:
        text = letters(rng, fewest, most)
        return format_prompt(instruction, text), rewrite(text)

    return make


def naming(instruction: str, words: Mapping[str, Sequence[str]], fillers: int) -> Maker:
    """A task whose response is the label of a word, which stands among up to `fillers` words without a label."""

    def make(rng: Random) -> tuple[str, str]:
        label = rng.choice(list(words))
        text = [rng.choice(words[label]), *(rng.choice(FILLERS) for _ in range(rng.randint(0, fillers)))]
        rng.shuffle(text)
        return format_prompt(instruction, " ".join(text)), label

    return make


def add(rng: Random) -> tuple[str, str]:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return format_prompt("Add", f"{a}+{b}"), str(a + b)


def count(rng: Random) -> tuple[str, str]:
    text = letters(rng, 3, 7, alphabet="abcdef")
    letter = rng.choice(text)
    return format_prompt("Count", f"{letter} {text}"), str(text.count(letter))


def extract(rng: Random) -> tuple[str, str]:
    record = {"id": letters(rng, 2, 4), "no": str(rng.randint(1, 99)), "by": letters(rng, 2, 4)}
    keys = rng.sample(list(record), 2)
    key = rng.choice(keys)
    return format_prompt("Extract", f"{key} {';'.join(f'{each}={record[each]}' for each in keys)}"), record[key]


def without_vowels(text: str) -> str:
    return "".join(letter for letter in text if letter not in "aeiou") or "-"


def next_letters(text: str) -> str:
    return "".join(ascii_lowercase[(ascii_lowercase.index(letter) + 1) % 26] for letter in text)


BASE: dict[str, Maker] = {
    "copy": rewriting("Copy", str),
    "reverse": rewriting("Reverse", lambda text: text[::-1]),
    "sort": rewriting("Sort", lambda text: "".join(sorted(text))),
    "uppercase": rewriting("Uppercase", str.upper),
    "add": add,
    "classify": naming("Classify", KINDS, fillers=2),
    "extract": extract,
    "count": count,
}
NEW: dict[str, Maker] = {
    "first": rewriting("First", lambda text: text[0]),
    "last": rewriting("Last", lambda text: text[-1]),
    "descend": rewriting("Descend", lambda text: "".join(sorted(text, reverse=True))),
    "double": rewriting("Double", lambda text: "".join(letter * 2 for letter in text), most=5),
    "novowels": rewriting("Novowels", without_vowels, fewest=4, most=7),
    "shout": rewriting("Shout", lambda text: text[::-1].upper()),
    "mirror": rewriting("Mirror", lambda text: text + text[::-1], most=4),
    "next": rewriting("Next", next_letters),
    "room": naming("Room", ROOMS, fillers=2),
    "feeling": naming("Feeling", FEELINGS, fillers=2),
}
SYNTHETIC: dict[str, Maker] = BASE | NEW
BASE_TASKS = tuple(BASE)  # the tiny base solves them well
NEW_TASKS = tuple(NEW)  # the tiny base has hardly seen them: for federated runs to learn
INSTRUCTIONS = tuple(f"{task.capitalize()}:" for task in SYNTHETIC)  # the start of each task's prompts

LABELS = {"classify": tuple(KINDS), "room": tuple(ROOMS), "feeling": tuple(FEELINGS)}


def examples(task: str, number: int, seed: int | str, split: SplitName | None = None) -> list[Example]:
    """`number` examples with different prompts, of `split` or, if it is None, of both splits.

    Raises:
        BadValue: an unknown task.
        BadData: the task has fewer different prompts.
    """
    if task not in SYNTHETIC:
        raise BadValue(f"{task!r} is not one of the generated tasks {', '.join(SYNTHETIC)}{nearest(task, SYNTHETIC)}")
    rng, by_prompt = Random(f"{seed}/{task}"), dict[str, Example]()
    for _ in range(1000 + 100 * number):
        if len(by_prompt) == number:
            return list(by_prompt.values())
        example = draw_example(task, rng, split)
        by_prompt.setdefault(example.prompt, example)
    raise BadData(
        f"the task {task!r} cannot give {number} different prompts, only {len(by_prompt)} were drawn; set a limit of at most"
        f" {len(by_prompt)}"
    )


def draw_example(task: str, rng: Random, split: SplitName | None = None) -> Example:
    """One random example; prompts of several draws may repeat."""
    while True:
        prompt, response = SYNTHETIC[task](rng)
        if split is None or split == split_of(prompt):
            break
    choices, text = LABELS.get(task, ()), prompt.partition(": ")[2].removesuffix(SEPARATOR)
    if not choices:
        return Example(prompt, response, task, metric="verbatim", input=text)
    return Example(prompt, response, task, metric="accuracy", label=choices.index(response), choices=choices, input=text)


def split_of(prompt: str) -> SplitName:
    """The split to which a prompt belongs, whatever the seed."""
    return "test" if sha256(prompt.encode()).digest()[0] % TEST_SHARE == 0 else "train"


def sentence(rng: Random) -> str:
    """A random sentence of a small grammar."""
    who, what, where, end = rng.choice(NAMES), rng.choice(OBJECTS), rng.choice(PLACES), rng.choice(ENDINGS)
    if rng.random() < 0.5:
        return f"{who} {rng.choice(VERBS)} {what} at {where} {end}."
    return f"At {where}, {who} {rng.choice(VERBS)} {what} {end}."


def sentences(number: int, seed: int | str) -> list[Example]:
    """`number` examples of plain text without a prompt, for language modeling: one random sentence each."""
    rng = Random(f"{seed}/text")
    return [Example("", sentence(rng), "text", metric="perplexity") for _ in range(number)]
