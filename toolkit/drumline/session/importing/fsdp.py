"""FSDP as other tools state it: over which ranks weights are sharded, and when gathered ones are freed."""

from collections.abc import Iterable
from typing import Any

from drumline.session.importing.draft import UNSUPPORTED, Draft

_EVERYWHERE = ("full_shard", "1", "auto_wrap", "offload", "fsdp2")
_WITHIN_NODES = ("hybrid_shard", "4", "hybrid_shard_zero2", "_hybrid_shard_zero2", "5")
_KEPT_FOR_BACKWARD = ("shard_grad_op", "2", "hybrid_shard_zero2", "_hybrid_shard_zero2", "5")
"""Strategies of FSDP1, by name or number, in which gathered weights stay until after the backward."""
_NOWHERE = ("no_shard", "3")
_KEYS = ("sharding_strategy", "reshard_after_forward")
"""Of a config; the second is FSDP2's, and yes, no, or the name of a strategy."""


def take_sharding(draft: Draft, words: Iterable[Any], config: dict[str, Any]) -> None:
    """Set `strategy.shard` and `.reshard` by the words of `fsdp` and by its config, which loses the keys."""
    said = [str(word).lower() for word in words if isinstance(word, str | int) and word is not True]
    for key in _KEYS:
        for name in (key, f"fsdp_{key}"):
            if (value := config.pop(name, None)) is not None:
                said.append(str(value).lower())
    for word in said:
        if word in _WITHIN_NODES:
            draft.set("strategy.shard", "node")
        if word in _KEPT_FOR_BACKWARD or word == "false":
            draft.set("strategy.reshard", "backward")
        if word in _NOWHERE:
            draft.set("strategy.name", "ddp")
        elif word not in (*_EVERYWHERE, *_WITHIN_NODES, *_KEPT_FOR_BACKWARD, "true", "false"):
            draft.leave("fsdp_sharding_strategy", word, UNSUPPORTED, "weights are sharded, too")
