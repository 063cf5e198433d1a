"""The nouns of the bank, chosen by looking at every model: which models and emoji show each, and how to speak of it.

A model is named by its library and its id there (`by:siameseCat`), an emoji by its code points in hexadecimal. Models
with several things in one, lying clothes, sheets and sticks that vanish at 80 pixels are left out.
"""

import math
from dataclasses import dataclass


# Prefix of a model → file name of its library in the package of furniture. Reallusion's library of people is left out.
LIBRARIES = {"by": "BlendSwap-CC-BY", "cc0": "BlendSwap-CC-0", "kl": "KatorLegaz", "sc": "Scopia"}

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black")


@dataclass(frozen=True)
class Noun:
    """What the table says of one noun.

    Args:
        size: Usual longer side of the object as a fraction of the picture's shorter side.
        synonyms: Other words for it, separated by commas.
        models: Models that show it, separated by spaces.
        emoji: Code points of emoji that show it, separated by spaces.
        recolor: Whether the thing has one dominant color that an instruction can change.
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


N = Noun
NOUNS = {
    # Animals
    "cat": N(0.38, "kitten", "by:siameseCat sc:cat", "1f408", turn=2.5),
    "dog": N(0.42, "puppy,hound", "by:bulldog sc:dog", "1f415", turn=2.5),
    "horse": N(0.58, "pony", "by:horse cc0:horse2", "1f40e", turn=2.6, skip=0.3),
    "chicken": N(0.34, "hen", "cc0:chicken", "1f413", recolor=False, turn=2.5),
    "rabbit": N(0.3, "bunny", "sc:rabbit", "1f407", turn=2.5),
    # Vehicles
    "car": N(
        0.62,
        "automobile",
        "by:fordFocus kl:concept-sedan-01v1 kl:concept-sedan-02 kl:VW-new-beetle sc:seat_leon sc:peugeot-308 "
        "sc:renault-scenic sc:chevrolet sc:smart-car sc:suv",
        "1f697 1f699",
    ),
    "bus": N(0.7, "coach", "sc:bus sc:cityBus", "1f68c", turn=2.7, skip=0.3),
    "truck": N(0.7, "lorry", "sc:truck cc0:peterbilt by:dafTruck", "1f69a", turn=2.7, skip=0.3),
    "van": N(0.62, "minivan", "sc:van", "1f690", turn=2.6),
    "motorcycle": N(0.5, "motorbike", "sc:yamaha-yzr-r6", "1f3cd-fe0f", turn=2.7, skip=0.25),
    "scooter": N(0.45, "moped", "kl:scooter sc:scooter2", "1f6f5", turn=2.7, skip=0.25),
    "bicycle": N(0.5, "bike", "sc:bicycle by:bike", "1f6b2", turn=2.6, skip=0.5),
    "tricycle": N(0.4, "trike", "sc:tricycle", recolor=False),
    "forklift": N(0.55, "fork truck", "cc0:forkLift"),
    "airplane": N(0.5, "plane,aeroplane", "cc0:cartoon_biplane", "2708-fe0f 1f6e9-fe0f", turn=2.7),
    "rowboat": N(0.55, "rowing boat", "by:rowboat", lowest=0.25),
    "skateboard": N(0.36, "", "sc:skateboard", "1f6f9", recolor=False, turn=2.6, skip=0.5, lowest=0.3),
    "wheelchair": N(0.45, "", "by:wheelchair", "1f9bd", recolor=False),
    "stroller": N(0.45, "baby carriage,pushchair", "sc:stroller"),
    # Food and drink
    "hamburger": N(0.26, "burger", "by:hamburger", "1f354", recolor=False),
    "hot dog": N(0.28, "", "cc0:hotDog", "1f32d", recolor=False, lowest=0.3),
    "cupcake": N(0.22, "muffin", "cc0:cupcake", "1f9c1", recolor=False),
    "cake": N(0.32, "birthday cake", "sc:birthday_cake", "1f382", recolor=False),
    "bread": N(0.3, "loaf of bread", "cc0:bread", "1f35e", recolor=False, lowest=0.25),
    "steak": N(0.26, "beefsteak", "sc:steak", "1f969", recolor=False, lowest=0.25),
    "fruit bowl": N(0.3, "bowl of fruit", "sc:bowlWithFruits sc:apples", recolor=False, lowest=0.25),
    "salad": N(0.28, "bowl of salad", "sc:bowlWithSalad", "1f957", recolor=False, lowest=0.25),
    "cup": N(0.24, "mug", "cc0:caffe_final sc:cup kl:coffee-mug", "2615"),
    "bottle": N(0.32, "", "by:beer_bottle kl:red-wine-bottle-01 sc:wine_bottle", "1f37e"),
    # Furniture
    "chair": N(
        0.45,
        "seat",
        "by:childChair by:chairWithCushion by:ella_chair_f by:plaidChair by:chair3 by:kitchenChair cc0:oakChair "
        "cc0:plasticChair cc0:chair2 cc0:osakaChair kl:cafe-chair kl:dining-chair sc:plastic_chair sc:chair4 "
        "sc:chair3",
        "1fa91",
    ),
    "armchair": N(
        0.45,
        "easy chair",
        "cc0:winchesterArmchair by:armchair1 by:fotel cc0:armchair2 sc:armchair sc:armchair1 sc:armchair2 "
        "kl:mid-century-chair sc:modern_armchair",
        turn=2.0,
    ),
    "sofa": N(
        0.62,
        "couch",
        "kl:futon-couch kl:mid-century-bench-sofa cc0:winchesterSofa cc0:sofa2 by:couch3 by:sofa3 sc:clear_sofa "
        "sc:simple_sofa sc:beige_sofa sc:leather_sofa",
        "1f6cb-fe0f",
        turn=1.6,
    ),
    "stool": N(0.35, "", "by:green_stool cc0:stool2"),
    "table": N(0.5, "", "cc0:oakTable sc:table4 sc:table3 by:table sc:wooden_table_office"),
    "bed": N(
        0.65,
        "",
        "by:lettoCloud cc0:bed2 cc0:bed3 sc:bed1 by:juniorBed sc:captains-bed",
        "1f6cf-fe0f",
        turn=2.2,
        lowest=0.25,
    ),
    "bench": N(0.55, "park bench", "kl:concrete-bench sc:wood_bank kl:painted-bench"),
    "deck chair": N(0.5, "sun lounger,beach chair", "cc0:deckChair by:poolLounge by:chair_deck"),
    "lamp": N(
        0.36,
        "table lamp",
        "by:lamp sc:little_lamp1 sc:little_lamp2 sc:little_lamp3 kl:pedestal-vase-lamp sc:livingroom_lamp1 "
        "cc0:desklamp",
    ),
    # House
    "refrigerator": N(0.55, "fridge", "kl:fridge cc0:refrigerator cc0:largeFridge", turn=1.2),
    "washing machine": N(0.45, "washer", "sc:clothes_washing_machine", turn=1.0),
    "toaster": N(0.26, "", "sc:toaster"),
    "mixer": N(0.32, "stand mixer", "cc0:kitchenaid"),
    "kettle": N(0.28, "tea kettle", "by:boiler"),
    "pot": N(0.3, "cooking pot,saucepan", "by:largePan"),
    "toilet": N(0.42, "", "by:toilets_unit_jay_hardy cc0:toiletsUnit by:modernToilet", "1f6bd", turn=2.0),
    "bathtub": N(0.6, "bath", "by:bath_jay_hardy sc:islandBath", "1f6c1", lowest=0.3),
    "fan": N(0.36, "electric fan", "cc0:tableFan cc0:riggedFan"),
    "vase": N(0.3, "", "sc:vase1 sc:vase2 sc:vase3 sc:jar", "1f3fa"),
    "candle": N(0.32, "", "", "1f56f-fe0f"),
    "television": N(0.48, "TV", "cc0:led_tv sc:tv", "1f4fa", turn=1.1, recolor=False),
    "laptop": N(0.36, "notebook computer", "by:laptop", "1f4bb", turn=1.0),
    "computer": N(0.38, "desktop computer", "kl:apple-imac-1998", "1f5a5-fe0f", turn=1.3),
    "radio": N(0.32, "", "by:radio", "1f4fb", turn=1.1),
    "camera": N(0.28, "", "", "1f4f7"),
    "telephone": N(0.28, "phone", "", "260e-fe0f"),
    # Music, toys and sport
    "piano": N(0.6, "grand piano", "cc0:pianoAQueue", recolor=False),
    "guitar": N(0.5, "electric guitar", "cc0:electricGuitar", "1f3b8", turn=0.9),
    "xylophone": N(0.4, "", "by:xylophone", recolor=False, lowest=0.25, turn=1.3),
    "teddy bear": N(0.34, "stuffed bear", "cc0:teddyBear", "1f9f8", turn=2.5),
    "rocking horse": N(0.42, "", "cc0:caballito", turn=2.6, skip=0.4),
    "soccer ball": N(0.24, "football", "by:ballonFoot", "26bd", recolor=False),
    "basketball": N(0.24, "", "cc0:basketball", "1f3c0"),
    "puzzle cube": N(0.22, "magic cube", "by:rubix2", recolor=False),
    "toy train": N(0.4, "", "by:toyTrain", recolor=False, turn=2.5, skip=0.4),
    "doll": N(0.32, "baby doll", "sc:doll", recolor=False, turn=2.5),
    "dollhouse": N(0.5, "doll house", "sc:doll-house", turn=1.0, recolor=False),
    "chessboard": N(0.36, "chess set", "by:chessboard", recolor=False, lowest=0.25),
    "beanbag": N(0.38, "bean bag", "sc:puff"),
    "paddling pool": N(0.5, "kiddie pool", "sc:round-swimming-pool", recolor=False, lowest=0.25),
    "dartboard": N(0.3, "", "sc:dart_game", "1f3af", turn=1.0, recolor=False),
    # Outdoors and season
    "snowman": N(0.45, "", "by:bonecoDeNeve", "26c4", recolor=False, turn=2.5),
    "Christmas tree": N(0.55, "", "sc:christmas_tree by:arbolito", "1f384", recolor=False),
    "gift": N(0.28, "present", "by:gift", "1f381"),
    "parasol": N(0.55, "beach umbrella,sunshade", "cc0:umbrella"),
    "tent": N(0.55, "camping tent", "sc:campingTent", turn=1.9),
    "doghouse": N(0.48, "kennel", "sc:dog-house", turn=1.9),
    "fountain": N(0.6, "", "by:fountain", "26f2", recolor=False),
    "fire hydrant": N(0.35, "hydrant", "kl:fire-hydrant"),
    "mailbox": N(0.42, "letter box", "cc0:mofx_mailbox", "1f4eb", turn=2.6, skip=0.5),
    "trash can": N(0.38, "garbage can,bin", "kl:residential-trashcan kl:park-trashcan kl:bullet-trash-can"),
    "traffic cone": N(0.32, "road cone", "sc:cone", recolor=False),
    "lawn mower": N(0.45, "mower", "sc:mower"),
    "wheelbarrow": N(0.45, "", "cc0:wheelbarrow", lowest=0.25),
    "rock": N(0.4, "boulder,stone", "cc0:rock1 cc0:rock2 cc0:rock3", "1faa8", recolor=False),
    "barrel": N(0.38, "cask", "cc0:barrel"),
    "crate": N(0.36, "wooden crate", "cc0:crate"),
    "box": N(0.34, "cardboard box", "sc:cardboard-box sc:open-cardboard-box", "1f4e6"),
    "basket": N(0.32, "wicker basket", "sc:shopping-basket", "1f9fa"),
    "fire extinguisher": N(0.35, "", "cc0:fireExtinguisher", "1f9ef"),
    "drill": N(0.26, "power drill", "sc:perceuse-electrique", turn=2.5, skip=0.5),
    "flashlight": N(0.24, "torch", "kl:flashlight", turn=2.5, skip=0.5),
    # Clothes and bags
    "suitcase": N(0.36, "luggage", "by:suitcase", "1f9f3", turn=1.0),
    "backpack": N(0.34, "rucksack", "by:backpack", "1f392", turn=1.0),
    "briefcase": N(0.32, "", "cc0:briefcase", "1f4bc", turn=1.0),
    "handbag": N(0.3, "purse", "cc0:handbag", "1f45c", turn=1.0),
    "hat": N(0.28, "sun hat", "sc:chapeau", "1f452"),
    "cap": N(0.26, "baseball cap", "sc:casquette", "1f9e2"),
    "helmet": N(0.28, "motorcycle helmet", "sc:casque", recolor=False),
    # Plants
    "cactus": N(0.36, "", "cc0:cactus", "1f335", recolor=False),
    "potted plant": N(
        0.4,
        "houseplant",
        "by:spatifilum sc:maceta cc0:littlePlant by:decorativePlant cc0:plant",
        "1fab4",
        recolor=False,
    ),
    "bouquet": N(0.36, "bunch of flowers", "by:tulip by:tulips by:white_lily", "1f490", recolor=False),
    "tree": N(0.65, "", "sc:pine sc:copperBeech sc:ficusTree sc:poplar", "1f333 1f332", recolor=False),
    "palm tree": N(0.65, "palm", "sc:coconutTree sc:coconutTreeBended sc:palm", "1f334", recolor=False),
    # Emoji alone: animals
    "elephant": N(0.55, "", "", "1f418"),
    "tiger": N(0.5, "", "", "1f405", recolor=False),
    "monkey": N(0.38, "ape", "", "1f412", recolor=False),
    "cow": N(0.52, "", "", "1f404", recolor=False),
    "pig": N(0.42, "hog", "", "1f416"),
    "sheep": N(0.42, "lamb", "", "1f411", recolor=False),
    "camel": N(0.52, "", "", "1f42b"),
    "kangaroo": N(0.48, "", "", "1f998"),
    "turtle": N(0.34, "tortoise", "", "1f422"),
    "snake": N(0.36, "", "", "1f40d"),
    "dinosaur": N(0.55, "", "", "1f996 1f995"),
    "octopus": N(0.38, "", "", "1f419"),
    "crab": N(0.32, "", "", "1f980"),
    "fish": N(0.3, "", "", "1f41f 1f420"),
    "whale": N(0.55, "", "", "1f433 1f40b"),
    "dolphin": N(0.48, "", "", "1f42c"),
    "penguin": N(0.38, "", "", "1f427", recolor=False),
    "owl": N(0.32, "", "", "1f989", recolor=False),
    "duck": N(0.32, "", "", "1f986", recolor=False),
    "swan": N(0.38, "", "", "1f9a2"),
    "flamingo": N(0.46, "", "", "1f9a9"),
    "parrot": N(0.34, "", "", "1f99c", recolor=False),
    "butterfly": N(0.28, "", "", "1f98b"),
    "ladybug": N(0.22, "ladybird", "", "1f41e"),
    "bee": N(0.22, "honeybee", "", "1f41d", recolor=False),
    "snail": N(0.26, "", "", "1f40c"),
    "hedgehog": N(0.28, "", "", "1f994", recolor=False),
    # Emoji alone: food
    "apple": N(0.2, "", "", "1f34e 1f34f"),
    "banana": N(0.24, "", "", "1f34c"),
    "pear": N(0.22, "", "", "1f350"),
    "lemon": N(0.2, "", "", "1f34b"),
    "pineapple": N(0.28, "", "", "1f34d", recolor=False),
    "watermelon": N(0.26, "melon", "", "1f349", recolor=False),
    "strawberry": N(0.2, "", "", "1f353"),
    "tomato": N(0.2, "", "", "1f345"),
    "carrot": N(0.24, "", "", "1f955"),
    "mushroom": N(0.24, "toadstool", "", "1f344"),
    "pumpkin": N(0.3, "jack-o'-lantern", "", "1f383"),
    "pizza": N(0.28, "slice of pizza", "", "1f355", recolor=False),
    "donut": N(0.22, "doughnut", "", "1f369"),
    "cookie": N(0.2, "biscuit", "", "1f36a", recolor=False),
    "ice cream": N(0.24, "ice cream cone", "", "1f366", recolor=False),
    "lollipop": N(0.22, "", "", "1f36d", recolor=False),
    "croissant": N(0.22, "", "", "1f950", recolor=False),
    "sandwich": N(0.26, "", "", "1f96a", recolor=False),
    "cheese": N(0.22, "", "", "1f9c0"),
    "teapot": N(0.26, "", "", "1fad6"),
    # Emoji alone: plants and vehicles
    "sunflower": N(0.34, "", "", "1f33b", recolor=False),
    "rose": N(0.28, "", "", "1f339"),
    "rocket": N(0.5, "spaceship", "", "1f680"),
    "helicopter": N(0.52, "", "", "1f681"),
    "tractor": N(0.55, "", "", "1f69c"),
    "ambulance": N(0.58, "", "", "1f691", recolor=False),
    "fire engine": N(0.6, "fire truck", "", "1f692"),
    "police car": N(0.58, "", "", "1f693", recolor=False),
    "taxi": N(0.58, "cab", "", "1f695"),
    "train": N(0.6, "locomotive", "", "1f682"),
    # Emoji alone: things
    "balloon": N(0.3, "", "", "1f388"),
    "kite": N(0.32, "", "", "1fa81", recolor=False),
    "trophy": N(0.28, "", "", "1f3c6"),
    "crown": N(0.26, "", "", "1f451"),
    "bell": N(0.24, "", "", "1f514"),
    "umbrella": N(0.42, "", "", "2602-fe0f"),
    "drum": N(0.3, "", "", "1f941"),
    "violin": N(0.36, "fiddle", "", "1f3bb"),
    "trumpet": N(0.34, "", "", "1f3ba"),
    "tennis racket": N(0.36, "", "", "1f3be", recolor=False),
    "baseball": N(0.18, "", "", "26be", recolor=False),
    "alarm clock": N(0.26, "clock", "", "23f0"),
    "bucket": N(0.28, "pail", "", "1faa3"),
    "house": N(0.65, "cottage", "", "1f3e0", recolor=False),
    "castle": N(0.65, "", "", "1f3f0", recolor=False),
    "top hat": N(0.26, "", "", "1f3a9"),
    "boot": N(0.28, "", "", "1f462"),
    "sneaker": N(0.26, "running shoe", "", "1f45f"),
    "T-shirt": N(0.3, "shirt", "", "1f455"),
    "dress": N(0.36, "gown", "", "1f457"),
}


def get_article(noun: str) -> str:
    """Return the indefinite article of a noun of the table: "a" or "an"."""
    return "an" if noun[0] in "aeiou" else "a"
