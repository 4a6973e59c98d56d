"""Decode a packed model token by token on a CPU: all decoder layers in one call of the kernels, and the head in another.

A product with a packed matrix takes tens of microseconds, and so does every operation of torch between two of them: norms, rotations and attention
would take more of a token's time than the weights. `fuse` lets networks that are built as Llama's (Mistral's, Qwen2's and Qwen3's too) compute one
token with a cache by `compress_kernels.sparse24.decode`. Everything else goes the network's own way: prompts, batches, padding, sliding windows,
gradients, other devices, and networks that somebody put hooks or adapters into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from compress.runtime import Sparse24Linear
from compress_kernels.native import native
from compress_kernels.sparse24 import Packed24, unwatched
from compress_kernels.sparse24.cpu import FLOATING
from compress_kernels.sparse24.decode import PROJECTIONS, Decoder, LayerParts, dense_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NETWORKS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
_ATTENTION = ("sdpa", "eager")  # what computes softmax(q k) v and nothing else
_ROOM = 64  # tokens a cache has room for beyond those in it, at least; beyond 128 tokens half as many as are in it


def fuse(model: PreTrainedModel, *, control: bool = False) -> bool:
    """Let a packed model decode fused if it can, and say whether it can. Weights, names and what is saved stay as they are.

    control: a dense bfloat16 model instead, by the same code, which tells what that gains from what sparsity does.
    """
    network: Any = model.base_model
    if native("sparse24").library is None or type(network).__name__ not in _NETWORKS or not _plain(network, control):
        return False
    if not isinstance(network.forward, FusedForward):
        vars(network)["forward"] = FusedForward(network)
    head: Any = model.get_output_embeddings()
    if type(head) is nn.Linear and not isinstance(head.forward, FusedHead):
        vars(head)["forward"] = FusedHead(head)
    return True


def unfuse(model: PreTrainedModel) -> None:
    """Take back what `fuse` did, for comparisons."""
    for module in (model.base_model, model.get_output_embeddings()):
        if module is not None and isinstance(module.forward, (FusedForward, FusedHead)):
            del module.forward


class FusedForward:
    """Stands in for the `forward` of a network without its head.

    What could keep a token from the kernels is looked at in two places: what a call says, each time; the network itself (that its modules are its
    own, unpatched and unwatched, and where its tensors are) when a cache is new here and when a hook was registered anywhere since. Until then the
    tensors of that look are held, so that their memory stays.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        self.network, self.own = network, network.forward
        self._modules = {name: type(module) for name, module in network.named_modules()}
        self._addresses: tuple[int, ...] = ()
        self._decoder: Decoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the network looks at its own tensors."""
        return {**vars(self), "_addresses": (), "_decoder": None}

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        one_token = input_ids is not None and input_ids.shape == (1, 1) and inputs_embeds is None and use_cache is not False
        # What traces or compiles the network is to see its own operations.
        if one_token and not torch.is_grad_enabled() and unwatched(input_ids):
            assert input_ids is not None
            if self._asks_for_no_more(input_ids, attention_mask, position_ids, kwargs):
                storage = self._storage(past_key_values)
                if storage is not None:
                    return self._step(storage, input_ids, position_ids, past_key_values)
        return self.own(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _asks_for_no_more(self, ids: Tensor, mask: Any, positions: Tensor | None, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call wants the last hidden state of one token that sees all tokens before it, and nothing else."""
        config: Any = self.network.config
        if not ids.is_cpu or self.network.training or config._attn_implementation not in _ATTENTION or config.use_cache is False:
            return False
        if config.output_attentions or config.output_hidden_states:
            return False
        if config.return_dict is False or kwargs.get("return_dict") is False:
            return False
        if any(value is not None and value is not False for value in kwargs.values()):
            return False
        if positions is not None and positions.shape != (1, 1):
            return False
        return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all()))

    def _storage(self, cache: Any) -> _Storage | None:
        """The memory of the cache with room for a token, or None where the network has to go its own way."""
        if type(cache) is not DynamicCache:
            return None
        found: _Storage | None = vars(cache).get("_fused_storage")
        if found is not None and found.network is self and found.current(cache):
            if found.tokens == found.buffer.shape[3]:
                found.grow()
            return found
        layers: list[Any] = cache.layers
        # Sliding windows keep less than all tokens, and have layers of another kind.
        if cache.offloading or any(type(layer) is not DynamicLayer or not layer.is_initialized for layer in layers):
            return None
        decoder = self._look()
        if decoder is None or len(layers) != decoder.count or not _fit(layers, decoder):
            return None
        vars(cache)["_fused_storage"] = found = _Storage(cache, decoder, self)
        return found

    def _look(self) -> Decoder | None:
        """The decoder for the network as it is now, or None where somebody watches or replaced something inside or there is no kernel."""
        network: Any = self.network
        inside = {name: module for name, module in network.named_modules() if module is not network}
        if {"": type(network), **{name: type(module) for name, module in inside.items()}} != self._modules:
            return None
        if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in inside.values()):
            return None
        addresses = tuple(t.data_ptr() for t in (*network.parameters(), *network.buffers()))
        if addresses != self._addresses:
            self._addresses, self._decoder = addresses, _decoder(network)
        return self._decoder

    def _step(
        self, storage: _Storage, input_ids: Tensor, position_ids: Tensor | None, cache: DynamicCache
    ) -> BaseModelOutputWithPast:
        network: Any = self.network
        x = network.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.tensor([[storage.tokens]])
        cos, sin = network.rotary_emb(x, position_ids=position_ids)
        out = storage.decoder.step(x, cos, sin, storage.buffer, storage.tokens)
        storage.advance()
        return BaseModelOutputWithPast(last_hidden_state=out, past_key_values=cache)


class FusedHead:
    """Stands in for the `forward` of a dense head, for one token: torch's product reads memory at a third of its rate on some processors."""

    def __init__(self, head: nn.Linear) -> None:
        self.head, self.own = head, head.forward

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.head.weight, self.head.bias
        one_token = x.numel() == x.shape[-1] and x.is_cpu and not torch.is_grad_enabled()
        if one_token and unwatched(x) and type(weight) is nn.Parameter and x.dtype in FLOATING:
            alike = weight.is_cpu and x.dtype is weight.dtype and (bias is None or bias.dtype is weight.dtype)
            if alike and weight.is_contiguous() and x.is_contiguous():
                return dense_tokens(x, weight, bias)
        return self.own(x)


class _Storage:
    """The keys and values of a cache in one piece of memory with room for more, so that a token is written and not everything copied.

    The cache's own tensors are views of it. Where they are no longer those that were put there (cropped, reordered, replaced, or the cache is a
    copy), what the cache holds is copied to new memory, so that no two caches ever write to the same.
    """

    def __init__(self, cache: DynamicCache, decoder: Decoder, network: FusedForward) -> None:
        self.decoder, self.network = decoder, network
        self.layers: list[Any] = list(cache.layers)
        self.tokens = cache.get_seq_length()
        self._hooks = RemovableHandle.next_id
        self.grow()

    def grow(self) -> None:
        """Move what is there to new memory with room for more."""
        self.buffer = self.decoder.cache(self.tokens + max(_ROOM, self.tokens // 2))
        for index, layer in enumerate(self.layers):
            for offset, tensor in enumerate((layer.keys, layer.values)):
                self.buffer[2 * index + offset, :, :, : self.tokens] = tensor
        self._show()

    def current(self, cache: DynamicCache) -> bool:
        """Whether it still is the cache's, and no hook was registered since the network was looked at."""
        if RemovableHandle.next_id != self._hooks or len(self.layers) != len(cache.layers):
            return False
        layers: list[Any] = cache.layers
        pairs = zip(self.layers, layers, self._views[::2], self._views[1::2], strict=True)
        return all(own is layer and layer.keys is keys and layer.values is values for own, layer, keys, values in pairs)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a cache has none, and gets its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def advance(self) -> None:
        """A token more is in the memory."""
        self.tokens += 1
        self._show()

    def _show(self) -> None:
        """Let the cache's layers have the tokens in the memory as theirs."""
        self._views = self.buffer.narrow(3, 0, self.tokens).unbind(0)
        for index, layer in enumerate(self.layers):
            layer.keys, layer.values = self._views[2 * index], self._views[2 * index + 1]


def _fit(layers: Sequence[Any], decoder: Decoder) -> bool:
    """Whether the layers of a cache have the keys and values of one sequence, as the decoder computes them."""
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    expected = (1, decoder.kv_heads, layers[0].get_seq_length(), decoder.head_dim)
    return all(t.shape == expected and t.dtype is decoder.dtype and t.is_cpu for t in tensors)


def _projections(layer: Any) -> dict[str, nn.Module]:
    """The layer's linear layers by the names of `PROJECTIONS`."""
    return {name: getattr(layer.self_attn if name in "qkvo" else layer.mlp, f"{name}_proj") for name in PROJECTIONS}


def _plain(network: Any, control: bool) -> bool:
    """Whether every matrix is a packed one, or a dense bfloat16 one, and every activation function SiLU."""
    silu = (nn.SiLU, type(ACT2FN["silu"]))

    def fits(projection: Any) -> bool:
        if not control:
            return isinstance(projection, Sparse24Linear)
        return type(projection) is nn.Linear and projection.weight.dtype is torch.bfloat16 and projection.in_features % 4 == 0

    return all(isinstance(layer.mlp.act_fn, silu) and all(map(fits, _projections(layer).values())) for layer in network.layers)


def _decoder(network: Any) -> Decoder | None:
    """The network's layers as what the kernels take, or None where there is no kernel for them."""
    if len({_activation(p) for layer in network.layers for p in _projections(layer).values()}) > 1:
        return None
    layers, norm, dtype = (
        [_parts(layer) for layer in network.layers],
        network.norm.weight.detach(),
        network.embed_tokens.weight.dtype,
    )
    scalings = {layer.self_attn.scaling for layer in network.layers}
    epsilons = {network.norm.variance_epsilon, *(parts.eps for parts in layers)}
    if len(scalings) > 1 or len(epsilons) > 1 or Decoder.problem(layers, norm, dtype):
        return None
    return Decoder(layers, norm, scalings.pop(), dtype)


def _parts(layer: Any) -> LayerParts:
    projections: dict[str, Any] = _projections(layer)
    attention, before, after = layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm
    norms = {name: getattr(attention, name).weight.detach() for name in ("q_norm", "k_norm") if hasattr(attention, name)}
    return LayerParts(
        {name: _matrix(p) for name, p in projections.items()},
        {name: None if p.bias is None else p.bias.detach() for name, p in projections.items()},
        before.weight.detach(),
        after.weight.detach(),
        norms.get("q_norm"),
        norms.get("k_norm"),
        attention.head_dim,
        before.variance_epsilon,
        _activation(projections["q"]),
    )


def _matrix(projection: Any) -> Packed24:
    if isinstance(projection, Sparse24Linear):
        return Packed24(projection.values, projection.meta, projection.scale)
    return Packed24(projection.weight.detach(), torch.empty(0, dtype=torch.uint8), None)


def _activation(projection: Any) -> Any:
    return projection.activation if isinstance(projection, Sparse24Linear) else "dense"
