"""`inspect`: what a manifest says of its data, and a sheet of samples as they are or as the model will see them."""

from __future__ import annotations

import argparse
import random
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from data_pipeline.commands.flags import new_file, positive
from data_pipeline.config import DataConfig
from data_pipeline.overlap import overlap
from data_pipeline.samples.image import BadSample, decode_image
from data_pipeline.samples.limits import MOST_BYTES
from data_pipeline.samples.text import CAPTIONS, READ_AS, check_captions, pick_caption, split
from data_pipeline.storage.cache import open_store
from data_pipeline.storage.manifest import Manifest, load_manifest
from data_pipeline.storage.redaction import redact_urls
from data_pipeline.storage.remote import is_remote

CELL = 192
"""Side of a picture on the sheet, in pixels."""
TEXT_LINES, LINE_HEIGHT, FONT_SIZE, MARGIN = 3, 15, 12, 10
PLAIN_COLUMNS = 6
VIEWS = 5
"""Augmented views of each sample, to the right of the sample itself."""
INK, FAINT, RED = (25, 25, 25), (225, 225, 225), (180, 20, 20)
DISTRIBUTIONS = {
    "width": "image width, pixels",
    "height": "image height, pixels",
    "image_bytes": "image bytes",
    "captions_per_image": "captions per image",
    "caption_words": "caption words",
    "caption_characters": "caption characters",
}
LEAKS_SHOWN = 10
SHARES = ("min", "p5", "median", "p95", "max", "mean")

COUNTED = {"uncaptioned": "samples have no caption", "several_lines": "samples have such a text"}

Cell = tuple[Image.Image | None, str]
"""A picture and what is written under it; None: a sample that cannot be used, and why."""


HELP = """\
examples:
  python -m data_pipeline inspect data/train
  python -m data_pipeline inspect data/train --out sheet.png
  python -m data_pipeline inspect data/train --out sheet.png --augmented --config train/configs/seed.yaml
  python -m data_pipeline inspect data/train --held-out data/val
  python -m data_pipeline inspect data/train --held-out data/val --index train-index val-index

--held-out compares image files byte for byte; the indexes of embeddings that `python -m train.embed` makes of both
find the same picture in another size or format.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", metavar="MANIFEST", help="manifest.json, or the directory that holds it")
    parser.add_argument(
        "--out", type=new_file, metavar="PNG", help="draw samples, evenly spaced over the data, on this sheet"
    )
    parser.add_argument("--count", type=positive, default=0, metavar="N", help="samples on the sheet (24; augmented 8)")
    parser.add_argument("--augmented", action="store_true", help="draw what the model sees in training, several times")
    parser.add_argument("--config", type=Path, metavar="YAML", help="run configuration whose data section applies")
    parser.add_argument("--seed", type=int, default=0, help="of the augmentation")
    parser.add_argument(
        "--held-out", metavar="DATA", help="manifest of held-out data: count its images that are here, too"
    )
    parser.add_argument(
        "--index", nargs=2, metavar=("INDEX", "HELD_OUT_INDEX"), help="find resized and re-encoded ones, too: see below"
    )


def run(args: argparse.Namespace) -> int:
    """The command. Raises ValueError for what cannot be read or drawn."""
    if args.augmented and not args.out:
        raise ValueError("--augmented needs --out: the PNG file to draw on")
    if args.out and args.out.is_dir():
        raise ValueError(f"--out {args.out} is a directory: give a PNG file, such as {args.out / 'sheet.png'}")
    config = load_config(args.config)
    manifest = load_manifest(args.manifest)
    print(describe(manifest))
    if args.held_out or args.index:
        print(leak_report(manifest, args.held_out, args.index))
    if args.out:
        count = args.count or (8 if args.augmented else 24)
        sheet = draw(manifest, config, count=count, augmented=args.augmented, seed=args.seed)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(args.out, "PNG")
        print(f"sheet: {args.out}")
    return 0


def leak_report(manifest: Manifest, held_out: str | None, indexes: Sequence[str] | None) -> str:
    """How many held-out images are in the data, by their bytes or by two indexes of embeddings.

    Raises:
        ValueError: there is no held-out manifest, or an index is of other data.
    """
    if held_out is None:
        raise ValueError("--index needs --held-out: the manifest of the held-out data")
    other = load_manifest(held_out)
    if indexes is None:
        return f"\nleaks      {overlap([manifest], other):,} of the {other.nsamples:,} held-out images, byte for byte"
    from data_pipeline.embeddings.duplicates import copies
    from data_pipeline.embeddings.index import open_index

    opened = [open_index(path) for path in indexes]
    for index, of in zip(opened, (manifest, other), strict=True):
        if index.about["input"]["identity"] != of.hash:
            raise ValueError(f"--index {index.directory} is not of {of.path}: embed that, or give its index")
    found = copies(opened[1], opened[0])
    lines = [
        f"\nleaks      {len(found):,} of the {other.nsamples:,} held-out images, the same picture in any size or format"
    ]
    lines += [f"           {one.key} is {one.of_key}" for one in found[:LEAKS_SHOWN]]
    more = len(found) - LEAKS_SHOWN
    return "\n".join([*lines, *([f"           and {more:,} more"] if more > 0 else [])])


def load_config(path: Path | None) -> DataConfig:
    """The `data` section of a run's YAML. Raises ValueError naming the field that is unknown or of the wrong type."""
    if path is None:
        return DataConfig()
    import jsonargparse

    from data_pipeline.config_file import instantiate, read_fields

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=DataConfig, default=DataConfig())
    content = read_fields(path)
    try:
        return instantiate(parser, parser.parse_object({"data": content.get("data") or {}})).data
    except jsonargparse.ArgumentError as error:
        raise ValueError(f"--config {path}: {error}") from None


def describe(manifest: Manifest) -> str:
    """Counts, sizes and lengths as a table."""
    shards, known = manifest.shards, manifest.statistics
    samples = [shard.nsamples for shard in shards]
    megabytes = [shard.filesize / 1e6 for shard in shards]
    lines = [
        f"{manifest.path}",
        f"samples    {manifest.nsamples:,}",
        f"shards     {len(shards):,}: {min(samples):,} to {max(samples):,} samples, "
        f"{min(megabytes):,.1f} to {max(megabytes):,.1f} MB, {sum(megabytes):,.1f} MB together",
    ]
    if any(shard.selection for shard in shards):
        rule = f": {known['selected']}" if "selected" in known else ""
        in_tars = sum(shard.samples_in_tar for shard in shards)
        lines.append(f"selected   {manifest.nsamples:,} of the {in_tars:,} samples in these shards{rule}")
    if "samples" not in known:
        return "\n".join([*lines, "no statistics; get them with: python -m data_pipeline index SHARDS"])
    bad, classes, repeats = known["bad"], known["classes"], known["duplicates"]
    lines.append(f"bad        {bad['count']:,}")
    lines += [f"           {number:,}: {cause}" for cause, number in bad["causes"].items()]
    lines.append(f"captions   a text of several lines is read as {READ_AS[manifest.captions]}")
    lines += [f"           {known[name]:,} {what}" for name, what in COUNTED.items() if known.get(name)]
    lines += [f"left out   {redact_urls(shard['cause'])}" for shard in known.get("left_out", ())]
    lines.append(f"repeated   {repeats['image']:,} images, {repeats['caption']:,} captions")
    if classes["count"]:
        lines.append(f"classes    {classes['count']:,}, of {classes['samples']:,} samples")
    for name in ("mean", "std"):
        lines.append(
            f"{name:<10} " + "  ".join(f"{value:.4f}" for value in known[name]) + "  (red, green, blue; 0 to 1)"
        )
    lines += ["", f"{'':<22}" + "".join(f"{share:>10}" for share in SHARES)]
    for name, title in DISTRIBUTIONS.items():
        if known[name]:
            lines.append(
                f"{title:<22}" + "".join(f"{known[name][share]:>10,.{share == 'mean':d}f}" for share in SHARES)
            )
    return "\n".join(lines)


def draw(manifest: Manifest, config: DataConfig, *, count: int, augmented: bool, seed: int) -> Image.Image:
    """A sheet of `count` samples, evenly spaced: one cell each or, augmented, a row each of the sample and its views.

    Of remote data only the first shard is fetched.
    """
    cells = _augmented_cells(config, seed) if augmented else _plain_cells(config)
    grid = [cell for number, raw in enumerate(_spaced(manifest, config, count)) for cell in cells(number, raw)]
    policy = f" · policy {config.augment.policy} · {config.image_size} pixels" if augmented else ""
    return paint(grid, VIEWS + 1 if augmented else PLAIN_COLUMNS, f"{manifest.nsamples:,} samples{policy}")


def _spaced(manifest: Manifest, config: DataConfig, count: int) -> list[dict[str, Any]]:
    """`count` raw samples, evenly spaced over the data."""
    shards = [shard for shard in manifest.shards if not is_remote(shard.url)] or manifest.shards[:1]
    total = sum(shard.nsamples for shard in shards)
    wanted = sorted({(2 * i + 1) * total // (2 * count) for i in range(count)})
    store = open_store(config)
    samples, start = [], 0
    for shard in shards:
        inside = [position - start for position in wanted if start <= position < start + shard.nsamples]
        start += shard.nsamples
        if inside:
            reader = store.open(shard, MOST_BYTES)
            samples += [reader.raw(position) | {CAPTIONS: manifest.captions} for position in inside]
            reader.close()
    return samples


def _plain_cells(config: DataConfig) -> Callable[[int, dict[str, Any]], list[Cell]]:
    def cells(number: int, raw: dict[str, Any]) -> list[Cell]:
        try:
            data, captions, label = split(raw, needs_caption=False)
            image = decode_image(data, max_pixels=config.max_pixels, background=config.background, target=CELL)
        except BadSample as error:
            return [(None, f"{raw['__key__']}: {error.cause}")]
        more = f" (+{len(captions) - 1})" if len(captions) > 1 else ""
        text = f"{captions[0]}{more}" if captions else ""
        return [(image, f"[{label}] {text}" if label is not None else text)]

    return cells


def _augmented_cells(config: DataConfig, seed: int) -> Callable[[int, dict[str, Any]], list[Cell]]:
    from data_pipeline.samples.transforms import train_transform  # imports torch, which a plain sheet does not need

    check_captions(config.caption)
    plain, transform = _plain_cells(config), train_transform(config)

    def cells(number: int, raw: dict[str, Any]) -> list[Cell]:
        row = plain(number, raw)
        for view in range(VIEWS if row[0][0] else 0):
            rng = random.Random(f"{seed}/{number}/{view}")
            data, captions, _ = split(raw, needs_caption=False)
            seen_3HW = transform(data, rng)
            caption = pick_caption(captions, config.caption, rng) if captions else ""
            row.append((Image.fromarray(seen_3HW.permute(1, 2, 0).numpy()), caption))
        return row + [(None, "")] * (VIEWS + 1 - len(row))

    return cells


def paint(cells: Sequence[Cell], columns: int, title: str) -> Image.Image:
    """Cells row by row, under a title."""
    width, height = CELL + MARGIN, CELL + TEXT_LINES * LINE_HEIGHT + MARGIN
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN + 2 * LINE_HEIGHT), "white")
    pen, font = ImageDraw.Draw(sheet), _font()
    pen.text((MARGIN, MARGIN), title, INK, font)
    for place, (image, text) in enumerate(cells):
        x, y = MARGIN + place % columns * width, MARGIN + 2 * LINE_HEIGHT + place // columns * height
        if image is not None:
            scale = CELL / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            # Enlarged pixels stay visible as such: that is how little the model sees.
            image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
            sheet.paste(image, (x + (CELL - size[0]) // 2, y + (CELL - size[1]) // 2))
        pen.rectangle((x - 1, y - 1, x + CELL, y + CELL), outline=FAINT)
        lines = textwrap.wrap(text, CELL // 7, max_lines=TEXT_LINES, placeholder=" …")
        for line, content in enumerate(lines):
            pen.text((x, y + CELL + 2 + line * LINE_HEIGHT), content, INK if image else RED, font)
    return sheet


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font with more than Latin letters, where matplotlib is there to lend its own."""
    try:
        import matplotlib

        return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), FONT_SIZE)
    except (ImportError, OSError):
        return ImageFont.load_default(FONT_SIZE)
