"""Language models that keep keys and values between calls: which models do, and what a call of one holds.

The interface is transformers' own: forward takes `past_key_values` and `use_cache`, and gives a cache object back. In a program the cache is
tensors, keys and values [batch, heads, past, width] of every layer, each an input and an output of role "state". Attention mask and
positions are inputs as well, so that one program serves the prompt (past = 0) and every token after it, padded or not. A model that counts
positions otherwise than from 0 on, along the mask or its padding, goes on doing so in the program.

Layers with a sliding window keep all they have seen: the window is in the mask, so the numbers are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxcompress.errors import CaptureError, InputError
from fxcompress.measure import relative_error
from fxcompress.signature import Inputs, Signature, bind, describe, forward_signature

IDS, MASK, POSITIONS, CACHE, SWITCH = "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"
LEAST = 4  # tokens: two for the past and two for the call, since export takes a size of 1 for a constant
Pairs = tuple[tuple[Tensor, Tensor], ...]


def is_kept(model: nn.Module, item: Inputs) -> bool:
    """Whether this call of this model keeps a cache: a transformers model that can generate, asked with token ids and maybe their mask."""
    can_generate: Any = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate():
        return False
    parameters, config = forward_signature(model), getattr(model, "config", None)
    if not {IDS, CACHE, SWITCH} <= parameters.parameters.keys() or getattr(config, "is_encoder_decoder", False):
        return False
    given = bind(parameters, item)
    tensors = {name for name, value in given.items() if any(isinstance(v, Tensor) for v in pytree.tree_leaves(value))}
    wanted = given.get(SWITCH) if given.get(SWITCH) is not None else getattr(config, SWITCH, False)
    ranks = all(isinstance(given[name], Tensor) and given[name].dim() == 2 for name in tensors)
    return bool(wanted) and IDS in tensors and tensors <= {IDS, MASK, POSITIONS} and given.get(CACHE) is None and ranks


def second_call(model: nn.Module, item: Inputs) -> Inputs:
    """The call cut in two: the first half of its tokens is run and leaves a cache, the second half with that cache is the example.

    CaptureError where the cache is none of growing keys and values.
    """
    parameters = forward_signature(model)
    given = _long_enough(bind(parameters, item))
    given.pop(SWITCH, None)
    total = given[IDS].shape[1]
    defaults = {MASK: torch.ones_like(given[IDS]), POSITIONS: torch.arange(total).expand_as(given[IDS])}
    for name in [n for n in defaults if n in parameters.parameters and given.get(n) is None]:
        if name == MASK or not _counts_by_mask(model, given):
            given[name] = defaults[name]
    cut = total // 2
    first = {name: value[:, :cut] if name in (IDS, MASK, POSITIONS) else value for name, value in given.items()}
    pairs = _pairs_after(model, first)
    rest = {name: value[:, cut:] if name in (IDS, POSITIONS) else value for name, value in given.items()}
    order = [n for n in (IDS, MASK, POSITIONS) if n in rest]
    return Inputs(
        roles=item.roles,
        **{n: rest[n].contiguous() for n in order},
        **{n: v for n, v in rest.items() if n not in (*order, CACHE)},
        **{CACHE: pairs},
    )


def _counts_by_mask(model: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether the model's own positions follow from mask or padding, as OPT's: then it is left to make them, where nobody gives any."""
    if MASK not in given:
        return False
    ids = given[IDS][:1, :LEAST]
    padded = {**given, IDS: ids, MASK: (torch.arange(LEAST, device=ids.device) > 0).long()[None], SWITCH: False}
    counted = {POSITIONS: torch.arange(LEAST, device=ids.device)[None]}
    left_alone, told = (
        next(leaf for leaf in pytree.tree_leaves(model(**padded, **more)) if isinstance(leaf, Tensor))[:, 1:] for more in ({}, counted)
    )
    return relative_error(left_alone, told) > math.sqrt(torch.finfo(told.dtype).eps)


def _long_enough(given: dict[str, Any]) -> dict[str, Any]:
    """Rows shorter than LEAST are repeated to that length."""
    length = given[IDS].shape[1]
    if length >= LEAST:
        return given
    index = torch.arange(LEAST) % max(1, length)
    return {n: v.index_select(1, index) if n in (IDS, MASK) else v for n, v in given.items() if n != POSITIONS}


def _pairs_after(model: nn.Module, first: Mapping[str, Any]) -> Pairs:
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    kept = getattr(model(**first, **{SWITCH: True}), CACHE, None)
    if not isinstance(kept, DynamicCache):
        raise CaptureError("the model keeps another kind of cache", why=f"it returns a {type(kept).__name__}, not a DynamicCache")
    if other := [layer for layer in kept.layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized]:
        raise CaptureError("the model keeps more than keys and values", why=f"its cache holds a {type(other[0]).__name__}")
    if any(layer.is_sliding for layer in kept.layers):
        kept = DynamicCache()
        model(**first, **{SWITCH: True, CACHE: kept})
    return pairs_of(kept)


def agree(tensors: Mapping[str, Any]) -> None:
    """Tell export what the sizes of a call have to do with each other."""
    past = tensors[CACHE][0][0].shape[2]
    for value in pytree.tree_leaves(tensors[CACHE]):
        torch._check(value.shape[2] == past)  # type: ignore[no-untyped-call]
    new = tensors[IDS].shape[1]
    for name, size in ((MASK, past + new), (POSITIONS, new)):
        if name in tensors:
            torch._check(tensors[name].shape[1] == size)  # type: ignore[no-untyped-call]


def pairs_of(cache: Any) -> Pairs:
    """Keys and values of every layer."""
    return tuple((layer.keys, layer.values) for layer in cache.layers)


def cache_of(pairs: Pairs, cache: Any = None) -> Any:
    """A transformers cache that holds these tensors: the given one, which is changed, or a new one."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache() if cache is None else cache
    if len(cache.layers) != len(pairs) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        cache.layers = [DynamicLayer() for _ in pairs]
    for layer, (keys, values) in zip(cache.layers, pairs, strict=True):
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return cache


def is_cache(value: Any) -> bool:
    """Whether this is a cache object of transformers."""
    return hasattr(value, "layers") and hasattr(value, "get_seq_length")


def opened(result: Any) -> Any:
    """The result with the tensors of its cache in the place of the cache."""
    return pytree.tree_map(lambda leaf: pairs_of(leaf) if is_cache(leaf) else leaf, result, is_leaf=is_cache)


def state_names(names: Sequence[str]) -> list[str]:
    """Those of the names that are parts of the cache."""
    return [name for name in names if name.startswith(f"{CACHE}_")]


def keeps(inputs: Sequence[Any]) -> bool:
    """Whether a program with these inputs keeps a cache."""
    return any(v.role == "state" and v.name.startswith(f"{CACHE}_") for v in inputs)


def flat_inputs(signature: Signature, inputs: Sequence[Any], item: Any) -> list[Tensor]:
    """The tensors of one call in the order of the program's inputs. InputError when the call doesn't have the captured form.

    What a language model's call leaves out is filled in as the model does it: an empty cache, a mask of ones, positions that count on.
    """
    given = Inputs.of(item)
    return signature.flatten(Inputs(**_completed(signature, inputs, given)) if keeps(inputs) else given)


def _completed(signature: Signature, inputs: Sequence[Any], item: Inputs) -> dict[str, Any]:
    names = signature.captured()
    given = {n: v for n, v in bind(signature.parameters, item).items() if n in names or n not in (SWITCH, "return_dict")}
    ids = given.get(IDS)
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise InputError("a language model takes token ids", why=f"{IDS} is {describe(ids)}", do=f"{IDS}=[batch, tokens], int64")
    given[CACHE] = pairs = _given_pairs(given.get(CACHE), inputs, len(ids))
    given.update(_mask_and_positions(given, pairs[0][0].shape[2], [n for n in (MASK, POSITIONS) if n in names]))
    return given


def _mask_and_positions(given: Mapping[str, Any], past: int, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    ids = given[IDS]
    total = past + ids.shape[1]
    for name in names:
        value = given.get(name)
        if value is None:
            value = torch.ones(len(ids), total, dtype=torch.int64) if name == MASK else torch.arange(past, total)[None]
        elif name == MASK and (not isinstance(value, Tensor) or value.shape != (len(ids), total)):
            why = f"{past} kept and {ids.shape[1]} new tokens in {len(ids)} rows need [{len(ids)}, {total}], got {describe(value)}"
            raise InputError("the attention mask doesn't cover the tokens", why=why, do="mask past and new tokens: 1 to see, 0 for padding")
        yield name, value.to(torch.int64).expand(len(ids), -1) if isinstance(value, Tensor) else value


def _given_pairs(cache: Any, inputs: Sequence[Any], batch: int) -> Pairs:
    """The tensors of the cache given; those of an empty one where it is None or holds nothing yet."""
    if is_cache(cache):
        from transformers.cache_utils import DynamicCache, DynamicLayer

        if isinstance(cache, DynamicCache) and not cache.get_seq_length():
            cache = None
        elif not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
            why = f"it is a {type(cache).__name__} of {type(cache.layers[0]).__name__}s"
            raise InputError("this kind of cache can't be continued", why=why, do="pass what the compiled model returned, or none")
        else:
            return pairs_of(cache)
    if cache is not None:
        parts = pytree.tree_leaves(cache)
        if len(parts) != sum(v.role == "state" for v in inputs) or not all(isinstance(t, Tensor) and t.dim() == 4 for t in parts):
            why = f"it is {describe(cache)}" if len(parts) == 1 else f"it has {len(parts)} parts"
            raise InputError(f"{CACHE} is no key/value cache of this model", why=why, do="pass what the compiled model returned, or none")
        return cache  # type: ignore[no-any-return]
    states = [v for v in inputs if v.role == "state"]
    empty = [torch.zeros([batch if i == 0 else n if isinstance(n, int) else 0 for i, n in enumerate(v.shape)], dtype=v.dtype) for v in states]
    return tuple(zip(empty[::2], empty[1::2], strict=True))


def whole_call(signature: Signature, inputs: Sequence[Any], tensors: Sequence[Tensor]) -> Inputs:
    """A call that is captured as the one with these flat inputs was: of a language model with as many tokens as cache and call hold together,
    which `second_call` cuts."""
    item = signature.item(tensors)
    roles = {v.name: v.role for v in inputs if v.role not in ("input", "state")}
    if not keeps(inputs):
        return Inputs(*item.args, roles=roles, **item.kwargs)
    ids, total = item.kwargs[IDS], item.kwargs[IDS].shape[1] + pytree.tree_leaves(item.kwargs[CACHE])[0].shape[2]
    rest = {n: v for n, v in item.kwargs.items() if n not in (IDS, MASK, POSITIONS, CACHE, SWITCH)}
    return Inputs(roles=roles, **{IDS: ids[:, torch.arange(total) % ids.shape[1]]}, **rest)


def closed(result: Any, signature: Signature, item: Inputs) -> Any:
    """The result as the model gives it: its cache is the object that came in, now longer, or a new one; None for use_cache=False."""
    given = bind(signature.parameters, item)
    if not isinstance(result, Mapping) or CACHE not in result:
        return result  # read back without transformers: states by name
    fields: dict[str, Any] = dict(result)
    pairs = fields.pop(CACHE)
    if given.get(SWITCH) is not False:
        fields[CACHE] = cache_of(pairs, given[CACHE] if is_cache(given.get(CACHE)) else None)
    return type(result)(**fields)


def continued(signature: Signature, inputs: Sequence[Any], item: Any, run: Any) -> list[Tensor]:
    """The tensors of the second half of a call, after `run` (flat inputs -> result) has seen the first: what `second_call` is to a model.

    A program without a cache, a call that brings its own, and rows too short to be cut give the whole call.
    """
    flat = flat_inputs(signature, inputs, item)
    if not keeps(inputs) or (given := bind(signature.parameters, Inputs.of(item))).get(CACHE) is not None or given[IDS].shape[1] < LEAST:
        return flat
    cut = given[IDS].shape[1] // 2
    first = {n: v[:, :cut] if isinstance(v, Tensor) else v for n, v in given.items()}
    pairs = run(flat_inputs(signature, inputs, first))[CACHE]
    rest = {n: v[:, cut:] if isinstance(v, Tensor) and n != MASK else v for n, v in given.items()}
    return flat_inputs(signature, inputs, {**rest, CACHE: pairs})
