"""Pretrained weights, read block by block from safetensors files; every key of them is accounted for.

Files and modules of a model do not always have the same names and shapes: transformers has conversions
between them, which are used here on the files' own slices. Nothing is read before it is asked for.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from drumline.architectures.weight_files import headers_in
from drumline.architectures.weight_names import (
    NOT_WEIGHTS,
    OF_PRETRAINING,
    WRAPPERS,
    some,
    wrapper_of,
)
from drumline.errors import PlanError
from drumline.train.models.edits import head_rule


class PretrainedWeights:
    """The weights in a folder for a model of transformers that is on the meta device.

    `missing`: names of weights that the files lack and that are not tied to others; only a new head's may.
    The model that is given serves as a form to be filled, block by block, and stays on the meta device; what
    is trained is another one, built in the same way.
    """

    def __init__(self, form: Any, folder: Path, has_new_head: bool) -> None:
        self._form, self._folder = form, folder
        found = headers_in(folder)
        if found is None:
            raise PlanError(f"model.path: {folder} holds no weights (model.safetensors)")
        self._shapes = {name: shape for held in found.values() for name, shape in held.items()}
        self._file_of = {name: file for file, held in found.items() for name in held}
        self._options = _load_options(form)
        self._names = set(form.state_dict())
        self._sources = self._sort_by_target()
        self.missing = self._account(has_new_head)

    def read(self, names: set[str]) -> dict[str, Tensor]:
        """The weights of these names, float32 on the CPU, each a tensor of its own; without `missing` ones.

        `names`: of the model's parameters and persistent buffers, as its `state_dict` has them.
        """
        keys = [key for name in sorted(names) for key in self._sources.get(name, ())]
        if not keys:
            return {}
        with self._slices(keys) as slices:
            targets = self._fill(slices, "cpu")
            return {name: self._take(name) for name in targets}

    def tie(self, model: Any) -> None:
        """Tie the weights that the config ties, unless the files hold other values for both."""
        model.tie_weights(missing_keys=set(self._absent), recompute_mapping=False)

    def _sort_by_target(self) -> dict[str, list[str]]:
        """The files' keys by the name in the model that they are converted for."""
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        mapping = self._options().weight_mapping
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state, prefix = self._form.state_dict(), self._form.base_model_prefix
        found: dict[str, list[str]] = {}
        for key in self._shapes:
            name, _ = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name = key
            found.setdefault(name, []).append(key)
        return found

    def _account(self, has_new_head: bool) -> list[str]:
        """What the files lack, by a load of shapes alone; PlanError for any key that should not be so."""
        form, guesses = self._form, "MaskedLM" in type(self._form).__name__
        is_outside = head_rule(form)
        empty = {key: torch.empty(shape, device="meta") for key, shape in self._shapes.items()}
        info = self._load(empty, "meta")
        self._absent = set(info.missing_keys)
        form.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        form._adjust_missing_and_unexpected_keys(info)
        info.unexpected_keys = {
            name
            for name in info.unexpected_keys
            if not name.endswith(NOT_WEIGHTS)
            and not (guesses and any(part in name for part in OF_PRETRAINING))
        }

        def is_of_a_head(name: str) -> bool:
            return has_new_head and (is_outside(name) or "pooler" in name.split("."))

        mismatched = {name for name, *_ in info.mismatched_keys}
        wrong = [
            f"{what} {some(names)}"
            for what, found in (
                ("lack", info.missing_keys), ("have, unlike the model,", info.unexpected_keys),
                ("have another shape of", mismatched), ("cannot be converted for", {*info.conversion_errors}),
            )
            if (names := sorted(name for name in found if not is_of_a_head(name)))
        ]  # fmt: skip
        if wrong:
            hint = _hint(info.unexpected_keys)
            raise PlanError(f"model: the files of {self._folder} {'; they '.join(wrong)}. {hint}")
        for name in mismatched:
            self._sources.pop(name, None)
        self._absent |= mismatched
        return sorted(info.missing_keys | mismatched)

    @contextlib.contextmanager
    def _slices(self, keys: list[str]) -> Iterator[dict[str, Any]]:
        """The tensors of these keys as slices of mapped files, not read yet."""
        with contextlib.ExitStack() as stack:
            opened = {
                file: stack.enter_context(safe_open(file, "pt"))
                for file in {self._file_of[key] for key in keys}
            }
            yield {key: opened[self._file_of[key]].get_slice(key) for key in keys}

    def _fill(self, tensors: dict[str, Any], device: str) -> list[str]:
        """Fill the form from these tensors of the files; returns the names that are filled."""
        info = self._load(tensors, device)
        if info.conversion_errors or info.error_msgs:
            raise PlanError(
                f"model: {self._folder}: {info.error_msgs or info.conversion_errors}"[:500]
            )
        return sorted(self._names - info.missing_keys)

    def _load(self, tensors: dict[str, Any], device: str) -> Any:
        from transformers.utils import logging

        was_shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            options = self._options(device)
            return self._form._load_pretrained_model(self._form, tensors, None, options)[0]
        finally:
            if was_shown:
                logging.enable_progress_bar()

    def _take(self, name: str) -> Tensor:
        """The tensor that fills this place of the form, which is on the meta device again."""
        path, _, leaf = name.rpartition(".")
        module = self._form.get_submodule(path)
        store = module._parameters if leaf in module._parameters else module._buffers
        filled = store[leaf].detach()
        empty = torch.empty_like(filled, device="meta")
        is_parameter = store is module._parameters
        store[leaf] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
        # A tensor that is not converted is a view of the mapped file.
        return filled.clone()


def _load_options(form: Any) -> Any:
    """Makes the options of a load into this form; new ones each time, since a load uses up its mapping."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    def make(device: str = "cpu") -> Any:
        return LoadStateDictConfig(
            dtype=torch.float32,
            weight_mapping=get_model_conversion_mapping(form, None, None),
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            device_map={"": device},
        )

    return make


def _hint(unexpected: set[str]) -> str:
    if prefix := wrapper_of(unexpected):
        return f"Every key begins with {prefix!r}, as under {WRAPPERS[prefix]}"
    return "Nearest: the folder that the model was saved to with save_pretrained"
