"""Finds tokens, keys and passwords by name, by pattern, or as values of environment variables.

They are refused in recipes and sites, and hidden in everything else that is written. Patterns of providers'
keys are those of detect-secrets, if it is installed, and some of our own. Pure: the environment is passed in.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Any
from urllib.parse import quote

HIDDEN = "[secret]"

_NAMES = (
    "api_key",
    "apikey",
    "access_key",
    "accesskey",
    "account_key",
    "accountkey",
    "auth_key",
    "encryption_key",
    "private_key",
    "secret_key",
    "shared_key",
    "signing_key",
    "storage_key",
    "key_id",
    "secret",
    "token",
    "auth",
    "authorization",
    "bearer",
    "connection_string",
    "cookie",
    "dsn",
    "password",
    "passwd",
    "passphrase",
    "pwd",
    "credential",
)
_PASSWORDS = ("password", "passwd", "passphrase", "pwd", "secret", "pin", "_key")
"""Names whose numbers are secrets too; a number under `tokens` is a count."""
_VARIABLE = re.compile(
    r"(?i)(api_?key|_key$|_key_|^key_|^key$|token|secret|passw|passphrase|pass$|pwd$|credential|_auth$|auth_|dsn$"
    r"|connection_string|cookie|_pat$|^jwt$|_jwt$|^creds?$|_creds?$)"
)
"""Names of environment variables that hold secrets: PGPASSWORD, OPENAI_KEY, GITHUB_PAT."""
_NOT_A_SECRET = re.compile(
    r"(?i)(_path|_file|_dir|_home|_sock|_host|_url|_parallelism|^pwd$|^oldpwd$)$|^(pwd|oldpwd|xauthority)$"
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
    r"|gsk_[A-Za-z0-9]{20,}|r8_[A-Za-z0-9]{20,}|rpa_[A-Za-z0-9]{20,}|nvapi-[\w-]{20,}|hvs\.[\w-]{20,}"
    r"|dapi[0-9a-f]{32}|xapp-[\w-]{20,}|ya29\.[\w-]{20,}|AGE-SECRET-KEY-[0-9A-Z]{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----)?"
)
_LONG_VALUE = r"[^\s\"'`,;&<>{}()\[\]$]"
_IN_CONTEXT = re.compile(
    r"(?i)(?P<url>(?<=://)[^/\s@:\"']*:[^/\s@\"']+(?=@)"
    r"|(?<=https://)[^/\s@:\"']+(?=@)|(?<=http://)[^/\s@:\"']+(?=@))"
    r"|(?<=[?&])(?P<query>(?:[\w.-]*(?:token|api_?key|access_?key|secret|password|passwd|sig|signature"
    r"|auth|credential))=)[^&\s\"'#]+"
    r"|(?P<user>\bcurl\b[^\n|;&]*?\s(?:-u|--user)[ =]?[\"']?[^\s:\"']+:)[^\s\"']+"
    r"|(?P<flag>\b(?:sshpass\s+-p\s*|mysql(?:dump)?\b[^\n|;&]*?\s-p))[^\s\"']{4,}"
    r"|(?P<piped>\becho\s+(?:-n\s+)?[\"']?)[^\s\"'|]{4,}(?=[\"']?\s*\|[^\n]*(?:--password-stdin|\blogin\b))"
    r"|(?P<custom>\b(?:x-[\w-]*(?:token|key|auth|secret)|api-key|(?:set-)?cookie)[\"']?\s*:\s*[\"']?)"
    r"[^\s\"',}]{4,}"
    r"|(?P<netrc>\bmachine\s+\S+\s+login\s+\S+\s+password\s+)\S+"
    r"|(?P<header>\b(?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?(?:(?:bearer|basic|token|digest)\s+)?)"
    r"[^\s\"',}]{4,}"
    r"|(?P<scheme>\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{12,}"
    r"|(?P<login>\b(?:wandb|huggingface-cli|hf|docker|podman|gh|az|aws|comet|neptune|clearml)\b[^\n]{0,40}"
    r"\blogin\b[ \t]+(?:--?[\w-]+[ \t=]+)*)[A-Za-z0-9_.:/+-]{12,}"
    r"|(?P<option>--?(?:[\w-]*(?:token|password|passwd|secret|api-?key|access-?key))[ \t=]+)"
    r"[^\s\"'-][^\s\"']{3,}"
)
"""Secrets known by what stands before them: in an address, a query, a header, a login or an option."""
_BEFORE = (
    "query",
    "user",
    "flag",
    "piped",
    "custom",
    "netrc",
    "header",
    "scheme",
    "login",
    "option",
)
"""Groups of that pattern that stand before a secret and are kept."""
_ASSIGNED_LOOSE = re.compile(
    r"(?m)^[ \t]*(?:export[ \t]+|-[ \t]+)?[\"']?(?P<name>[A-Za-z_][\w.-]*)[\"']?[ \t]*[:=][ \t]*"
    r"(?P<value>[^\s\"'#,;&|]{6,})"
)
"""A line of YAML, INI or shell; a value without a digit may be a variable's name there."""
_ASSIGNED = re.compile(
    r"(?P<name>[A-Za-z_][\w.-]{0,120})(?P<between>[\"']?\s*(?::|=>|=)\s*)"
    r"(?P<quote>[\"'])(?P<value>[^\"'\s]{4,})(?P=quote)"
)
_ASSIGNED_BARE = re.compile(r"(?m)(?P<name>\b[A-Z_][A-Z0-9_]*)=(?P<value>[^\s\"'$`;|&<>]{6,})")
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
    "gsk_",
    "r8_",
    "rpa_",
    "nvapi-",
    "hvs.",
    "dapi",
    "xapp-",
    "ya29.",
    "AGE-SECRET-KEY-",
)
"""Every pattern in `_SHAPES` contains one of these, so text without them does not need the regex compiled."""
_SHORTEST_LINE, _SHORTEST_KEY = 16, 16
_SHORTEST = 6
"""Shorter values of secret environment variables are not searched for: they would match ordinary text."""


def is_secret_name(name: str) -> bool:
    """Whether a key, option or variable of this name holds a secret: `api_key`, `HF_TOKEN`, `dbPassword`."""
    if not name.islower():
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    one = name.replace("-", "_").removesuffix("s")
    found = any(one == ending or one.endswith(f"_{ending}") for ending in _NAMES)
    found = found or one.endswith(("password", "passwd", "passphrase"))
    special = one.removesuffix("_token").rpartition("_")[2] in _SPECIAL_TOKENS
    return found and not (special and one.endswith("_token"))


def is_secret_file(path: str) -> bool:
    """Whether a file of this name usually holds secrets: `.env`, `id_rsa`, `*.pem`."""
    return bool(re.search(_FILE, path))


def is_secret_variable(name: str) -> bool:
    """Whether an environment variable of this name holds a secret: `PGPASSWORD`, `OPENAI_KEY`, `HF_TOKEN`."""
    return bool(_VARIABLE.search(name)) and not _NOT_A_SECRET.search(name)


def secrets_in(value: Any, path: str = "") -> Iterator[str]:
    """Yield dotted paths of secrets in plain data: values under a secret name, texts that hold a secret."""
    if isinstance(value, dict):
        for key, item in value.items():
            where = f"{path}.{key}" if path else str(key)
            if _is_secret_item(str(key), item):
                yield where
            else:
                yield from secrets_in(item, where)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from secrets_in(item, f"{path}[{number}]")
    elif isinstance(value, str) and _hide_patterns(value) != value:
        yield path


def _is_secret_item(key: str, item: Any) -> bool:
    """Whether a mapping's item is a secret by its key: text, a list of texts, a number under a password."""
    if not is_secret_name(key):
        return False
    if isinstance(item, list):
        return any(isinstance(one, str) and one for one in item)
    if isinstance(item, int | float) and not isinstance(item, bool):
        return key.lower().endswith(_PASSWORDS)
    return isinstance(item, str) and bool(item)


def _hide_patterns(text: str) -> str:
    """Hide what is a secret by its form, or by what stands before it."""
    if any(sign in text for sign in _SIGNS):
        text = re.sub(_SHAPES, HIDDEN, text)
    if len(text) < _SHORTEST:
        return text
    text = _IN_CONTEXT.sub(_hidden_in_context, text)
    text = _ASSIGNED.sub(_hidden_assignment, text)
    text = _ASSIGNED_BARE.sub(_hidden_assignment, text)
    return _ASSIGNED_LOOSE.sub(
        lambda match: (
            _hidden_assignment(match) if any(map(str.isdigit, match["value"])) else match[0]
        ),
        text,
    )


def _hidden_in_context(match: re.Match[str]) -> str:
    before = next(
        (match[name] for name in _BEFORE if match[name]),
        "",
    )
    return before + HIDDEN


def _hidden_assignment(match: re.Match[str]) -> str:
    name, value = match["name"].rpartition(".")[2], match["value"]
    if value == HIDDEN or not is_secret_name(name) or not _looks_secret(name, value):
        return match[0]
    start, end = match.span("value")
    return match[0][: start - match.start()] + HIDDEN + match[0][end - match.start() :]


def _looks_secret(name: str, value: str) -> bool:
    """Whether an assigned value is a secret rather than a name, a placeholder or a special token."""
    if re.search(r"[<>{}()\[\]$*]|^\.{3}|^x+$|^[A-Za-z_]\w*(\.\w+)+$", value) or value.startswith(
        ("os.", "./", "/")
    ):
        return False
    if name.lower().endswith(_PASSWORDS):
        return len(value) >= 6
    return len(value) >= 16 or (len(value) >= 8 and any(c.isdigit() for c in value))


@cache
def _providers() -> list[re.Pattern[str]]:
    """Patterns of providers' keys from detect-secrets; none if it is not installed.

    Loaded at the first use: some of its modules take half a second to import.
    """
    found: list[re.Pattern[str]] = []
    for name in _PROVIDERS:
        try:
            module = import_module(f"detect_secrets.plugins.{name}")
        except ImportError:
            continue
        kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
        own = [kind for kind in kinds if kind.__module__ == module.__name__]
        found += [pattern for kind in own for pattern in getattr(kind, "denylist", [])]
    return found


_PROVIDERS = (
    "artifactory", "aws", "azure_storage_key", "cloudant", "discord", "github_token", "gitlab_token",
    "ibm_cloud_iam", "ibm_cos_hmac", "jwt", "mailchimp", "npm", "openai", "private_key", "pypi_token",
    "sendgrid", "slack", "softlayer", "square_oauth", "stripe", "telegram_token", "twilio",
)  # fmt: skip


def _spellings(value: str) -> set[str]:
    """A secret as it is, in an address, in JSON, and each of its longer lines."""
    lines = {line for line in value.splitlines() if len(line) >= _SHORTEST_LINE}
    return {value, quote(value, safe=""), json.dumps(value)[1:-1], repr(value)[1:-1], *lines}


class Secrets:
    """Hides the values of secret environment variables, and text that matches a secret pattern."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        values = {
            v for k, v in environment.items() if is_secret_variable(k) and len(v) >= _SHORTEST
        }
        found = (re.search(r"://[^/@\s:]*:([^/@\s]+)@", value) for value in environment.values())
        values |= {match[1] for match in found if match and len(match[1]) >= _SHORTEST}
        known = {spelling for value in values for spelling in _spellings(value)}
        self._known = sorted(known, key=lambda text: (-len(text), text))

    def are_in(self, text: str) -> bool:
        """Whether the text contains a secret."""
        return self.hide(text) != text

    def hide(self, text: str) -> str:
        """Replace each secret in the text by `[secret]`."""
        for value in self._known:
            text = text.replace(value, HIDDEN)
        text = _hide_patterns(text)
        if len(text) >= _SHORTEST_KEY:
            for pattern in _providers():
                text = pattern.sub(HIDDEN, text)
        return text

    def hide_quickly(self, text: str) -> str:
        """Replace secrets of the environment and common patterns: for logs, where providers' are too slow."""
        for value in self._known:
            text = text.replace(value, HIDDEN)
        return _hide_patterns(text)

    def hide_in(self, value: Any) -> Any:
        """Hide every secret in plain data; any text under a secret name counts as one."""
        if isinstance(value, dict):
            return {
                key: HIDDEN if _is_secret_item(str(key), item) else self.hide_in(item)
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
