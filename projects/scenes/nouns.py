"""The nouns of the bank: which models and emoji show each, and how to speak of it. The table is `nouns.csv`.

A model is named by its library and its id there (`by:siameseCat`), an emoji by its code points in hexadecimal. Every
model was looked at. Models with several things in one, lying clothes, sheets, and sticks that vanish at 80 pixels are
left out.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path


# Prefix of a model → file name of its library in the package of furniture. Reallusion's library of people is left out.
LIBRARIES = {"by": "BlendSwap-CC-BY", "cc0": "BlendSwap-CC-0", "kl": "KatorLegaz", "sc": "Scopia"}

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black")


@dataclass(frozen=True)
class Noun:
    """What the table says of one noun.

    Args:
        size: Usual longer side of the object as a fraction of the image's shorter side.
        synonyms: Other words for it, separated by commas.
        models: Models that show it, separated by spaces.
        emoji: Code points of emoji that show it, separated by spaces.
        recolor: Whether the thing has one dominant color that an instruction can change; "no" in the table: it has not.
        turn: Largest yaw to either side in radians at which the thing still shows itself; *defaults to* all round.
        skip: Smallest yaw to either side in radians, for things that are too narrow from the front; *defaults to* 0.
        lowest: Lowest pitch of the camera in radians, for things that show themselves from above; *defaults to* 0.1.
    """

    size: float
    synonyms: str = ""
    models: str = ""
    emoji: str = ""
    recolor: bool = True
    turn: float = math.pi
    skip: float = 0.0
    lowest: float = 0.1


def read_nouns() -> dict[str, Noun]:
    with open(Path(__file__).with_name("nouns.csv"), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        row["noun"]: Noun(
            float(row["size"]),
            row["synonyms"],
            row["models"],
            row["emoji"],
            row["recolor"] == "yes",
            **{name: float(row[name]) for name in ("turn", "skip", "lowest") if row[name]},
        )
        for row in rows
    }


NOUNS = read_nouns()
