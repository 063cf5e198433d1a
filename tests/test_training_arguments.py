"""The command line of the training scripts: both spellings of a flag, and old names for one version."""

import warnings
from dataclasses import dataclass, field

import pytest

from editar_hf.training.arguments import parse_arguments


@dataclass
class Arguments:
    dataset_name: str = field(default="a", metadata={"help": "name", "aliases": ["--source"]})
    uses_mask: bool = field(default=True, metadata={"help": "mask"})


@pytest.mark.parametrize("words", [("--dataset-name", "b"), ("--dataset_name", "b"), ("--dataset-name=b",)])
def test_flags_have_hyphens_or_underscores(words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", *words, "--no-uses-mask"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = parse_arguments(Arguments)
    assert (arguments.dataset_name, arguments.uses_mask) == ("b", False)


@pytest.mark.parametrize("words", [("--source", "b"), ("--source=b",)])
def test_old_names_are_taken_with_a_warning(words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", *words])
    with pytest.warns(FutureWarning, match="--source is now called --dataset-name"):
        assert parse_arguments(Arguments).dataset_name == "b"
