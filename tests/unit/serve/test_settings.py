from __future__ import annotations

import pytest

pytest.importorskip("yaml", reason="pip install 'minitron[serve]'")

from minitron.serve.settings import ServeSettings, read_settings


def test_a_file_is_as_the_options(tmp_path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("models: [bundled, small=bundled-half]\nport: 9000\nmax-waiting: 7\nrequest_seconds: 3\n")
    given = {"models": ("bundled", "small=bundled-half"), "port": 9000, "max_waiting": 7, "request_seconds": 3}
    assert read_settings(file, {}) == read_settings(None, given) == ServeSettings(**given)
    assert read_settings(file, {"port": 1234, "slots": None}).port == 1234


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ports: 1", "unknown option 'ports'"),
        ("port: '80'", "port is '80'; it must be int"),
        ("port: true", "port is True"),
        ("port: 70000", "port is 70000; it must be from 0 to 65535"),
        ("request_seconds: .nan", "request_seconds is nan"),
        ("models: [1]", "it must be a list of strings"),
        ("- a", "must be a mapping"),
        ("a: [", "is not YAML"),
        ("host: 0.0.0.0", "give a file of keys"),
        ("models: []", "name at least one"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, words) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"serve\.yaml") as found:
        read_settings(file, {})
    assert words in str(found.value)


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("127.0.0.1", False),
        ("localhost", False),
        ("::1", False),
        ("0.0.0.0", True),
        ("192.168.1.2", True),
        ("::", True),
    ],
)
def test_a_public_address_needs_keys_or_a_word(host, public) -> None:
    if public:
        with pytest.raises(ValueError, match="other machines may reach"):
            read_settings(None, {"host": host})
    else:
        read_settings(None, {"host": host})
    assert read_settings(None, {"host": host, "allow_public": True}).public == public
    assert read_settings(None, {"host": host, "api_keys": "keys.txt"}).public == public
