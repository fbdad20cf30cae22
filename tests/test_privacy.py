"""Secrets of a command line and of addresses are hidden; nothing else is changed."""

from __future__ import annotations

import pytest

from mmedexpert.privacy import redacted, without_password


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("http://me:pass@host:8000/v1", "http://***@host:8000/v1"),
        ("https://me:p@ss@host/v1", "https://***@host/v1"),
        ("https://token@host/v1?api_key=abc&x=1", "https://***@host/v1?api_key=***&x=1"),
        ("no server answers at http://a:b@h/v1 (refused)", "no server answers at http://***@h/v1 (refused)"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("mail me@example.org", "mail me@example.org"),
    ],
)
def test_addresses_lose_their_secrets(text, told):
    assert without_password(text) == told


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("engine.endpoint.base_url=http://u:p@h/v1", "engine.endpoint.base_url=http://***@h/v1"),
        ("+logger.api_key=abc", "+logger.api_key=***"),
        ("hf_token=hf_abc", "hf_token=***"),
        ("engine.endpoint.api_key_env=MY_KEY", "engine.endpoint.api_key_env=MY_KEY"),
        ("model.max_new_tokens=56", "model.max_new_tokens=56"),
        ("trainer.micro_batch_tokens=8192", "trainer.micro_batch_tokens=8192"),
        ("trainer.micro_batch_tokens=null", "trainer.micro_batch_tokens=null"),
        ("gba.weights=[1,0,0,0]", "gba.weights=[1,0,0,0]"),
    ],
)
def test_a_command_line_loses_its_secrets(word, told):
    assert redacted([word]) == [told]
