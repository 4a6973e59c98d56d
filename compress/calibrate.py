"""What flows into every weight matrix: the statistics that one-shot pruning and quantisation work from.

`InputCapture` watches products, not modules, so it sees fused experts, transposed layers and bare parameters alike.
`walk_blocks` is the layer-sequential calibration of SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774) and Wanda (Sun et
al. 2023, arXiv 2306.11695): every block is measured on what the already altered blocks before it put out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from compress.errors import CompressError, UsageError
from compress.structure import Block, decoder_blocks
from compress.weights import WeightRef


@dataclass
class InputStats:
    """Sums over the `tokens` inputs x `[in]` of one matrix, in float32.

    `sum_squares` `[in]` is the sum of x*x by channel, `gram` `[in, in]` the sum of x x^T (None when it was not asked for).
    A matrix that no token reached, as an expert that was never chosen, has 0 tokens and zeros.
    """

    tokens: int
    sum_squares: Tensor
    gram: Tensor | None

    def add(self, other: InputStats) -> None:
        """Add the sums of other inputs of the same matrix, in place."""
        self.tokens += other.tokens
        self.sum_squares += other.sum_squares
        if self.gram is not None and other.gram is not None:
            self.gram += other.gram


# Position of the two factors of a product among the arguments, and their keyword names.
_PRODUCTS: dict[Any, tuple[int, tuple[str, str]]] = {
    functional.linear: (0, ("input", "weight")),
    torch.matmul: (0, ("input", "other")),
    torch.mm: (0, ("input", "mat2")),
    torch.bmm: (0, ("input", "mat2")),
    torch.addmm: (1, ("mat1", "mat2")),
    torch.baddbmm: (1, ("batch1", "batch2")),
    torch.Tensor.matmul: (0, ("self", "other")),
    torch.Tensor.__matmul__: (0, ("self", "other")),
    torch.Tensor.__rmatmul__: (0, ("self", "other")),
    torch.Tensor.mm: (0, ("self", "mat2")),
    torch.Tensor.bmm: (0, ("self", "mat2")),
    torch.Tensor.addmm: (1, ("mat1", "mat2")),
    torch.Tensor.baddbmm: (1, ("batch1", "batch2")),
}


class InputCapture(TorchFunctionMode):
    """Sums up the inputs of the matrices in `refs` while it is entered.

    It sees linear, matmul, `@`, mm, addmm, bmm and baddbmm and recognises the weight by its place in memory: a parameter, one
    expert's slice of it, or a stack of slices, transposed or not. Matrices that share a product (gate and up of a fused
    expert) share one `InputStats`. Rows of zeros in a product of stacks are not counted: Llama-4 gives all tokens to every
    expert and zeroes those not routed to it.

    Fused experts have to run in the eager implementation (`eager_experts`): the others copy or hand over whole parameters.

    Raises CompressError, inside the model's forward, for inputs that are not finite.
    """

    def __init__(self, refs: Sequence[WeightRef], gram: bool = True) -> None:
        super().__init__()
        self._refs = list(refs)
        self._gram = gram
        self._watched: dict[tuple[Any, ...], list[WeightRef]] = {}
        self._slices: dict[tuple[Any, ...], str] = {}  # every slice of a parameter that is watched in part -> the parameter
        self._stats: dict[str, InputStats] = {}
        self._seen: set[str] = set()
        self._last: tuple[Tensor, int, InputStats] | None = None
        fused: set[str] = set()
        for ref in refs:
            self._watched.setdefault(_place(ref.whole()), []).append(ref)
            if ref.parameter.dim() == 2:
                self._slices[_place(ref.whole())] = ref.full_name
            elif ref.full_name not in fused:
                fused.add(ref.full_name)
                whole = ref.parameter.detach()
                for matrix in whole if ref.contracted_dim == -1 else whole.mT:
                    self._slices[_place(matrix)] = ref.full_name

    def stats(self) -> dict[str, InputStats]:
        """The sums so far, by the `name` of the matrix, in the order of `refs`."""
        result = {}
        for refs in self._watched.values():
            shared = self._stats.get(refs[0].name) or self._zeros(refs[0])
            result.update({ref.name: shared for ref in refs})
        return {ref.name: result[ref.name] for ref in self._refs}

    def unseen(self) -> list[str]:
        """Parameters that took part in no product at all. (An expert of its own module may rightly go without tokens.)"""
        names = (ref.full_name for ref in self._refs if ref.expert is None or ref.parameter.dim() == 3)
        return [name for name in dict.fromkeys(names) if name not in self._seen]

    def __exit__(self, *error: Any) -> None:
        self._last = None
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            first, names = _PRODUCTS[func]
            left, right = (args[first + i] if first + i < len(args) else kwargs.get(name) for i, name in enumerate(names))
            if isinstance(left, Tensor) and isinstance(right, Tensor):
                if func is torch.Tensor.__rmatmul__:
                    left, right = right, left
                for inputs, matrix, stacked in _factors(left, right, func is functional.linear):
                    self._observe(inputs, matrix, stacked)
        return func(*args, **kwargs)

    def _observe(self, inputs: Tensor, matrix: Tensor, stacked: bool) -> None:
        place = _place(matrix)
        if place not in self._slices:
            return
        self._seen.add(self._slices[place])
        if place in self._watched:
            self._record(self._watched[place], inputs, stacked)

    @torch.no_grad()
    def _record(self, refs: list[WeightRef], inputs: Tensor, stacked: bool) -> None:
        """Add the inputs `[..., in]` of one product to the sums of `refs`, which share it."""
        # Queries, keys and values (gate and up) get the very same tensor one after the other: its gram is computed once.
        version = -1 if inputs.is_inference() else inputs._version
        if self._last is not None and self._last[0] is inputs and self._last[1] == version != -1:
            part = self._last[2]
        else:
            part = self._sums(refs[0], inputs, stacked)
            self._last = (inputs, version, part)
        self._stats.setdefault(refs[0].name, self._zeros(refs[0])).add(part)

    def _sums(self, ref: WeightRef, inputs: Tensor, stacked: bool) -> InputStats:
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()  # [tokens, in]
        if stacked:
            x = x[(x != 0).any(-1)]
        sum_squares = x.square().sum(0)
        if not bool(torch.isfinite(sum_squares).all()):
            raise CompressError(
                f"the calibration inputs of {ref.name} are not finite: the model overflows in {inputs.dtype}; "
                "load it in bfloat16 or float32, and check that it predicts text at all"
            )
        return InputStats(x.shape[0], sum_squares, x.T @ x if self._gram else None)

    def _zeros(self, ref: WeightRef) -> InputStats:
        size, device = ref.shape[1], ref.parameter.device
        return InputStats(0, torch.zeros(size, device=device), torch.zeros(size, size, device=device) if self._gram else None)


def _place(matrix: Tensor) -> tuple[Any, ...]:
    """Identity of a matrix `[out, in]` in memory: where it starts and how it is laid out."""
    strides = tuple(0 if size == 1 else stride for size, stride in zip(matrix.shape, matrix.stride(), strict=True))
    return matrix.data_ptr(), matrix.device, matrix.dtype, tuple(matrix.shape), strides


def _factors(left: Tensor, right: Tensor, linear: bool) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """How a product may be read as inputs `[..., in]` times a weight `[out, in]`: `(inputs, weight, from a stack)`.

    The weight may stand on either side: `x @ W.T`, or `W @ x` with the inputs in columns.
    """
    if linear:
        yield left, right, False
        return
    if right.dim() == 2:
        yield left, right.mT, False
    elif right.dim() == 3:
        for i, matrix in enumerate(right):
            if (inputs := _item(left, i, len(right))) is not None:
                yield inputs, matrix.mT, True
    if left.dim() == 2:
        yield (right if right.dim() == 1 else right.mT), left, False
    elif left.dim() == 3:
        for i, matrix in enumerate(left):
            if (inputs := _item(right, i, len(left))) is not None:
                yield (inputs if inputs.dim() == 1 else inputs.mT), matrix, True


def _item(factor: Tensor, index: int, count: int) -> Tensor | None:
    """The part of the other factor of a stacked product that meets matrix `index`, by the rules of broadcasting."""
    if factor.dim() <= 2:
        return factor
    if factor.dim() == 3 and len(factor) in (1, count):
        return factor[index % len(factor)]
    return None


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Run fused experts one at a time (`experts_implementation = "eager"`); on leaving, every setting is as it was."""
    configs: dict[int, Any] = {}

    def collect(config: Any) -> None:
        if hasattr(config, "_experts_implementation") and id(config) not in configs:
            configs[id(config)] = config
            for key in getattr(config, "sub_configs", {}):
                collect(getattr(config, key, None))

    for module in model.modules():
        collect(getattr(module, "config", None))
    before = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation = {"": "eager"}  # the "" key: this configuration alone, not those inside it
        yield
    finally:
        for config, value in before:
            config._experts_implementation = {"": value}


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, eager experts; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(eager_experts(model))
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


def walk_blocks(
    model: nn.Module, refs: Sequence[WeightRef], batches: Iterable[Tensor | Mapping[str, Tensor]], gram: bool
) -> Iterator[tuple[Block, dict[str, InputStats]]]:
    """Yield each decoder block with the statistics of its matrices in `refs`, by name, up to the last block that has any.

    `batches` are token ids, int64 `[batch, length]`, or the model's keyword arguments. Between two steps the caller may alter
    the yielded block's weights in place: the next block is measured on the outputs of the altered one. Memory holds the hidden
    states of all batches and the statistics of one block.

    Raises UsageError for no batches or for matrices outside the blocks; CompressError when a matrix takes part in no product
    and for models whose blocks cannot be run one after the other.
    """
    blocks = decoder_blocks(model)
    outside = [ref.name for ref in refs if ref.layer is None]
    if outside:
        raise UsageError(f"{', '.join(outside)}: outside the decoder blocks, where calibration block by block does not reach")
    if not refs:
        return
    blocks = blocks[: max(ref.layer for ref in refs if ref.layer is not None) + 1]
    with _measuring(model):
        states, calls = _catch(model, blocks, list(batches))
    for block in blocks:
        here = [ref for ref in refs if ref.layer == block.index]
        stats: dict[str, InputStats] = {}
        if here:
            with _measuring(model), InputCapture(here, gram) as capture:
                for state, call in zip(states, calls, strict=True):
                    call[block.index].run(state)
            if unseen := capture.unseen():
                raise CompressError(
                    f"{', '.join(unseen)}: the model ran without any product with this weight that calibration recognises; exclude it"
                )
            stats = capture.stats()
            del capture
        yield block, stats
        stats = {}
        if block is not blocks[-1]:
            with _measuring(model):
                for i, call in enumerate(calls):
                    states[i] = call[block.index].run(states[i])


@dataclass
class _Call:
    """One call of a block as the model makes it, without the hidden states."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, state: Tensor) -> Tensor:
        """Hidden states in, hidden states out. A copy goes in: some blocks add to their input in place."""
        return _hidden(self.module(state.clone(), *self.args, **self.kwargs))


class _Stop(Exception):
    pass


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _catch(
    model: nn.Module, blocks: list[Block], batches: list[Tensor | Mapping[str, Tensor]]
) -> tuple[list[Tensor], list[list[_Call]]]:
    """The hidden states that enter the first block, and for each batch the other arguments of every block.

    Masks and position embeddings can differ from layer to layer, so the model itself has to call every block. The first batch
    takes a real pass, which shows that the hidden states go straight from block to block. Then the blocks hand on their input
    as it is, so that the passes cost nothing, and the first batch shows again that arguments do not depend on hidden states.
    """
    if not batches:
        raise UsageError("calibration needs at least one batch of tokens")
    _, real, plain = _pass(model, blocks, batches[0], skip=False)
    states, calls = [], []
    for index, batch in enumerate(batches):
        state, call, _ = _pass(model, blocks, batch, skip=plain)
        if index == 0 and not all(_same((a.args, a.kwargs), (b.args, b.kwargs)) for a, b in zip(real, call, strict=True)):
            raise CompressError(
                f"{type(model).__name__} computes arguments of its blocks from hidden states, so it cannot be calibrated block by block"
            )
        states.append(state)
        calls.append(call)
    return states, calls


def _pass(
    model: nn.Module, blocks: list[Block], batch: Tensor | Mapping[str, Tensor], skip: bool
) -> tuple[Tensor, list[_Call], bool]:
    """One pass up to the last of `blocks`: the first hidden states, the calls, and whether all blocks return a plain tensor.

    With `skip` the blocks return their input.
    """
    entering: list[Tensor] = []
    calls: list[_Call] = []
    outputs: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        state, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        entering.append(state)
        calls.append(_Call(module, rest, kwargs))
        if len(calls) == len(blocks):
            raise _Stop

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        outputs.append(output)

    device = next(model.parameters()).device
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    with ExitStack() as stack:
        for module in {id(block.module): block.module for block in blocks}.values():
            stack.enter_context(_hook(module.register_forward_pre_hook(before, with_kwargs=True)))
            stack.enter_context(_hook(module.register_forward_hook(after, with_kwargs=True)))
            if skip:
                stack.enter_context(_skipped(module))
        with suppress(_Stop):
            model(**{key: value.to(device) for key, value in inputs.items()}, use_cache=False)
    in_order = [call.module for call in calls] == [block.module for block in blocks]
    if not in_order or not all(_same(_hidden(out), state) for out, state in zip(outputs, entering[1:], strict=False)):
        raise CompressError(
            f"{type(model).__name__} does not run its blocks one straight after the other, so it cannot be calibrated block by block"
        )
    return entering[0], calls, all(isinstance(output, Tensor) for output in outputs)


@contextmanager
def _hook(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _skipped(module: nn.Module) -> Iterator[None]:
    """Let the module return its hidden states unchanged."""
    own = vars(module).get("forward")  # set on the instance by those who wrap a forward, as accelerate does

    @functools.wraps(module.forward)
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal; objects without a value of their own (caches) count as equal when of one type."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (bool, int, float, str)):
        return bool(a == b)
    return type(a) is type(b)
