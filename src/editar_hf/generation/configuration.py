"""The settings of decoding, with the published defaults in place of transformers' global ones."""

from transformers import GenerationConfig

from ..checks import check_flag, check_integer, check_number


# Source: the defaults of the published sampling script; the scale is that of EditAR (arXiv 2501.04699), section 4.
PUBLISHED_SETTINGS = {"do_sample": True, "temperature": 1.0, "top_k": 1000, "top_p": 1.0, "guidance_scale": 3.0}


class EditARGenerationConfig(GenerationConfig):
    """Hold the settings of `generate`; one left out, or None, takes its published value.

    Args:
        do_sample (`bool`): Sample, or take the likeliest token at every position. Published: True.
        temperature (`float`): Divides the logits; positive. Published: 1.0.
        top_k (`int`): Sample among so many of the likeliest tokens; 0, or more than the vocabulary has, means all.
            Published: 1000.
        top_p (`float`): Sample among the likeliest tokens that together reach this probability, in (0, 1]. Published:
            1.0, all.
        guidance_scale (`float`): Weight of the prompt; 1 decodes without guidance. Published: 3.0.

    Raises:
        ValueError: If a value is out of range, or a setting of transformers' own `generate` is given that this
            decoding does not have.

    Example:

    ```python
    >>> from editar_hf.generation import EditARGenerationConfig
    >>> EditARGenerationConfig(do_sample=False).guidance_scale
    3.0

    ```
    """

    def __init__(self, **kwargs):
        # Names with an underscore are what transformers notes about where a configuration came from.
        given = {name: value for name, value in kwargs.items() if value is not None and not name.startswith("_")}
        super().__init__(**{**PUBLISHED_SETTINGS, **given})

    @classmethod
    def from_model_config(cls, model_config) -> "EditARGenerationConfig":
        """Return the published settings: the network's configuration holds none."""
        return cls()

    def to_diff_dict(self) -> dict:
        """Return the settings as they are saved.

        Greedy ones leave out the published settings of sampling: transformers warns of each when it loads them.
        """
        settings = super().to_diff_dict()
        if not self.do_sample:
            for name in ("temperature", "top_k", "top_p"):
                if settings.get(name) == PUBLISHED_SETTINGS[name]:
                    del settings[name]
        return settings

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None):
        """Check types and ranges; every finding is an error, so transformers' two arguments change nothing."""
        check_flag("do_sample", self.do_sample)
        for name in ("temperature", "top_p", "guidance_scale"):
            setattr(self, name, check_number(name, getattr(self, name)))
        self.top_k = check_integer("top_k", self.top_k, minimum=0)
        if not self.temperature >= 0 or (self.do_sample and self.temperature == 0):
            raise ValueError(
                f"`temperature` is {self.temperature}; sampling needs a positive one. For the likeliest tokens pass "
                "`do_sample=False`."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}; it is a probability in (0, 1], and 1 keeps all tokens.")
        known = {*PUBLISHED_SETTINGS, "transformers_version"}
        for name, value in vars(self).items():
            if value is not None and not name.startswith("_") and name not in known:
                raise ValueError(
                    f"`{name}` is {value!r}, a setting that EditAR's decoding does not have; remove it. There are "
                    f"{', '.join(PUBLISHED_SETTINGS)}."
                )


def resolve_generation_config(
    own: GenerationConfig, given: GenerationConfig | None, arguments: dict
) -> EditARGenerationConfig:
    """Merge the model's own settings, a configuration given to `generate` and its arguments; later ones win.

    What is None says nothing, so a partial `GenerationConfig(top_k=5)` changes one setting.

    Raises:
        ValueError: If a resulting value is out of range, or `given` is no configuration.
    """
    if given is not None and not isinstance(given, GenerationConfig):
        raise ValueError(f"`generation_config` is {given!r:.80}; pass a `GenerationConfig`.")
    layers = (own.to_dict(), {} if given is None else given.to_dict(), arguments)
    return EditARGenerationConfig(
        **{name: value for layer in layers for name, value in layer.items() if value is not None}
    )
