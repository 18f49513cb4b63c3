"""Materialises a model block by block: from pretrained files, or drawn from (seed, block name).

Initial weights do not depend on the number of ranks, and no rank holds more than a few unsharded blocks.
Torch's CPU generator gives the same numbers on every machine; its CUDA generator does not, so a run could not
be reproduced on other hardware. Blocks are therefore drawn on the CPU, or read into its memory, each by one
rank, several ranks at the same time, and broadcast to the other ranks from the device that will hold them.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from drumline.data.dataset_manifest import DatasetManifest
from drumline.errors import PlanError
from drumline.recipe.precision import find_precision
from drumline.recipe.schema import Recipe
from drumline.train.models.adapter import adapted_layers, draw_adapter, is_of_adapter
from drumline.train.models.blocks import has_batchnorm, named_blocks, own_tensors
from drumline.train.models.build import build_model, check_vocabulary
from drumline.train.models.checkpointing import enable_checkpointing
from drumline.train.models.edits import apply_edits, choose_trained
from drumline.train.models.pretrained import PretrainedWeights
from drumline.train.models.quantized import QuantizedLinear
from drumline.train.models.seeds import derived_seed

_OUTSIDE = "rest"
_RANDOM = ("uniform_", "normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_",
           "trunc_normal_", "orthogonal_", "sparse_")  # fmt: skip
_LARGEST_ROUND = 8
"""Most blocks initialised at the same time, each by a different rank."""

Progress = Callable[[str], None]
"""Called after each block with its description, such as `block 3 of 80`."""


def ignore_progress(what: str) -> None:
    """Do nothing: the default `Progress`."""


class ModelBuilder:
    """A model whose blocks are materialised one at a time, by `blocks()` and then `finish()`.

    Both are collectives. `notes`: what building found, to be told once. `device`: holds the weights.
    `progress` is called after every block. `dtype` overrides the recipe's parameter dtype, for checks in
    fp64.
    """

    def __init__(
        self,
        recipe: Recipe,
        manifest: DatasetManifest,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        progress: Progress = ignore_progress,
    ) -> None:
        self._seed, self._device = recipe.seed, device or torch.device("cpu")
        self._is_empty = recipe.model.source != "factory"
        numbers = find_precision(recipe.precision, recipe.strategy.name)
        self._dtype, self._frozen_dtype = (
            dtype or (getattr(torch, name) if name != "float32" else None)
            for name in (numbers.model, numbers.frozen)
        )
        self._progress = progress
        self._inside: set[int] = set()
        built = build_model(recipe, manifest)
        self.model: Any = built.model
        self._weights = built.weights
        self._rules = _InitRules(self.model)
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self.notes: list[str] = []
        new = built.weights.missing if built.weights else []
        if new:
            self.notes.append(
                f"new weights, which the files lack, drawn from seed {self._seed}: {', '.join(new)}"
            )
        if recipe.model.source == "factory":
            found = "has BatchNorm" if has_batchnorm(self.model) else "has no BatchNorm"
            self.notes.append(f"the model of {recipe.model.factory} {found}")
        check_vocabulary(self.model, manifest, built.weights is not None)
        choose_trained(self.model, recipe, new)
        self._names |= {
            id(module): name.removesuffix(".base_layer")
            for name, module in self.model.named_modules()
            if isinstance(module, QuantizedLinear)
        }
        self._adapted = adapted_layers(self.model)
        self._of_adapters = {
            id(part) for name, part in self.model.named_modules() if is_of_adapter(name)
        }
        if (
            self._weights and recipe.model.edits
        ):  # they may look at weights, so every rank loads all of them
            self._read(self._weights, _OUTSIDE, list(self.model.modules()))
            self._weights, self._is_empty = None, False
        if not self._is_empty:
            self._draw_adapters(list(self.model.modules()))
        apply_edits(self.model, recipe)
        policy = recipe.model.activation_checkpointing
        if policy != "none":
            enable_checkpointing(self.model, policy, recipe.model.activation_offload)

    def blocks(self) -> Iterator[nn.Module]:
        """The repeated blocks (a transformer's layers), each with its initial weights."""
        named = named_blocks(self.model)
        self._inside = {id(module) for _, block in named for module in block.modules()}
        size = min(_LARGEST_ROUND, _world())
        for start in range(0, len(named), size):
            batch = named[start : start + size]
            self._draw([(name, list(block.modules())) for name, block in batch])
            for number, (_, block) in enumerate(batch):
                self._hand_out(list(block.modules()), source=number % _world())
                self._progress(f"block {start + number + 1} of {len(named)}")
                yield block
                for parameter in block.parameters():  # the caller's sharding has replaced them
                    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            _give_back_freed_memory()

    def finish(self) -> nn.Module:
        """Materialise everything outside the blocks and tie weights; returns the model."""
        outside = [m for m in self.model.modules() if id(m) not in self._inside]
        self._draw([(_OUTSIDE, outside)])
        self._hand_out(outside, source=0)
        self._tie()
        _give_back_freed_memory()
        return self.model

    def whole(self) -> nn.Module:
        """The whole model, for a rank that holds it unsharded."""
        for _ in self.blocks():
            pass
        return self.finish()

    def _draw(self, units: list[tuple[str, list[nn.Module]]]) -> None:
        """Give this rank's units their weights, on the CPU; the others stay on the meta device."""
        for number, (name, modules) in enumerate(units):
            if not self._is_empty or number % _world() != _rank():
                continue
            base = [module for module in modules if id(module) not in self._of_adapters]
            if self._weights:
                self._read(self._weights, name, base)
            else:
                made = _allocate(base, torch.device("cpu"), is_poisoned=True)
                torch.manual_seed(derived_seed("init", self._seed, name))
                _initialise(self._rules, base)
                _fill_what_is_left(made, self._names)
            self._draw_adapters(modules)

    def _draw_adapters(self, modules: list[nn.Module]) -> None:
        """Give the adapters of those of these modules that have one their first values, on the CPU."""
        for layer in modules:
            if id(layer) in self._adapted:
                parts = [part for part in layer.modules() if id(part) in self._of_adapters]
                _allocate(parts, torch.device("cpu"))
                draw_adapter(layer, self._seed, self._adapted[id(layer)])

    def _read(self, weights: PretrainedWeights, unit: str, modules: list[nn.Module]) -> None:
        """Fill these modules from the files; draw what the files lack, each module from (seed, its name)."""
        places = {}
        for module in modules:
            prefix = self._names.get(id(module))
            if prefix is not None:
                for leaf in (*module._parameters, *module._buffers):
                    places[f"{prefix}.{leaf}" if prefix else leaf] = (module, leaf)
        for name, value in weights.read(set(places)).items():
            _put(*places[name], value)
        self._tie()
        left = [m for m in modules if any(tensor.is_meta for tensor in own_tensors(m))]
        made = _allocate(left, torch.device("cpu"), is_poisoned=True)
        new = {name.rpartition(".")[0] for name in weights.missing if name in places}
        for name in sorted(new):
            torch.manual_seed(derived_seed("init", self._seed, name))
            _initialise(self._rules, [m for m in modules if self._names.get(id(m)) == name])
        torch.manual_seed(derived_seed("init", self._seed, unit))
        _initialise(self._rules, left)  # what no file holds: buffers that follow from the config
        _fill_what_is_left(made, self._names, is_pretrained=True)

    def _tie(self) -> None:
        if self._weights:
            self._weights.tie(self.model)
        elif self._is_empty:
            self.model.tie_weights()

    def _hand_out(self, modules: list[nn.Module], source: int) -> None:
        """Move modules to the device in their dtype, and broadcast the weights that `source` initialised."""
        for module in modules:
            if isinstance(module, QuantizedLinear) and not module.is_filled:
                module.pack()
        if self._is_empty and source != _rank():
            _allocate(modules, self._device)
            with _without_draws():
                _initialise(self._rules, modules)
        for module in modules:
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is not None and not isinstance(tensor, DTensor):
                        self._place(store, name, tensor)
        if self._is_empty and _world() > 1:
            for module in modules:
                for tensor in own_tensors(module):
                    if not isinstance(tensor, DTensor):  # tied to a weight that is already sharded
                        dist.broadcast(tensor.data, src=source)

    def _place(self, store: dict[str, Any], name: str, tensor: Tensor) -> None:
        is_parameter = isinstance(tensor, nn.Parameter)
        wanted = self._dtype if tensor.requires_grad else self._frozen_dtype
        dtype = wanted if wanted and tensor.is_floating_point() else tensor.dtype
        if is_parameter:
            tensor.data = tensor.data.to(self._device, dtype)
        else:
            store[name] = tensor.to(self._device)


class _InitRules:
    """transformers' rule for the first values of each module: that of the innermost model that it is part of.

    A model of several, such as one of images and one of text, has a rule for each.
    """

    def __init__(self, model: Any) -> None:
        self._whole = model
        self._owners: dict[int, Any] = {}
        if hasattr(model, "_init_weights"):
            self._assign(model, model)

    def _assign(self, module: Any, owner: Any) -> None:
        own = module if hasattr(module, "_init_weights") else owner
        self._owners[id(module)] = own
        for child in module.children():
            self._assign(child, own)

    def apply(self, module: nn.Module) -> None:
        """Give a module's own tensors their first values."""
        self._owners.get(id(module), self._whole)._init_weights(module)


Made = list[tuple[nn.Module, str]]
"""Modules, and the names of their tensors that were allocated."""


def _allocate(modules: list[nn.Module], device: torch.device, is_poisoned: bool = False) -> Made:
    """Replace meta tensors by uninitialised ones on `device`, and tell which these are.

    `is_poisoned`: they are NaN, or the least number of their dtype, to see which of them stay so.
    """
    made = []
    for module in modules:
        for store in (module._parameters, module._buffers):
            for leaf, tensor in store.items():
                if tensor is None or not tensor.is_meta:
                    continue
                empty = torch.empty_like(tensor, device=device)
                if is_poisoned:
                    empty.fill_(_poison(empty.dtype))
                _put(module, leaf, empty, is_initialised=False)
                made.append((module, leaf))
    return made


def _poison(dtype: torch.dtype) -> float | int:
    """A value that no weight begins with; of truth values there is none."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.nan
    return 0 if dtype is torch.bool else torch.iinfo(dtype).min


def _put(module: nn.Module, leaf: str, value: Tensor, is_initialised: bool = True) -> None:
    """Replace a module's tensor by one of these values; rules of initialisation leave it alone then."""
    held = module._parameters.get(leaf)
    if held is None:
        module._buffers[leaf] = tensor = value
    else:
        tensor = module._parameters[leaf] = nn.Parameter(value, requires_grad=held.requires_grad)
    if is_initialised:
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]


@torch.no_grad()
def _initialise(rules: _InitRules, modules: list[nn.Module]) -> None:
    """Initialise these modules with transformers' own rules, children before parents.

    Initialised parameters are marked, so that a parent's rule does not initialise them again.
    """
    from transformers.initialization import guard_torch_init_functions

    with guard_torch_init_functions():
        for module in reversed(modules):
            rules.apply(module)
    for module in modules:
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]


@torch.no_grad()
def _fill_what_is_left(made: Made, names: dict[int, str], is_pretrained: bool = False) -> None:
    """Give tensors that transformers' rules leave out the values that their own module begins with.

    PlanError where it has none: a model that is built with storage keeps what its constructor wrote.
    """
    left = [(module, leaf) for module, leaf in made if _is_unset(module, leaf)]
    for module in {id(module): module for module, _ in left}.values():
        unset = {leaf for own, leaf in left if own is module}
        own = module.named_parameters(recurse=False)
        kept = {name: value.clone() for name, value in own if name not in unset}
        reset = getattr(module, "reset_parameters", None)
        if reset:
            reset()
            for name, value in kept.items():
                module._parameters[name].data.copy_(value)  # type: ignore[union-attr]
        if still := sorted(leaf for leaf in unset if _is_unset(module, leaf)):
            where = names.get(id(module), type(module).__name__)
            fix = "model.source=folder, of what from_config makes"
            if is_pretrained:
                fix = "model.factory, a function of yours that loads it"
            raise PlanError(
                f"model: transformers has no rule for the first values of {where}.{still[0]}, so they would "
                f"be what stood in memory. Nearest: {fix}"
            )


def _is_unset(module: nn.Module, leaf: str) -> bool:
    """Whether a tensor still begins with what `_allocate` wrote."""
    tensor = module._parameters.get(leaf)
    if tensor is None:
        tensor = module._buffers.get(leaf)  # type: ignore[assignment]
    if tensor is None or not tensor.numel() or isinstance(tensor, DTensor):
        return False
    first, poison = tensor.flatten()[0], _poison(tensor.dtype)
    return bool(first.isnan()) if poison != poison else poison != 0 and bool(first == poison)


@contextlib.contextmanager
def _without_draws() -> Iterator[None]:
    """Context in which initialisation sets only non-random values (buffers, ones, zeros)."""
    from transformers.initialization import TORCH_INIT_FUNCTIONS

    kept = {name: TORCH_INIT_FUNCTIONS[name] for name in _RANDOM if name in TORCH_INIT_FUNCTIONS}
    for name in kept:
        TORCH_INIT_FUNCTIONS[name] = _leave
    try:
        yield
    finally:
        TORCH_INIT_FUNCTIONS.update(kept)


def _leave(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return tensor


def _give_back_freed_memory() -> None:
    """Return freed heap pages, of whole blocks that were sharded, to the system; glibc keeps them."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
