"""Whether balance, multi-scale alignment, dataset statistics and image self-supervision help.

    python -m tests.benchmarks.ablation --json [--seeds 3] [--steps 160] [--only baseline balance]

Every variant trains in two regimes, with several seeds, for the same number of samples, on OpenMoji and Open Clip Art
together (`python -m data_pipeline demo`, then with `--corpus openclipart`). A regime's baseline and its variants share
all settings but the variant's own. Runs take turns by seed; finished ones are kept, so the command can be interrupted
and given again. Held-out concepts are held out within each corpus; the other one may show the like of them, to all
variants alike. Zero-shot: Open Clip Art's held-out drawings among the names of its folders. What the variants cost:
tests.benchmarks.balance and tests.benchmarks.terms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.commands import index as indexing
from train.run.directory import read_results

ZEROSHOT = "zeroshot.json"
CORPORA = ("openmoji", "openclipart")
METRICS = ("t2i_R@1", "i2t_R@1", "t2i_R@10", "i2t_R@10", "zeroshot_top1", "zeroshot_mean_per_class")
VARIANTS = {
    "baseline": [],
    "balance": ["--balance.kind", "gradient"],
    "multiscale": ["--model.multiscale.enabled", "true"],
    "both": ["--balance.kind", "gradient", "--model.multiscale.enabled", "true"],
    "statistics": ["--data.normalize", "dataset"],
    "views": ["--model.self_supervision.image", "0.5"],
}
TOWERS = ["--model.text.locked_until", "0", "--model.text.projection", "linear", "--model.embed_dim", "256"]
REGIMES = {
    "scratch": [*TOWERS, "--model.text.weights", "scratch", "--model.text.lr", "5e-4"],
    "pretrained_text": [*TOWERS, "--model.text.lr", "1e-4"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--demo", type=Path, default=Path("data/demo"), help="demo data (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="run directories (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each variant (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=160, help="steps of 128 pairs (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants (default: all)")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES), help="default: both")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.seeds < 1 or options.steps < 1:
        parser.error("--seeds and --steps are at least 1")
    try:
        train, val = (joined(options.demo, part, options.runs) for part in ("train", "val"))
    except ValueError as error:
        parser.error(str(error))
    for seed in range(options.seeds):
        for regime in options.regimes:
            for variant in options.only:
                fields = ["--data.train", train, "--data.val", val, "--runs_dir", options.runs, "--train.seed", seed]
                fields += ["--train.steps", options.steps, "--eval.every", 0, "--checkpoint.keep", 1]
                fields += ["--data.eval_crop", 1]  # clip art has no margin as the quickstart's drawings have
                fields += [*REGIMES[regime], *VARIANTS[variant]]
                name = run_name(regime, variant, seed)
                finished = read_results(options.runs / name)
                if finished is not None and finished["steps"] != options.steps:
                    parser.error(
                        f"--steps {options.steps}: {options.runs / name} is finished with {finished['steps']}; "
                        "give that, or another --runs"
                    )
                try:
                    if finished is None:
                        run(name, fields)
                    zeroshot(options.runs / name, options.demo / "openclipart")
                except subprocess.CalledProcessError as error:
                    parser.exit(1, f"error: {name} has ended with {error.returncode}; the same command resumes\n")
    rows = [row(options.runs, regime, variant, options.seeds) for regime in options.regimes for variant in options.only]
    print(json.dumps(rows, indent=2) if options.json else table(rows))


def joined(demo: Path, part: str, out: Path) -> Path:
    """The manifest of both corpora's `part`. Raises ValueError naming the command where one is missing."""
    for corpus in CORPORA:
        if not (demo / corpus / part / "manifest.json").exists():
            raise ValueError(f"{demo / corpus} is missing: python -m data_pipeline demo {demo} --corpus {corpus}")
    manifest = out / f"{part}.json"
    if not manifest.exists():
        out.mkdir(parents=True, exist_ok=True)
        shards = [str(path) for corpus in CORPORA for path in sorted((demo / corpus / part).glob("*.tar"))]
        indexing.index([str(Path(shard).absolute()) for shard in shards], manifest, 2)
    return manifest


def run_name(regime: str, variant: str, seed: int) -> str:
    return f"{regime}-{variant}-{seed}"


def run(name: str, fields: Sequence[object]) -> None:
    """Train, or resume."""
    command = ["./launch/local.sh", "--engine", "cpu", "--processes", "1", "--precision", "bf16"]
    command += ["--config", "train/configs/scratch.yaml", "--name", name]
    subprocess.run([*command, *map(str, fields)], check=True, stdout=subprocess.DEVNULL)


def zeroshot(run_dir: Path, corpus: Path) -> None:
    """Write the run's zero-shot accuracy on the corpus's held-out pictures beside its results, unless it is there."""
    path = run_dir / ZEROSHOT
    if path.exists():
        return
    command = [sys.executable, "-m", "train.evaluate", "--run", run_dir, "--task", "zeroshot", "--json"]
    command += ["--data", corpus / "val", "--classnames", corpus / "classnames.txt"]
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE)
    path.write_bytes(done.stdout)


def metrics(run_dir: Path) -> dict[str, float]:
    """Retrieval over both corpora and zero-shot accuracy of a finished run, in percent."""
    found = json.loads((run_dir / ZEROSHOT).read_text())
    return read_results(run_dir)["val"] | {f"zeroshot_{name}": value for name, value in found.items()}


def row(runs: Path, regime: str, variant: str, seeds: int) -> dict:
    """Mean and standard error over seeds of every metric; no error of a single seed."""
    results = [metrics(runs / run_name(regime, variant, seed)) for seed in range(seeds)]
    summary: dict = {"regime": regime, "variant": variant, "seeds": seeds}
    for name in METRICS:
        values = [result[name] for result in results]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        summary[name] = [statistics.mean(values), error]
    return summary


def table(rows: Sequence[dict]) -> str:
    lines = [f"| regime | variant | {' | '.join(METRICS)} |", "|---|---|" + "---|" * len(METRICS)]
    for one in rows:
        pairs = [one[name] for name in METRICS]
        values = " | ".join(f"{mean:.1f}" + ("" if error is None else f" ± {error:.1f}") for mean, error in pairs)
        lines.append(f"| {one['regime']} | {one['variant']} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
