"""Which classes a model takes for which, as a table of colours."""

from __future__ import annotations

from collections import Counter
from html import escape

from train.evaluation.task import Predictions

CLASSES = 30
"""Classes that are shown: of more, those with the most images."""


def confusion_table(predictions: Predictions) -> str:
    """HTML: a row for each class, a column for what its images were taken for, in percent of the row."""
    names, pairs = predictions.names, Counter(zip(predictions.right, predictions.predicted, strict=True))
    images = Counter(predictions.right)
    seen = sorted(sorted(images | Counter(predictions.predicted), key=lambda row: (-images[row], row))[:CLASSES])
    heads = "".join(f'<th scope="col"><span>{escape(names[row])}</span></th>' for row in seen)
    lines = []
    for right in seen:
        cells = "".join(cell(names, right, taken, pairs[right, taken], images[right]) for taken in seen)
        lines.append(f'<tr><th scope="row">{escape(names[right])} <small>{images[right]:,}</small></th>{cells}</tr>')
    note = (
        f"<p>The {CLASSES} of the {len(names):,} classes that have the most images.</p>" if len(names) > CLASSES else ""
    )
    body = f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'{note}<div class="scroll"><table class="confusion">{body}</table></div>'


def cell(names: list[str], right: int, taken: int, count: int, images: int) -> str:
    """One cell: `count` of the `images` of a class were taken for another, or for itself."""
    share = count / images if images else 0.0
    words = escape(f"{names[right]}, taken for {names[taken]}: {count:,} of {images:,}", quote=True)
    kind = "right" if right == taken else "wrong"
    shown = f"{100 * share:.0f}" if count else ""
    return f'<td class="{kind}" style="--share:{share:.3f}" title="{words}">{shown}</td>'
