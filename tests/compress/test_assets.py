from __future__ import annotations

import hashlib
import re
import subprocess
import sys

import pytest

from compress.assets import ASSETS, MODELS, TEXTS, asset_path, is_asset, python_files
from compress.errors import CompressError, UsageError
from compress.text import TextSource, iter_documents

SHA256 = {
    "wikitext2-test": "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83",
    "wikitext2-valid": "b44fb967f92b525731216a507d1fbc44b97446b7ef0a2b4d1a893f81f1bbc29e",
    "wikipedia": "a37c4fed37f7182ecc789bef5f1424779e3faa1418d1937ecb4b416ab96e9615",
    "pubmed": "8466c3b59789234701a51a3e57363a7a563d68de909b81cdc73365de47d12fb7",
}
LICENCES = {"pubmed": "MIT License"}


def test_the_listing() -> None:
    assert set(MODELS) == {"tiny-llama", "tiny-moe"}
    assert set(TEXTS) == set(SHA256)
    assert set(ASSETS) == {*MODELS, *TEXTS}


@pytest.mark.parametrize("name", SHA256)
def test_texts_are_the_published_bytes(name: str) -> None:
    assert hashlib.sha256(asset_path(name).read_bytes()).hexdigest() == SHA256[name]


@pytest.mark.parametrize("name", SHA256)
def test_a_licence_lies_beside_each_text_and_names_its_digest(name: str) -> None:
    notice = (asset_path(name).parent / "LICENSE.md").read_text(encoding="utf-8")
    assert LICENCES.get(name, "Attribution-ShareAlike") in notice
    assert SHA256[name] in notice
    assert f"{asset_path(name).stat().st_size:,}" in notice


@pytest.mark.parametrize("name", MODELS)
def test_models_have_weights_and_a_tokenizer(name: str) -> None:
    present = {file.name for file in asset_path(name).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= present


def test_no_training_article_is_a_wikitext_article() -> None:
    """The claim of the licence file, on which scoring a model tuned on `wikipedia` with WikiText-2 rests."""

    def titles(name: str) -> set[str]:
        text = asset_path(name).read_text(encoding="utf-8")
        return {title.lower() for title in re.findall(r"^ ?= ([^=\n](?:.*[^=\n])?) = ?$", text, re.MULTILINE)}

    training = titles("wikipedia")
    assert len(training) == 93
    for split in ("wikitext2-test", "wikitext2-valid"):
        assert len(titles(split)) >= 60
        assert not training & titles(split)


def test_the_prefix_is_optional() -> None:
    assert asset_path("asset:wikipedia") == asset_path("wikipedia")
    assert is_asset("asset:wikipedia")
    assert not is_asset("wikipedia")


@pytest.mark.parametrize(("asked", "near"), [("tiny-lama", "asset:tiny-llama"), ("asset:wikitext-test", "asset:wikitext2-test")])
def test_an_unknown_name_is_answered_with_the_closest(asked: str, near: str) -> None:
    with pytest.raises(UsageError, match=near):
        asset_path(asked)


def test_an_unlike_name_is_answered_with_all() -> None:
    with pytest.raises(UsageError, match="tiny-llama, tiny-moe, wikitext2-test") as caught:
        asset_path("zzz")
    assert "did you mean" not in str(caught.value)


def test_missing_files_are_a_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ASSETS, "ghost", "models/ghost")
    with pytest.raises(CompressError, match="install the package again") as caught:
        asset_path("ghost")
    assert not isinstance(caught.value, UsageError)


def test_import_is_light() -> None:
    code = (
        "import sys, compress.assets, compress.text, compress.data\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_standard_library_is_text_of_source_code() -> None:
    files = python_files()
    assert len(files) > 100
    assert {"ast.py", "typing.py"} <= {file.name for file in files}
    documents = list(iter_documents(TextSource(path="asset:python", span=(0.9, 1.0))))
    assert len(documents) == len(files)
    assert sum(map(len, documents)) > 200_000
