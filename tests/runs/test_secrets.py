"""What counts as a secret, and that it is hidden wherever it stands."""

import json
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_recipe
from drumline.errors import RecipeError
from drumline.recipe.load import validate
from drumline.recipe.schema import Recipe
from drumline.secrets import HIDDEN, Secrets, is_secret_file, is_secret_name, secrets_in


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "api-key", "apiKey", "db_password", "AWS_SECRET_ACCESS_KEY", "secrets",
     "clientSecret", "AZURE_CLIENT_CREDENTIALS", "GITHUB_TOKEN", "passphrase", "account_key", "PGPASSWORD",
     "Authorization", "pwd"],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    """Usual names are known, in every style of writing."""
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["tokenizer", "pad_token", "eos_token_id", "image_token", "max_new_tokens_limit", "keyboard", "sequence_length",
     "key_value_heads", "secretary", "author"],
)  # fmt: skip
def test_names_that_are_none(name: str) -> None:
    """Words of the field that only look like it are let through."""
    assert not is_secret_name(name)


def test_no_key_of_the_recipe_is_taken_for_a_secret() -> None:
    """Every legal recipe's own keys pass."""
    from plan.test_fields import _fields

    assert not [name for name in _fields(Recipe) if is_secret_name(name.rpartition(".")[2])
                if name != "duration.tokens"]  # fmt: skip
    assert not list(secrets_in(tiny_recipe(duration={"steps": None, "tokens": 5})))


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"options": {"hf_token": "abc"}}},
        {"model": {"config": {"nested": {"apiKey": "abc"}}}},
        {"description": "with hf_abcdefghijklmnopqrstuvwxyz"},
        {"data": {"path": "https://me:password1@example.org/x"}},
        {"data": {"path": "https://abcTOKEN@example.org/x"}},
        {"data": {"path": "https://example.org/x?a=1&token=abc123"}},
        {"data": {"options": {"token": ["abc", "def"]}}},
        {"data": {"options": {"db": {"password": 12345}}}},
        {"data": {"options": {"account_key": "abc"}}},
        {"data": {"options": {"headers": {"Authorization": "Bearer abc"}}}},
        {"description": "curl -H 'Authorization: Bearer abcdef'"},
    ],
)
def test_a_recipe_with_a_secret_is_refused(sections: dict) -> None:
    """By name or by shape, with the key named, and the value not repeated."""
    with pytest.raises(RecipeError, match="secrets do not belong in a recipe") as caught:
        validate(tiny_recipe(**sections), "r.yaml")
    assert "abc" not in str(caught.value)


def test_arguments_lose_their_secrets() -> None:
    """As an option's value, after an equals sign, and by the environment's own value."""
    secrets = Secrets({"HF_TOKEN": "tok-1234567", "SHORT_KEY": "x", "PATH": "/usr/bin"})
    argv = [
        "drumline",
        "run",
        "--api-key",
        "xyz",
        "--token=xyz",
        "a.b.password=xyz",
        "p=tok-1234567/x",
        "optimizer.lr=1",
    ]
    assert secrets.hide_arguments(argv) == [
        "drumline", "run", "--api-key", HIDDEN, f"--token={HIDDEN}", f"a.b.password={HIDDEN}", f"p={HIDDEN}/x", "optimizer.lr=1",
    ]  # fmt: skip


@settings(deadline=None)
@given(st.text(), st.text(min_size=8), st.text())
def test_an_environments_secret_never_survives(before: str, value: str, after: str) -> None:
    """Whatever stands around it, in any depth of a value."""
    secrets = Secrets({"MY_TOKEN": value})
    hidden = secrets.hide_in({"a": [{"b": before + value + after}]})["a"][0]["b"]
    assert value not in hidden.replace(HIDDEN, "")


@pytest.mark.parametrize(
    "name", [".env", "a/.env.local", "id_rsa", "k.pem", ".aws/config", "my-secrets.yaml", ".netrc"]
)
def test_files_of_secrets(name: str) -> None:
    """Known by their names."""
    assert is_secret_file(name)
    assert not is_secret_file("environment.py")


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ('PASSWORD = "hunter2hunter2"', "hunter2hunter2"),
        ("db_password='correcthorse'", "correcthorse"),
        ('{"api_key": "k1234567"}', "k1234567"),
        ("export PGPASSWORD=hunter22", "hunter22"),
        ("https://TOKENabc@host/x", "TOKENabc"),
        ("git clone https://me:hunter22@host/x", "hunter22"),
        ("GET https://host/x?b=1&access_token=abcdef&c=2", "abcdef"),
        ('headers = {"Authorization": "Bearer abc.def"}', "abc.def"),
        ("Authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
        (
            "wandb login 0123456789abcdef0123456789abcdef01234567",
            "0123456789abcdef0123456789abcdef01234567",
        ),
        ("tool --token abcd1234 run", "abcd1234"),
        ("AKIA" + "A" * 16, "AKIA" + "A" * 16),
        ("xoxb-1234-5678-abcdef", "xoxb-1234-5678-abcdef"),
        ("SK" + "0a" * 16, "SK" + "0a" * 16),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "BEGIN OPENSSH PRIVATE KEY"),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nMIIEabc123\n-----END RSA PRIVATE KEY-----",
            "MIIEabc123",
        ),
        ("redis://:p4ssw0rdp4ss@host", "p4ssw0rdp4ss"),
        ("curl -s -u user:hunter22 http://h", "hunter22"),
        ("echo hunter22 | docker login -u me --password-stdin", "hunter22"),
        ("mysql -h db -phunter22", "hunter22"),
        ("sshpass -p hunter22 ssh host", "hunter22"),
        ("machine host login me password hunter22", "hunter22"),
        ("X-Api-Key: abcdef12", "abcdef12"),
        ("Set-Cookie: session=abcdef12; Path=/", "abcdef12"),
        ("db:\n  password: hunter2hunter\n", "hunter2hunter"),
        ("api_key: abcdef0123456789abcdef", "abcdef0123456789abcdef"),
        ("[s3]\naws_secret_access_key = abcDEF0123456789/+abcd\n", "abcDEF0123456789/+abcd"),
        ("token=abcdef0123456789", "abcdef0123456789"),
        ("gsk_" + "a1" * 15, "gsk_" + "a1" * 15),
        ("hvs." + "a1" * 15, "hvs." + "a1" * 15),
    ],
)
def test_a_secret_is_known_by_what_stands_before_it(text: str, secret: str) -> None:
    """Assignments, addresses, queries, headers, logins, options, and providers' keys."""
    assert secret not in Secrets({}).hide(text)


@pytest.mark.parametrize(
    "text",
    ['tokenizer = "bert-base-uncased"', 'eos_token = "</s>"', 'auth="basic"', "max_tokens = 100", "lr: 3e-4",
     'secret_key = os.environ["X"]', "password = get_password()", 'key="label"', "git@github.com:a/b.git",
     "password = args.password", "token: gpt2", "    token = tokens[0]", "secret: false",
     "ssh://git@github.com/a", "module load cuda/12.8", "https://host/x?page=2#token"],
)  # fmt: skip
def test_ordinary_text_stays(text: str) -> None:
    """Words that only look like it; a file is not left out of a record for them."""
    assert Secrets({}).hide(text) == text


def test_a_long_line_without_a_break_is_read_once() -> None:
    """200,000 word characters stays, and what stands behind it is found; a pass per character would not end."""
    line = "a1" * 100_000
    assert Secrets({}).hide(line) == line
    assert Secrets({}).hide(f'{line}\npassword = "hunter2x"') == f'{line}\npassword = "{HIDDEN}"'


@pytest.mark.parametrize("name", ["PGPASSWORD", "OPENAI_KEY", "MY_PAT", "DB_DSN", "SERVICE_AUTH"])
@pytest.mark.parametrize("spelling", ["{}", "x?p={q}", '{{"a": "{j}"}}'])
def test_values_of_secret_variables_are_hidden_in_every_spelling(name: str, spelling: str) -> None:
    """As they are, in an address, in JSON."""
    value = 'p@ss "w0rd/1'
    text = spelling.format(value, q=quote(value, safe=""), j=json.dumps(value)[1:-1])
    hidden = Secrets({name: value, "XAUTHORITY": "/root/.Xauthority", "PWD": "/work"}).hide(text)
    assert "w0rd" not in hidden
    assert (
        Secrets({"XAUTHORITY": "/root/.Xauthority"}).hide("/root/.Xauthority")
        == "/root/.Xauthority"
    )


def test_a_password_in_an_address_of_the_environment_is_hidden_alone_too() -> None:
    """DATABASE_URL is no secret by its name; the password in it is one."""
    secrets = Secrets(
        {"DATABASE_URL": "postgres://me:hunter2hunter@db/x", "REDIS_URL": "redis://:p4ssw0rd@h"}
    )
    assert (
        secrets.hide("failed with hunter2hunter and p4ssw0rd")
        == f"failed with {HIDDEN} and {HIDDEN}"
    )
