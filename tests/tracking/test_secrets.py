"""What is shown, kept or sent has no passwords: each row is a text with one, and what is left of it."""

import pytest

from int8run.tracking.secrets import mask_secret_settings, mask_secrets, remove_login

HF = "hf_" + "Ab1" * 10
TEXTS = {
    "http://me:s3cret@host:5000/path": "http://host:5000/path",
    "HTTPS://me:s3cret@host": "HTTPS://host",
    "https://s3cret@host": "https://host",
    # written without the encoding that they need
    "http://me:s3@cret@host": "http://host",
    "postgresql+psycopg://me:s3/c@ret@host/db": "postgresql+psycopg://host/db",
    "mysql://me:s3cret@host/db?charset=utf8": "mysql://host/db?charset=utf8",
    "tracker.uri=http://me:s3cret@host experiment=a": "tracker.uri=http://host experiment=a",
    "Max retries: 'http://me:s3cret@h' and http://you:s3cret@h": "Max retries: 'http://h' and http://h",
    "https://host/x.safetensors?token=s3cret&v=1": "https://host/x.safetensors?token=***&v=1",
    "s3://bucket/a?X-Amz-Signature=s3cret": "s3://bucket/a?X-Amz-Signature=***",
    "https://host/a?api_key=s3cret#b": "https://host/a?api_key=***#b",
    "+sampler.extra.hf_token=s3cret": "+sampler.extra.hf_token=***",
    "hydra.launcher.runtime_env={env_vars: {HF_TOKEN: s3cret, A: b}}": (
        "hydra.launcher.runtime_env={env_vars: {HF_TOKEN: ***, A: b}}"
    ),
    "MLFLOW_TRACKING_PASSWORD=s3cret": "MLFLOW_TRACKING_PASSWORD=***",
    "Authorization: Bearer s3cret-token": "Authorization: Bearer ***",
    f"clone with {HF}.": "clone with ***.",
    "key AKIAIOSFODNN7EXAMPLE": "key ***",
}


@pytest.mark.parametrize(("text", "masked"), TEXTS.items())
def test_a_password_is_masked(text, masked):
    assert mask_secrets(text) == masked
    assert mask_secrets(masked) == masked, "again"


PLAIN = [
    "a (token:1.2) fox, the secret: a key, password",
    "calibration.max_tokens_per_layer=2048",
    "http://127.0.0.1:5000/#/experiments/1?searchFilter=tags.sweep%3D%27a%27&startTime=ALL",
    "sqlite:////home/me@work/mlflow.db",
    "a@b=c",
    "https://huggingface.co/org/model",
    "lora.adapters.0.path=org/model@main",
    "sk-short",
    "",
]


@pytest.mark.parametrize("text", PLAIN)
def test_other_texts_stay_as_they_are(text):
    assert mask_secrets(text) == text


def test_settings_are_masked_by_name_and_by_value():
    settings = {
        "tracker": {"uri": "http://me:s3cret@h", "folder": "."},
        "launcher": {"env_vars": {"HF_TOKEN": "anything", "API_KEY": "x", "HOME": "/home/me"}},
        "tokens": "kept",
        "max_tokens_per_layer": 2048,
        "list": ["a", "postgres://me:s3cret@h/d"],
        "reference": {"token": "${oc.env:HF_TOKEN}"},
        "empty": {"password": ""},
    }
    assert mask_secret_settings(settings) == {
        "tracker": {"uri": "http://h", "folder": "."},
        "launcher": {"env_vars": {"HF_TOKEN": "***", "API_KEY": "***", "HOME": "/home/me"}},
        "tokens": "kept",
        "max_tokens_per_layer": 2048,
        "list": ["a", "postgres://h/d"],
        "reference": {"token": "${oc.env:HF_TOKEN}"},
        "empty": {"password": ""},
    }


@pytest.mark.slow
@pytest.mark.timeout(60)  # for a pattern that takes the square of the length, which is hours here
def test_a_long_text_is_masked_in_linear_time():
    text = "://a:b" * 300_000 + "?a&" * 100_000 + "TOKEN" * 100_000
    assert mask_secrets(text) == text
    assert remove_login("x" * 1_000_000) == "x" * 1_000_000
