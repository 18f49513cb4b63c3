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
                _allocate(base, torch.device("cpu"), is_poisoned=True)
                torch.manual_seed(derived_seed("init", self._seed, name))
                _initialise(self.model, base)
                _fill_what_is_left(base, self._names)
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
        _allocate(left, torch.device("cpu"))
        new = {name.rpartition(".")[0] for name in weights.missing if name in places}
        for name in sorted(new):
            torch.manual_seed(derived_seed("init", self._seed, name))
            _initialise(self.model, [m for m in modules if self._names.get(id(m)) == name])
        torch.manual_seed(derived_seed("init", self._seed, unit))
        _initialise(self.model, left)  # what no file holds: buffers that follow from the config

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
                _initialise(self.model, modules)
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


def _allocate(modules: list[nn.Module], device: torch.device, is_poisoned: bool = False) -> None:
    """Replace meta tensors by uninitialised ones on `device`; by NaN, to see which of them stay so."""
    for module in modules:
        for store in (module._parameters, module._buffers):
            for leaf, tensor in store.items():
                if tensor is None or not tensor.is_meta:
                    continue
                empty = torch.empty_like(tensor, device=device)
                if is_poisoned and empty.is_floating_point():
                    empty.fill_(torch.nan)
                _put(module, leaf, empty, is_initialised=False)


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
def _initialise(model: Any, modules: list[nn.Module]) -> None:
    """Initialise these modules with transformers' own rules, children before parents.

    Initialised parameters are marked, so that a parent's rule does not initialise them again.
    """
    from transformers.initialization import guard_torch_init_functions

    with guard_torch_init_functions():
        for module in reversed(modules):
            model._init_weights(module)
    for module in modules:
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]


@torch.no_grad()
def _fill_what_is_left(modules: list[nn.Module], names: dict[int, str]) -> None:
    """Give weights that transformers' rules leave out the values that their own module begins with.

    PlanError where it has none: a model that is built with storage keeps what its constructor wrote.
    """
    for module in modules:
        unset = _unset(module)
        if not unset:
            continue
        own = module.named_parameters(recurse=False)
        kept = {name: value.clone() for name, value in own if name not in unset}
        reset = getattr(module, "reset_parameters", None)
        if reset:
            reset()
            for name, value in kept.items():
                module._parameters[name].data.copy_(value)  # type: ignore[union-attr]
        if left := _unset(module):
            where = names.get(id(module), type(module).__name__)
            raise PlanError(
                f"model: transformers has no rule for the first values of {where}.{left[0]}, so they would "
                "be what stood in memory. Nearest: model.source=folder, of what from_config makes"
            )


def _unset(module: nn.Module) -> list[str]:
    """Names of this module's weights and buffers whose first value is NaN, as `_allocate` left them."""
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return [
        name
        for name, tensor in own
        if tensor.numel() and not isinstance(tensor, DTensor) and bool(tensor.flatten()[0].isnan())
    ]


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
