"""Finds tokens, keys and passwords by name, by pattern, or as values of environment variables.

They are refused in recipes and hidden in everything else that is written. Pure: the environment is an
argument.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "[secret]"

_NAMES = (
    "api_key",
    "apikey",
    "access_key",
    "accesskey",
    "auth_key",
    "private_key",
    "key_id",
    "secret",
    "token",
    "auth",
    "password",
    "passwd",
    "passphrase",
    "credential",
)
_SPECIAL_TOKENS = {
    "bos",
    "eos",
    "pad",
    "unk",
    "sep",
    "cls",
    "mask",
    "start",
    "end",
    "image",
    "audio",
    "video",
    "special",
    "stop",
    "extra",
}
_SHAPES = (
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{20,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abeprs]-[\w-]{10,}|wandb_v\d_\w{20,}"
    r"|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_USER_IN_URL = r"(?<=://)[^/\s@:]+:[^/\s@]+(?=@)"
_FILE = (
    r"(?i)(^|/)(\.env(\..*)?|\.netrc|_netrc|\.npmrc|\.pypirc|\.pgpass|id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|key|p12|pfx"
    r"|keystore|kdbx)|.*(secret|credential|password)[^/]*\.(ya?ml|json|toml|ini|txt|env|cfg)"
    r"|\.(aws|ssh|gnupg|kube|docker)/.*)$"
)
_SIGNS = (
    "hf_",
    "sk-",
    "ghp_",
    "gho_",
    "ghu_",
    "ghs_",
    "ghr_",
    "github_pat_",
    "glpat-",
    "AKIA",
    "AIza",
    "xox",
    "wandb_v",
    "npm_",
    "pypi-",
    "eyJ",
    "PRIVATE KEY",
)
"""Every pattern in `_SHAPES` contains one of these, so text without them does not need the regex compiled."""
_SHORTEST = 8
"""Shorter values of secret environment variables are not searched for: they would match ordinary text."""


def is_secret_name(name: str) -> bool:
    """Whether a key, option or variable of this name holds a secret: `api_key`, `HF_TOKEN`, `dbPassword`."""
    if not name.islower():
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    one = name.replace("-", "_").removesuffix("s")
    found = any(one == ending or one.endswith(f"_{ending}") for ending in _NAMES)
    special = one.removesuffix("_token").rpartition("_")[2] in _SPECIAL_TOKENS
    return found and not (special and one.endswith("_token"))


def is_secret_file(path: str) -> bool:
    """Whether a file of this name usually holds secrets: `.env`, `id_rsa`, `*.pem`."""
    return bool(re.search(_FILE, path))


def secrets_in(value: Any, path: str = "") -> Iterator[str]:
    """Yield dotted paths of secrets in plain data: text under a secret name or matching a pattern."""
    if isinstance(value, dict):
        for key, item in value.items():
            where = f"{path}.{key}" if path else str(key)
            if isinstance(item, str) and item and is_secret_name(str(key)):
                yield where
            else:
                yield from secrets_in(item, where)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from secrets_in(item, f"{path}[{number}]")
    elif isinstance(value, str) and _hide_shapes(value) != value:
        yield path


def _hide_shapes(text: str) -> str:
    if any(sign in text for sign in _SIGNS):
        text = re.sub(_SHAPES, HIDDEN, text)
    return re.sub(_USER_IN_URL, HIDDEN, text) if "://" in text else text


class Secrets:
    """Hides the values of secret environment variables, and text that matches a secret pattern."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._known = sorted(
            {v for k, v in environment.items() if is_secret_name(k) and len(v) >= _SHORTEST},
            key=len,
            reverse=True,
        )

    def are_in(self, text: str) -> bool:
        """Whether the text contains a secret."""
        return self.hide(text) != text

    def hide(self, text: str) -> str:
        """Replace each secret in the text by `[secret]`."""
        for value in self._known:
            text = text.replace(value, HIDDEN)
        return _hide_shapes(text)

    def hide_in(self, value: Any) -> Any:
        """Hide every secret in plain data; any text under a secret name counts as one."""
        if isinstance(value, dict):
            return {
                key: HIDDEN
                if isinstance(item, str) and item and is_secret_name(str(key))
                else self.hide_in(item)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self.hide_in(item) for item in value]
        return self.hide(value) if isinstance(value, str) else value

    def hide_arguments(self, argv: list[str]) -> list[str]:
        """Hide secrets in a command line: the X of `--token X`, `--token=X` and `data.options.api_key=X`."""
        hidden, is_value = [], False
        for argument in argv:
            name, equals, _ = argument.partition("=")
            names_secret = is_secret_name(name.lstrip("-").rpartition(".")[2])
            if is_value and not argument.startswith("-"):
                hidden.append(HIDDEN)
            elif equals and names_secret:
                hidden.append(f"{name}={HIDDEN}")
            else:
                hidden.append(self.hide(argument))
            is_value = names_secret and not equals and argument.startswith("-")
        return hidden
