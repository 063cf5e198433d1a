"""Train a small T5 tokenizer on the prompts of a data set, for a text encoder that is trained from scratch.

`transformers.T5Tokenizer` holds a Unigram model. The Unigram trainer ignores how often each word occurs, so on prompts
from templates, with few distinct words, it keeps hardly any whole word. The pieces are therefore found by byte-pair
encoding (BPE), which counts the words.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import T5Tokenizer


# T5's order: padding 0, end 1, unknown 2.
SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>"]
# The mark of a space and all visible ASCII characters, so that no English prompt contains `<unk>`.
BASE_ALPHABET = {"▁", *map(chr, range(33, 127))}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> T5Tokenizer:
    """Train a tokenizer. Its pieces are all ASCII characters, all characters of `texts`, and their most common words.

    Case is preserved. The same texts give the same tokenizer.

    Args:
        texts (`Iterable[str]`): Prompts in the form that the text encoder will read.
        vocab_size (`int`): Largest number of pieces, including the three special pieces. Few or short texts give fewer.

    Raises:
        ValueError: If `vocab_size` is too small for the characters and the special pieces.

    Example:

    ```python
    >>> from editar_hf.training.tokenizer import train_tokenizer
    >>> train_tokenizer(["make the red circle blue"] * 100, vocab_size=120).tokenize("the circle")
    ['▁the', '▁circle']

    ```
    """
    texts = list(texts)
    alphabet = BASE_ALPHABET.union(*("".join(text.split()) for text in texts))
    smallest_size = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest_size:
        raise ValueError(
            f"`vocab_size` is {vocab_size}; the special pieces and the characters of ASCII and of `texts` need at "
            f"least {smallest_size}."
        )
    merges = Tokenizer(models.BPE(unk_token="<unk>"))
    # No piece contains both letters and punctuation: "left" is the same piece in "left", "left," and "left.".
    t5_words = T5Tokenizer(extra_ids=0).backend_tokenizer.pre_tokenizer
    merges.pre_tokenizer = pre_tokenizers.Sequence([t5_words, pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=list(alphabet), show_progress=False
    )
    merges.train_from_iterator(texts, trainer)

    vocab = merges.get_vocab()
    pieces = sorted(vocab, key=lambda piece: vocab[piece])
    # All scores are equal, so a word is split into the smallest possible number of pieces.
    return T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)
