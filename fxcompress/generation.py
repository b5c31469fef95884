"""`generate` of a compiled language model: transformers' own, over the compiled module."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fxcompress.cached import SWITCH

PASSED_ON = ("tokenizer", "assistant_tokenizer")  # generate hands these to forward (transformers 5.23), where models ignore them


@functools.cache
def generating(base: type[Any]) -> type[Any]:
    """The module class `base` with transformers' GenerationMixin; `base` itself where transformers isn't installed."""
    try:
        from transformers import GenerationMixin
    except ImportError:
        return base

    class CausalModule(base, GenerationMixin):  # type: ignore[misc, unused-ignore]
        """A compiled language model that generates: greedy, sampling, beams, batches padded on the left, streamers."""

        main_input_name = "input_ids"
        _is_stateful = False

        def __init__(self, compiled: Any) -> None:
            super().__init__(compiled)
            self.config = model_config(compiled.config)
            self.generation_config = generation_config(compiled.generation_config, self.config)

        @classmethod
        def can_generate(cls) -> bool:
            return True

        @classmethod
        def is_remote_code(cls) -> bool:
            return False

        def get_experts_implementation(self) -> dict[str, str]:
            return {}

    return CausalModule


def forward_of(compiled: Any) -> Callable[..., Any]:
    """The call of the compiled model under the signature it takes, which is how transformers learns whether it takes a mask and positions."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **{name: value for name, value in kwargs.items() if name not in PASSED_ON})

    names = {*compiled.signature.captured(), SWITCH}
    taken = [p for n, p in compiled.signature.parameters.parameters.items() if n in names]
    forward.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    return forward


def model_config(config: Any) -> Any:
    """The config as an object of transformers: one read from an artifact is entries only."""
    if not isinstance(config, Mapping):
        return config
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    name, entries = config.get("model_type"), dict(config)
    if name in CONFIG_MAPPING:
        return CONFIG_MAPPING[name].from_dict(entries)
    return PreTrainedConfig.from_dict(entries)


def generation_config(given: Any, config: Any) -> Any:
    """The model's generation config, an object of transformers; made from the model's config where there is none."""
    from transformers import GenerationConfig

    if isinstance(given, Mapping):
        return GenerationConfig.from_dict(dict(given))
    return GenerationConfig.from_model_config(config) if given is None else given
