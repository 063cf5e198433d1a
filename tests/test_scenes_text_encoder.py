"""The text encoder of the scenes: its tokenizer, how its tokens meet the teacher's, and that it learns."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from tiny import redraw_weights
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast, T5EncoderModel

from editar_hf import EditARImageProcessor, EditARProcessor


sys.path.insert(0, str(Path(__file__).parents[1] / "projects" / "scenes"))

import train_text_encoder as scenes


OTHERS = ["the", "old", "river", "house", "happy", "glass", "running", "tall", "stone", "winter", "banana", "tiger"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    names = {"cat": ["kitten"], "dog": ["puppy"], "T-shirt": [], "traffic light": [], "orange": []}
    nouns = {
        noun: {"synonyms": synonyms, "article": "a", "size": 0.4, "recolor": True} for noun, synonyms in names.items()
    }
    table = {"nouns": nouns, "colors": ["red", "blue", "green"], "held_out_pairs": []}
    (folder / "bank.json").write_text(json.dumps(table))
    return scenes.Words.read(folder, OTHERS)


@pytest.fixture(scope="module")
def tokenizer(words):
    return scenes.build_tokenizer(words, vocab_size=800, num_word_pieces=160)


@pytest.fixture(scope="module")
def teacher():
    """A BERT of two layers that splits words into pieces of at most two letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{a}" for a in letters), *".,-:"]
    pieces += [f"##{a}{b}" for a in letters[:8] for b in letters[:20]] + ["ca", "do", "re", "ti"]
    backend = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = redraw_weights(BertModel(config, add_pooling_layer=False), scale=0.2).requires_grad_(False)
    return model, PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def test_words_are_one_token_each_and_case_is_ignored(tokenizer, words):
    assert tokenizer.tokenize("make the cat red") == ["▁make", "▁the", "▁cat", "▁red"]
    assert tokenizer.tokenize("Make the CAT red.") == ["▁make", "▁the", "▁cat", "▁red", "."]
    assert tokenizer.tokenize("a happy river") == ["▁a", "▁happy", "▁river"]
    assert tokenizer.tokenize("the T-shirt") == ["▁the", "▁t", "-", "shirt"]
    texts = [text for text, _ in words.list_instructions(50, seed=3)]
    assert all(len(tokenizer.tokenize(text)) == len(scenes.WORD.findall(text)) for text in texts)


def test_no_english_text_is_unknown(tokenizer):
    ids = tokenizer('Zyxw-qrst & "unheard" words; 100 % (ok)?')["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id == 0


def test_words_are_numbered_by_their_characters():
    text = "black-and-white cat, please"
    offsets = [(0, 0), (0, 2), (2, 5), (5, 6), (6, 9), (9, 10), (10, 15), (15, 18), (19, 20), (20, 27), (0, 0)]
    assert scenes.number_words(text, offsets) == [-1, 0, 0, 1, 2, 3, 4, 5, 6, 7, -1]


def test_a_token_of_two_words_is_refused():
    with pytest.raises(ValueError, match="part of 2 words"):
        scenes.number_words("red car", [(0, 7)])


def test_every_token_gets_the_mean_state_of_its_word(tokenizer, teacher):
    model, teacher_tokenizer = teacher
    texts = ["Make the ticadore red.", "a cat"]
    batch, targets, mask = scenes.Lesson(tokenizer, model, teacher_tokenizer).prepare(texts)
    for row, text in enumerate(texts):
        states = model(**teacher_tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        tokens = teacher_tokenizer(text)
        for token, position in enumerate(tokenizer(text, return_offsets_mapping=True)["offset_mapping"]):
            if position[0] == position[1]:
                continue
            (word,) = (match for match in scenes.WORD.finditer(text) if match.start() <= position[0] < match.end())
            pieces = [
                index
                for index in range(1, len(tokens["input_ids"]) - 1)
                if word.start() <= tokens.token_to_chars(index).start < word.end()
            ]
            torch.testing.assert_close(targets[row, token], states[pieces].mean(0), rtol=1e-4, atol=1e-4)
    assert (mask.sum(1) == batch["attention_mask"].sum(1)).all()
    assert torch.equal(mask, batch["attention_mask"] == 1)


def test_the_loss_falls_and_the_folder_loads(tokenizer, teacher, words, tmp_path):
    torch.manual_seed(0)
    lesson = scenes.Lesson(tokenizer, *teacher)
    rng = random.Random(0)
    lesson.standardize([scenes.draw_sentence(rng, words) for _ in range(64)])
    encoder = scenes.build_text_encoder(len(tokenizer), hidden_size=64, num_layers=1)
    scenes.start_from_teacher(encoder, tokenizer, *teacher)
    batches = scenes.draw_batches(rng, lambda: scenes.draw_sentence(rng, words), batch_size=16)
    head, losses = scenes.train(encoder, lesson, batches, num_steps=64, learning_rate=5e-3)
    assert sum(losses[-16:]) < 0.8 * sum(losses[:16])
    sentences = [text for text, _ in words.list_instructions(16, seed=1)]
    assert scenes.measure_fidelity(encoder, head, lesson, sentences) > 0.3
    scenes.save(tmp_path / "text-encoder", encoder, tokenizer, {"fit": 1.0})
    loaded = T5EncoderModel.from_pretrained(tmp_path / "text-encoder", dtype=torch.float32)
    loaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text-encoder")
    inputs = loaded_tokenizer("make the CAT red", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [tokenizer("make the cat red")["input_ids"]]
    expected = encoder.float()(inputs["input_ids"]).last_hidden_state
    torch.testing.assert_close(loaded(inputs["input_ids"]).last_hidden_state, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["text-encoder"]
    # A later run with other pieces goes on from it.
    later_words = scenes.Words(words.nouns | {"violin": words.nouns["cat"]}, words.colors, words.others)
    later_tokenizer = scenes.build_tokenizer(later_words, vocab_size=800, num_word_pieces=160)
    later = scenes.build_text_encoder(len(later_tokenizer), hidden_size=64, num_layers=1)
    scenes.start_from_folder(later, later_tokenizer, tmp_path / "text-encoder")
    inputs = later_tokenizer("make the cat red", return_tensors="pt")
    torch.testing.assert_close(later(inputs["input_ids"]).last_hidden_state, expected)


def test_a_batch_holds_sentences_of_like_length():
    rng = random.Random(0)
    batches = scenes.draw_batches(rng, lambda: " ".join(["word"] * rng.randint(1, 32)), batch_size=8, pool=16)
    drawn = [[len(sentence.split()) for sentence in next(batches)] for _ in range(32)]
    assert all(len(lengths) == 8 and max(lengths) - min(lengths) <= 8 for lengths in drawn)
    assert len({lengths[0] for lengths in drawn}) > 8


def test_a_processor_keeps_the_tokenizer(tokenizer, tmp_path):
    processor = EditARProcessor(EditARImageProcessor(size=16, stride=4), tokenizer, num_text_tokens=8)
    processor.save_pretrained(tmp_path)
    loaded = EditARProcessor.from_pretrained(tmp_path)
    assert torch.equal(loaded(text="The CAT").input_ids, processor(text="the cat").input_ids)
    assert loaded(text="the cat").input_ids.shape == (1, 8)


def test_a_probe_reads_the_color_that_stands_before_a_noun(tokenizer, words):
    class Copy(torch.nn.Module):
        """States that are the token's number and the one before, one-hot."""

        def forward(self, input_ids, attention_mask):
            one_hot = torch.nn.functional.one_hot(input_ids, len(tokenizer)).float()
            before = torch.roll(one_hot, 1, dims=1) if self.sees_before else one_hot
            return type("Output", (), {"last_hidden_state": torch.cat([one_hot, before], dim=-1)})

    model = Copy()
    model.sees_before = True
    assert scenes.measure_binding(model, tokenizer, words, count=400) == {"color": 1.0, "which": 1.0}
    model.sees_before = False
    assert scenes.measure_binding(model, tokenizer, words, count=400)["which"] < 0.75


def test_lengths_count_the_end_and_the_task_prefix(tokenizer, words):
    report = scenes.measure_lengths(tokenizer, words, count=500)
    assert report["fit"] == 1
    assert 20 <= report["max_tokens"] <= 32
