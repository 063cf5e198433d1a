"""The tokenizer trained offline reads every English prompt, and common words as one token."""

import random

import pytest
from transformers import AutoTokenizer, T5Tokenizer

from editar_hf.training.tokenizer import train_tokenizer


WORDS = ["make", "the", "red", "Purple", "circle", "square", "triangle", "blue", "green", "left", "top", "remove", "a"]
ASCII = "".join(map(chr, range(32, 127)))


@pytest.fixture(scope="module")
def texts():
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=5)) for _ in range(500)]
    return [text + generator.choice(["", ".", "!"]) for text in texts] + ["zygote"]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, vocab_size=300)


def test_every_ascii_string_is_read_without_unknown_pieces(tokenizer):
    generator = random.Random(1)
    strings = [*ASCII, ASCII, *("".join(generator.choices(ASCII, k=40)) for _ in range(200))]
    for string in strings:
        assert tokenizer.unk_token_id not in tokenizer(string).input_ids, string


def test_characters_beyond_ascii_are_read_if_the_texts_hold_them():
    tokenizer = train_tokenizer(["une forêt"] * 10, vocab_size=120)
    assert tokenizer.unk_token_id not in tokenizer("ê").input_ids
    assert tokenizer.unk_token_id in tokenizer("ü").input_ids


def test_common_words_are_one_token_before_any_punctuation(tokenizer):
    for word in WORDS:
        assert tokenizer.tokenize(word) == ["▁" + word]
        assert tokenizer.tokenize(word + ".") == ["▁" + word, "."]
        assert tokenizer.tokenize(f"the {word}, the") == ["▁the", "▁" + word, ",", "▁the"]


def test_text_and_its_case_survive(tokenizer):
    for text in ("Make the Purple circle BLUE", "a zebra? (no: 2 * 3 < 7) ~ #1", "remove the red square."):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_special_pieces_are_numbered_as_in_t5(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("the").input_ids[-1] == 1
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert 98 < len(tokenizer) <= 300
    assert not any("extra_id" in piece for piece in tokenizer.get_vocab())


def test_the_same_texts_give_the_same_tokenizer(tokenizer, texts):
    again = train_tokenizer(iter(texts), vocab_size=300)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_tokenizer_survives_saving_and_loading(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for loader in (T5Tokenizer, AutoTokenizer):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is T5Tokenizer
        for text in (ASCII, "make the Purple circle blue.", ""):
            assert loaded(text).input_ids == tokenizer(text).input_ids


def test_a_vocabulary_too_small_for_the_characters_is_refused(texts):
    train_tokenizer(texts, vocab_size=98)
    with pytest.raises(ValueError, match=r"`vocab_size` is 97.*at least 98"):
        train_tokenizer(texts, vocab_size=97)
