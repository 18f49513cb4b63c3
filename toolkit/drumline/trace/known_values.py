"""Lets a trace know the values that a model of images and text looks at: those that follow from its inputs.

Fake tensors have no values. Beside each whose values follow from the inputs or from numbers alone, a real
tensor is kept; activations depend on weights, which are fake, and have none.
"""

from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

_LARGEST = 1 << 24
"""Elements of a tensor whose values are kept."""
_MADE_OF_NUMBERS = {
    getattr(torch.ops.aten, name)
    for name in ("arange", "zeros", "ones", "full", "scalar_tensor")
}  # fmt: skip
_MADE_LIKE = {getattr(torch.ops.aten, f"{name}_like") for name in ("zeros", "ones", "full")}
_MADE = _MADE_OF_NUMBERS | _MADE_LIKE


class KnownValues(TorchDispatchMode):
    """Context, around a FakeTensorMode's, in which questions about known values are answered."""

    def __init__(self) -> None:
        super().__init__()
        self._real: Any = WeakIdKeyDictionary()

    def __enter__(self) -> Any:
        self._patch = patch.object(torch, "tensor", _tensor_of(torch.tensor))
        self._patch.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.__exit__(*error)

    def tell(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fake tensors of the same shapes, whose values are those of these real ones."""
        return {name: self._fake_of(real) for name, real in tensors.items()}

    def _fake_of(self, real: Tensor) -> Tensor:
        return self._with_value(torch.zeros(real.shape, dtype=real.dtype), real)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if self._is_known(func, given):
            return self._both(func, args, kwargs)
        if any(self._is_written(func, args, kwargs)):
            self._forget(func, args, kwargs)
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], self._by_number(args[1]))
        return func(*args, **kwargs)

    def _is_known(self, func: Any, given: list[Tensor]) -> bool:
        """Whether the values of what an operator returns follow from known ones."""
        packet = getattr(func, "overloadpacket", None)
        if torch.Tag.nondeterministic_seeded in func.tags:
            return False
        if (packet in _MADE_OF_NUMBERS and not given) or packet in _MADE_LIKE:
            return True
        return bool(given) and all(
            value in self._real or (value.device.type == "cpu" and not _is_fake(value))
            for value in given
        )

    def _both(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator makes of fake tensors, with the values that it makes of the real ones."""
        packet = getattr(func, "overloadpacket", None)
        try:
            found = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            found = None
        wanted = [value for value in tree_iter(found) if isinstance(value, Tensor)]
        is_large = any(t.device.type == "meta" or t.numel() > _LARGEST for t in wanted)
        is_filler = packet in _MADE and any(
            t.is_floating_point() for t in wanted
        )  # states, gradients
        if is_large or is_filler:
            return found
        with _disable_current_modes():
            plain = tree_map_only(Tensor, self._value_of, (args, kwargs))
            real = func(*plain[0], **plain[1])
        if found is None:
            return tree_map_only(Tensor, self._fake_of, real)
        kept = [value for value in tree_iter(real) if isinstance(value, Tensor)]
        for fake, value in zip(wanted, kept, strict=True):
            self._with_value(fake, value)
        return found

    def _value_of(self, tensor: Tensor) -> Tensor:
        """The real tensor; of one that only gives its shape, another of this shape."""
        if tensor in self._real:
            return self._real[tensor]  # type: ignore[no-any-return]
        return torch.empty(tensor.shape, dtype=tensor.dtype) if _is_fake(tensor) else tensor

    def _with_value(self, fake: Tensor, real: Tensor) -> Tensor:
        self._real[fake] = real
        return fake

    def _is_written(self, func: Any, args: Any, kwargs: Any) -> Iterable[bool]:
        """Of each known tensor that an operator is given, whether it is written to."""
        for value in _written(func, args, kwargs):
            yield value in self._real

    def _forget(self, func: Any, args: Any, kwargs: Any) -> None:
        """Forget the values of what is written to with unknown ones, and of all that shares its memory."""
        lost = {
            self._real[value].untyped_storage()._cdata
            for value in _written(func, args, kwargs)
            if value in self._real
        }
        for fake in [f for f, real in self._real.items() if real.untyped_storage()._cdata in lost]:
            del self._real[fake]

    def _by_number(self, indices: Any) -> Any:
        """Indices with the numbers of what a known mask chooses, so that their count is known."""
        found: list[Any] = []
        for one in indices:
            if one is None or one.dtype not in (torch.bool, torch.uint8) or one not in self._real:
                found.append(one)
                continue
            with _disable_current_modes():
                numbers = self._real[one].nonzero(as_tuple=True)
            found += map(self._fake_of, numbers)
        return found


def _tensor_of(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor, which reads the memory of tensors in a list, of numbers that are asked for instead."""

    def tensor(data: Any, **options: Any) -> Tensor:
        if isinstance(data, list) and any(isinstance(one, Tensor) for one in data):
            data = [one.item() if isinstance(one, Tensor) else one for one in data]
        return make(data, **options)

    return tensor


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operator writes to."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    named = list(zip(schema.arguments, args, strict=False))
    named += [(one, kwargs[one.name]) for one in schema.arguments if one.name in kwargs]
    return [
        value
        for one, given in named
        if one.alias_info is not None and one.alias_info.is_write
        for value in tree_iter(given)
        if isinstance(value, Tensor)
    ]


def _is_fake(tensor: Tensor) -> bool:
    return hasattr(tensor, "fake_mode")
