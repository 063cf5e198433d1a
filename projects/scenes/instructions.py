"""Words of the scenes: instructions for every operation, captions for maps, articles and synonyms.

All texts are plain, short and mostly lower case without a final stop.
"""

import random
from collections.abc import Sequence


PLACES = ("left", "middle", "right")
AT_PLACE = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
TO_PLACE = {"left": "to the left", "middle": "to the middle", "right": "to the right"}

# {object}: "the dog"; {new}: "a red chair"; {color}: "green"; {at}: "on the left"; {to}: "to the left";
# {other}: "the car".
# Phrases of each kind are separated by "|".
PHRASES = {
    "add": (
        "add {new} | put {new} here | place {new} here | insert {new} | draw {new} | add {new} to the picture | "
        "put {new} into the photo | place {new} in the scene | there should be {new} | i want to see {new}"
    ),
    "add at": (
        "add {new} {at} | put {new} {at} | place {new} {at} | insert {new} {at} | draw {new} {at} | "
        "{at} add {new} | there should be {new} {at} | add {new} {at} of the picture | "
        "put {new} {at} of the photo"
    ),
    "add next to": (
        "add {new} next to {other} | put {new} next to {other} | place {new} next to {other} | "
        "add {new} beside {other} | put {new} beside {other} | place {new} near {other} | "
        "insert {new} next to {other} | there should be {new} next to {other}"
    ),
    "remove": (
        "remove {object} | delete {object} | erase {object} | take {object} away | take away {object} | "
        "get rid of {object} | remove {object} from the picture | take {object} out of the photo | "
        "the picture without {object} | make {object} disappear | {object} should go away"
    ),
    "replace": (
        "replace {object} with {new} | replace {object} by {new} | turn {object} into {new} | "
        "change {object} into {new} | change {object} to {new} | swap {object} for {new} | "
        "put {new} in place of {object} | make {object} {new} | use {new} instead of {object} | "
        "{object} should become {new}"
    ),
    "recolor": (
        "make {object} {color} | paint {object} {color} | color {object} {color} | turn {object} {color} | "
        "change the color of {object} to {color} | change {object} to {color} | "
        "make the color of {object} {color} | recolor {object} to {color} | give {object} a {color} color | "
        "{object} should be {color}"
    ),
    "move": (
        "move {object} {to} | shift {object} {to} | put {object} {at} | place {object} {at} | "
        "bring {object} {to} | move {object} {to} of the picture | push {object} {to} | "
        "{object} should be {at} | drag {object} {to}"
    ),
    "night": (
        "turn it into night | make it night | change day to night | make it dark outside | show this at night | "
        "the same place at night | turn day into night | night time | make it look like night"
    ),
    "sunset": (
        "make it sunset | turn it into a sunset | show this at sunset | the same place at sunset | "
        "add the light of a sunset | make the sun go down | change the light to sunset | "
        "evening light at sunset | make it look like sunset"
    ),
    "snow": (
        "make it snow | let it snow | add snow | turn it into winter | cover the ground with snow | "
        "make it winter with snow | show this in the snow | a snowy day | add falling snow"
    ),
    "rain": (
        "make it rain | let it rain | add rain | turn it into a rainy day | show this in the rain | "
        "a rainy day | make the weather rainy | add falling rain | make it look like rain"
    ),
    "fog": (
        "make it foggy | add fog | put fog into the picture | show this in the fog | a foggy day | "
        "cover it with fog | make the weather foggy | add thick fog | turn it into a foggy morning"
    ),
    "sepia": (
        "make it sepia | turn it into sepia | make it look like an old photo | sepia | apply a sepia tone | "
        "give it a sepia tone | change it to sepia colors | make it an old brown photograph | use a sepia filter"
    ),
    "black and white": (
        "make it black and white | turn it into black and white | black and white | remove all colors | "
        "take the color out of the picture | change it to black and white | make it gray | "
        "use a black and white filter | convert the photo to black and white"
    ),
    "blur": (
        "blur it | blur the picture | make it blurry | make the photo blurry | blur everything | "
        "make it out of focus | apply a blur | turn it into a blurry picture | use a blur filter"
    ),
    "pencil sketch": (
        "turn it into a pencil sketch | make it a pencil drawing | draw it with a pencil | "
        "make it look like a sketch | pencil sketch | change it into a pencil drawing | sketch it | "
        "convert the photo to a sketch | make a drawing of it"
    ),
    "caption": (
        "{objects} | a picture of {objects} | a photo of {objects} | a photograph of {objects} | "
        "{objects} outside | {objects} in a landscape | a scene with {objects} | a picture with {objects}"
    ),
    "landscape": (
        "a landscape | a photograph of a landscape | a picture of a place | a photo of a place | "
        "a place outside | a scene outside | a view | a photograph of a place"
    ),
    "photograph": (
        "a photograph | a photo | a picture | a color photo | a photograph in color | an image | "
        "a photo of something | a nice picture"
    ),
}
PHRASES = {kind: tuple(phrases.split(" | ")) for kind, phrases in PHRASES.items()}
# Of all phrases, so many begin with "please", leave out "the", or are written with a capital and a final stop.
PLEASE, TERSE, SENTENCE = 0.02, 0.04, 0.04
# Names of the bank that take no "a".
UNCOUNTED = ("bread", "cheese", "luggage")
# Words that sound otherwise than their first letter says.
CONSONANT_STARTS = ("uni", "uk", "use", "eu", "one")
VOWEL_STARTS = ("hour", "honest", "heir")


def choose_article(words: str) -> str:
    """Choose "a" or "an" for words by the sound of the first."""
    if words.startswith(VOWEL_STARTS):
        return "an"
    return "an" if words[0] in "aeiou" and not words.startswith(CONSONANT_STARTS) else "a"


def draw_name(rng: random.Random, nouns: dict, noun: str) -> str:
    """Draw a name of a noun: itself in 7 of 10 cases, else one of its synonyms."""
    synonyms = nouns[noun]["synonyms"]
    return (rng.choice(synonyms) if synonyms and rng.random() < 0.3 else noun).lower()


def name_new(rng: random.Random, nouns: dict, noun: str, color: str = "") -> str:
    """Name an object that is not there yet, or a described one: "a cat", "an orange chair"."""
    name = draw_name(rng, nouns, noun)
    # Names of things without a singular ("scissors") have no article, whatever stands before them.
    article = "" if name in UNCOUNTED else nouns[noun]["article"]
    if color or name != noun.lower():
        name = f"{color} {name}" if color else name
        article = article and choose_article(name)
    return f"{article} {name}" if article else name


def name_present(rng: random.Random, nouns: dict, noun: str, color: str = "") -> str:
    """Name an object that is there: "the cat", "the orange chair"."""
    name = draw_name(rng, nouns, noun)
    return f"the {color} {name}" if color else f"the {name}"


def compose_instruction(
    rng: random.Random,
    nouns: dict,
    operation: str,
    noun: str = "",
    new_noun: str = "",
    color: str = "",
    source_color: str = "",
    place: str = "",
    beside: str = "",
    edit: str = "",
) -> str:
    """Write one instruction of an edit.

    Args:
        rng (`random.Random`): Draws the phrase and the synonyms.
        nouns (`dict`): The table of nouns in `bank.json`.
        operation (`str`): "add", "remove", "replace", "recolor", "move" or "global".
        noun (`str`): The object that is added, removed, replaced, recolored or moved.
        new_noun (`str`): What replaces it.
        color (`str`): The color that is asked: of the object that is added, recolored, or replaces another.
        source_color (`str`): The known color of the object that is there; it is named where given.
        place (`str`): "left", "middle" or "right", for "add" and "move"; "" names none.
        beside (`str`): The noun next to which an object is added.
        edit (`str`): The name of a global edit.
    """
    kind = operation
    if operation == "global":
        kind = edit
    elif operation == "add" and beside:
        kind = "add next to"
    elif operation == "add" and place:
        kind = "add at"
    words = {"color": color}
    if operation == "add":
        words["new"] = name_new(rng, nouns, noun, color)
    elif operation != "global":
        words["object"] = name_present(rng, nouns, noun, source_color)
    if operation == "replace":
        words["new"] = name_new(rng, nouns, new_noun, color)
    if beside:
        words["other"] = name_present(rng, nouns, beside)
    if place:
        words |= {"at": AT_PLACE[place], "to": TO_PLACE[place]}
    phrase = rng.choice(PHRASES[kind])
    if kind == "recolor" and color[0] in "aeiou":
        phrase = phrase.replace("a {color}", "an {color}")
    return vary_style(rng, phrase.format(**words))


def compose_caption(rng: random.Random, nouns: dict, objects: Sequence[tuple[str, str]], is_place: bool = True) -> str:
    """Describe a picture: its objects (noun, color or "") in random order; without any, what kind it is."""
    if not objects:
        return rng.choice(PHRASES["landscape" if is_place else "photograph"])
    names = [name_new(rng, nouns, noun, color) for noun, color in objects]
    rng.shuffle(names)
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return vary_style(rng, rng.choice(PHRASES["caption"]).format(objects=listed))


def vary_style(rng: random.Random, text: str) -> str:
    """Write a few texts as other people would: with "please", without "the", or as a sentence with a final stop."""
    style = rng.random()
    if style < PLEASE:
        return f"please {text}"
    if style < PLEASE + TERSE:
        return " ".join(word for word in text.split() if word != "the")
    if style < PLEASE + TERSE + SENTENCE:
        return f"{text[0].upper()}{text[1:]}."
    return text
