"""What looks like a key, a password or a signature is shown nowhere."""

import pytest

from data_pipeline.storage.redaction import HIDDEN, address, redact, redact_urls

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("value", "hidden"),
    [
        ("s3://bucket/{000..100}.tar", "s3://bucket/{000..100}.tar"),
        ("https://me:pass@host/x", f"https://{HIDDEN}@host/x"),
        ("https://host/x.tar?X-Amz-Signature=1f", f"https://host/x.tar?{HIDDEN}"),
        ("hf_" + "a" * 30, HIDDEN),
        (f"--key={KEY}", f"--key={HIDDEN}"),
        ("my-very-own-key in a path", f"{HIDDEN} in a path"),
        ({"api_key": "x", "data": ["AKIA" + "A" * 16, 3]}, {"api_key": HIDDEN, "data": [HIDDEN, 3]}),
        ({"max_tokens": 77, "tokenizer": "bert"}, {"max_tokens": 77, "tokenizer": "bert"}),
        ({"hub_token": "t"}, {"hub_token": HIDDEN}),
        (None, None),
    ],
)
def test_case_17_redact(value, hidden, monkeypatch):
    monkeypatch.setenv("SOME_SECRET", "my-very-own-key")
    assert redact(value) == hidden


def test_a_message_keeps_all_but_passwords_and_queries_of_its_urls():
    text = "shard https://me:word@host/a.tar?sig=1f: 403; /cache/0123456789abcdef0123456789abcdef01234567/x?.tar"
    assert redact_urls(text) == (
        f"shard https://{HIDDEN}@host/a.tar?{HIDDEN} 403; /cache/0123456789abcdef0123456789abcdef01234567/x?.tar"
    )


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://h/a.tar?s=a/b", "https://h/a.tar"),
        ("/data/what?.tar", "/data/what?.tar"),
        ("s3://b/a.tar", "s3://b/a.tar"),
    ],
)
def test_an_address_has_no_query(url, expected):
    assert address(url) == expected
