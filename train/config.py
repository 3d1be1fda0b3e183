"""The run's configuration: dataclasses -> YAML -> command line. One docstring per field, with units.

`accelerate_config.yaml` owns processes, precision and ZeRO; this owns the experiment; no knob is in both.
Fields marked `machine` change where and how fast a run goes, never its curve.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.config import DataConfig, machine

Norm = Literal["batch", "sync_batch", "group", "frozen"]
TOWERS = ("image", "text")


@dataclass
class ImageTowerConfig:
    """Any classification backbone of torchvision or timm; its classifier is replaced by the projection."""

    name: str = "resnet50"
    """torchvision's name of a model; timm/<name> for one of timm's; or the dotted path of a class of your own, such as
    my_package.MyTower, which makes features [B, D] of images (train/model/backbone_own.py says more)."""
    weights: str = "scratch"
    """scratch; a name of torchvision's weights such as DEFAULT or IMAGENET1K_V2; a tag of timm's such as DEFAULT or
    a1_in1k; or a local .safetensors or .pth file."""
    dropout: float | None = None
    """Share of values that the model's own dropout sets to zero; null: as the model has it (timm's have none)."""
    drop_path: float | None = None
    """Probability that training skips the top block, less for those below it; null: as the model has it (timm: 0)."""
    norm: Norm = "batch"
    """Statistics. batch: of the micro-batch; sync_batch: of the global batch, for which `train.resident` has to hold
    a process's whole share of a step; group: GroupNorm (no statistics of neighbours); frozen: those it started with."""
    locked_until: int = 0
    """Step at which the tower starts to learn; 0: from the start; -1: never."""
    locked_stages: int = 0
    """The stem and this many stages from the bottom never learn (of a tower that is not made of stages: blocks). Their
    BatchNorm still normalizes by the micro-batch."""
    projection: Literal["linear", "mlp", "none"] = "linear"
    """linear: a learned map into the shared space; mlp: two with a GELU between them, over 2 x model.embed_dim values;
    none: the tower's own features are the embedding, so that the other tower learns to meet them where they are. Their
    length must then be model.embed_dim."""
    lr: float | None = None
    """Peak learning rate of this tower; null: optim.lr."""
    layer_decay: float = 1.0
    """Factor on the learning rate per layer below the top; 1 is off."""
    checkpointing: bool = machine(False)
    """Recompute activations in the backward pass instead of keeping them: less memory, more time, same gradients."""


@dataclass
class TextTowerConfig:
    """Any BERT-family encoder, the text half of CLIP or SigLIP, or the encoder of a T5 or mT5."""

    name: str = "bert-base-uncased"
    """Hub name, or a directory with config.json and weights; of a pair such as CLIP's its text half is taken."""
    weights: Literal["pretrained", "scratch"] = "pretrained"
    """pretrained: the weights at `name`; scratch: its architecture with fresh weights."""
    tokenizer: str = ""
    """Hub name or directory of the tokenizer; empty: the same as `name`."""
    pooling: Literal["cls", "mean", "last", "pooler"] = "cls"
    """cls: the first token's vector; mean: the mean over the caption's tokens; last: the last one's (CLIP's end of the
    text, SigLIP's last place); pooler: the first token's through the encoder's own pooling layer."""
    positions: int = 0
    """Longest caption, in tokens, that the encoder has positions for; 0: as many as it comes with. Another number is
    interpolated from those linearly."""
    pieces: int = 1
    """Captions of a micro-batch go through this tower in so many passes, sorted by length, with less padding. 4 halve
    the work on micro-batches of 64 and more. Another number is another dropout."""
    locked_until: int = 0
    """Step at which the tower starts to learn; 0: from the start; -1: never."""
    locked_layers: int = 0
    """The embeddings and this many layers from the bottom never learn."""
    projection: Literal["linear", "mlp", "none"] = "linear"
    """linear: a learned map into the shared space; mlp: two with a GELU between them, over 2 x model.embed_dim values;
    none: the tower's own features are the embedding, so that the other tower learns to meet them where they are. Their
    length must then be model.embed_dim."""
    lr: float | None = None
    """Peak learning rate of this tower; null: optim.lr."""
    layer_decay: float = 1.0
    """Factor on the learning rate per layer below the top; 1 is off."""
    checkpointing: bool = machine(False)
    """Recompute activations in the backward pass instead of keeping them: less memory, more time, same gradients."""


@dataclass
class MultiscaleConfig:
    """Alignment at several depths of the towers (train/terms/levels.py)."""

    enabled: bool = False
    """Pool, project and align several stages of each tower, level by level, beside the embedding."""
    image_stages: list[str] = field(default_factory=list)
    """Modules of the image tower, one per level, bottom to top, such as layer3; empty: its last three stages."""
    text_layers: list[int] = field(default_factory=list)
    """Layers of the text tower, from 1, one per level; empty: evenly spaced, up to the last."""
    heads: int = 8
    """Heads of the attention pooling; divides embed_dim."""
    weight: float = 1.0
    """Weight of all levels together beside the loss of the embedding."""
    evenness: float = 1.0
    """How strongly the learned weights of the levels are held near equal: losses that differ by this halve a weight."""
    cross_level: bool = False
    """Let the levels of a sample attend to each other before they are aligned."""
    fuse: bool = False
    """false: the embedding is the top vector, and evaluation leaves the levels out; true: it is fused with them."""


@dataclass
class SelfSupervisionConfig:
    """Terms inside one modality, added to the contrastive loss (train/terms/views.py, words.py)."""

    image: float = 0.0
    """Weight of the contrastive term between two views of every image; 0 is off. Costs a second pass of the tower."""
    temperature: float = 0.1
    """Of that term, fixed."""
    hidden: int = 2048
    """Width of the hidden layer of its projection head."""
    dim: int = 256
    """Length of the vectors that it compares."""
    text: float = 0.0
    """Weight of the masked-language loss on the captions; 0 is off. Costs a second pass of the text tower."""
    mask: float = 0.15
    """Share of the words that it hides."""


@dataclass
class ModelConfig:
    """Two towers and their projections into one space."""

    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    multiscale: MultiscaleConfig = field(default_factory=MultiscaleConfig)
    self_supervision: SelfSupervisionConfig = field(default_factory=SelfSupervisionConfig)
    embed_dim: int = 768
    """Length of the shared embedding."""
    projection_bias: bool = False
    """Bias of the projections' last map; true is the original recipe."""
    temperature: float = 0.07
    """Initial temperature; the parameter is log(1 / temperature). The sigmoid loss starts at 0.1 and bias -10."""
    max_logit_scale: float = 100.0
    """Largest factor that logits are multiplied by: the parameter is clamped to [0, log(max_logit_scale)]."""


@dataclass
class LossConfig:
    """The contrastive loss over the global batch."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: symmetric cross-entropy (CLIP, arXiv 2103.00020); sigmoid: pairwise (SigLIP, arXiv 2303.15343)."""
    rows: Literal["full", "local", "tiled"] = machine("tiled")
    """full: all logits on every rank; local: the rank's rows; tiled: the rank's rows, a tile at a time. Same loss."""
    tile: int | None = machine(None)
    """Rows and columns of a tile. null: 1024 on a CPU, whose cache is small, else 4096, about 0.4 GB in all."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all pairs."""
    mask_duplicates: bool = False
    """Leave pairs with the same caption, or the same image, as another pair of the batch out of its negatives."""


@dataclass
class OptimConfig:
    """AdamW; no decay on norms, biases and the temperature."""

    lr: float = 5e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """AdamW: decay of the mean of gradients."""
    beta2: float = 0.98
    """AdamW: decay of the mean of squared gradients."""
    eps: float = 1e-6
    """AdamW: added to the denominator."""
    weight_decay: float = 0.2
    """AdamW: decoupled weight decay."""
    warmup_steps: int = 500
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    cooldown_steps: int = 0
    """The last steps of a constant rate, over which it falls to min_lr (1 - sqrt, arXiv 2405.18392); 0 is none."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine or the cooldown, as a share of the peak."""
    clip_grad: float = 1.0
    """Largest global norm of the gradient; 0 is off."""
    ema: float = 0.0
    """Decay per step of the moving average of the weights that is evaluated and exported; 0 is off."""


@dataclass
class BalanceConfig:
    """Modality balance: each tower's learning rate adapts to its gradients (train/engine/balance.py)."""

    kind: Literal["off", "gradient", "update", "progress"] = "off"
    """What is balanced between the towers, projections included. gradient: its norm over that of the weights; update:
    the norm of the update over that of the weights; progress: norm of the gradient times norm of the update."""
    every: int = 10
    """Steps between measurements."""
    smoothing: float = 0.8
    """Decay per measurement of the moving average of the logarithm of the towers' ratio; 0: none."""
    strength: float = 0.5
    """How much of a difference the learning rates make up for: 1 all of it; below 0 they enlarge it."""
    max: float = 4.0
    """Multipliers of a tower's learning rate stay within [1/max, max]."""
    reference: Literal["equal", "start"] = "equal"
    """What the towers are brought to. equal: the same value; start: the ratio they had after optim.warmup_steps."""


@dataclass
class TrainConfig:
    """How long, in batches of what size."""

    global_batch: int = 1024
    """Pairs per optimizer step over all processes."""
    micro_batch: int = 128
    """Pairs that go through the towers together: the unit of BatchNorm, padding and dropout; divides global_batch."""
    resident: int | None = machine(1)
    """Micro-batches whose activations a process keeps at once. When its share of a step fits, the step is one forward
    pass; else features are cached and recomputed `resident` micro-batches at a time. Same gradients either way.
    null: as many as fit into a GPU's memory, or the host's, by the memory plan that the doctor shows."""
    compile: bool = machine(False)
    """torch.compile for both towers: one program for images, one for each length of captions in steps of 8 tokens. For
    long runs, since each takes up to minutes. Rounding differs from that of towers that are not compiled."""
    epochs: float = 1.0
    """Passes over the training data; used where `steps` is 0."""
    steps: int = 0
    """Optimizer steps; 0: from `epochs`."""
    seed: int = 0
    """Seed of weights, order, augmentation and dropout."""
    max_skipped: int = machine(10)
    """Steps in a row with a gradient that is not finite (all ranks skip them) after which the run stops."""
    patience: int = machine(0)
    """Evaluations in a row in which checkpoint.best gets no better, after which the run ends; 0: it never does."""


@dataclass
class EvalTask:
    """One evaluation: a held-out set and what is measured on it. Its metrics are named `<name>/...`."""

    name: str = ""
    """What its metrics are called; different for each."""
    task: str = ""
    """retrieval, zeroshot, knn or probe (train/evaluation); empty: as dataset_type.txt beside the data says, else
    retrieval."""
    data: str = ""
    """Held-out data: a manifest.json (or its directory); empty: data.val."""
    every: int = 0
    """Steps between evaluations; 0: eval.every."""
    classnames: str = ""
    """zeroshot: a file with the names of the classes, in the order of their numbers; empty: classnames.txt beside the
    data (in the folder of the manifest or the one above it)."""
    templates: str = ""
    """zeroshot: imagenet (CLIP's 80 sentences), or a file of sentences in which {} or {c} is the class name; empty:
    zeroshot_classification_templates.txt beside the data, or four sentences."""
    fit: str = ""
    """probe: manifest of the data to fit to; empty: four fifths of `data`, by a hash of the key. knn: of the data that
    neighbours are from; empty: the other images of `data`."""
    neighbours: int = 200
    """knn: how many neighbours vote."""


@dataclass
class EvalConfig:
    """Evaluation on held-out data, in training and at its end."""

    every: int = machine(0)
    """Steps between evaluations; 0: only at the end."""
    tasks: list[EvalTask] = field(default_factory=list, metadata={"machine": True})
    """Evaluations beside retrieval on data.val, such as [{name: groups, task: zeroshot, classnames: groups.txt}]."""
    batch: int = machine(256)
    """Pairs per forward pass of an evaluation."""
    chunk: int = machine(1024)
    """Rows of the similarity matrix that exist at once."""
    cache_gb: float = machine(1.0)
    """Decoded held-out images that a process keeps for its next evaluation, in GB (1e9 bytes), over all sets; a set
    whose share does not fit is decoded again each time. 0: none is kept."""


@dataclass
class CheckpointConfig:
    """Atomic, verified checkpoints in the run directory, written while training goes on."""

    every: int = machine(500)
    """Steps between checkpoints; one is always written at the end."""
    keep: int = machine(3)
    """Newest checkpoints that stay; 0 keeps all."""
    best: str = machine("")
    """Metric of an evaluation, such as val/t2i_R@1: the best checkpoint by it is kept beside the newest."""


@dataclass
class TrackingConfig:
    """Weights & Biases, metrics.jsonl, the progress bar."""

    wandb: Literal["auto", "online", "offline", "disabled"] = machine("auto")
    """auto: online where an API key is configured, else offline."""
    project: str = machine("duet")
    """W&B project; WANDB_PROJECT wins over the default, as WANDB_NAME, WANDB_RUN_ID and WANDB_DIR do."""
    entity: str = machine("")
    """W&B team or user; empty: the default one of the key."""
    log_every: int = machine(10)
    """Steps between lines on the screen and points sent to W&B; metrics.jsonl has every step. As often, a step's time
    is taken apart (time/wait, copy, forward, gather, loss, backward, exchange, optimizer, other: seconds of the step
    before), with peak_memory_gb and mfu."""
    peak_tflops: float = machine(0.0)
    """What a device does at most, in 1e12 floating-point operations a second: of it mfu is the share that training
    uses. 0: as the maker of the GPU says, by its name; where that is not known, as on a CPU, no mfu."""
    profile: str = machine("")
    """Steps to profile, first and last, such as 20:22 (from 1); empty: none. --profile is short for it. A trace and the
    ten dearest operations, by the place that calls them, are written into the run's directory under profile/."""
    profile_ranks: Literal["first", "all"] = machine("first")
    """Which processes are profiled."""
    diagnostics_every: int = machine(100)
    """Steps between measurements of each tower's gradient, update and embeddings; 0: none."""


@dataclass
class ParentConfig:
    """The run that this one starts from (train/parent.py): `--from RUN` or `--from-weights RUN`."""

    run: str = ""
    """Run directory, or one of its checkpoints, to start from; empty: none. --from RUN is short for it and takes every
    field that the command line and --config leave out from that run; --from-weights RUN also sets parent.take."""
    step: str = ""
    """Which of its checkpoints, as a number of steps, or best; empty: the newest. --step is short for it."""
    take: Literal["all", "weights"] = "all"
    """all: weights, optimizer state, moving average, step, and position in the data; weights: the weights alone (their
    moving average, where there is one), at step 0."""


@dataclass
class RunConfig:
    """Everything a run is a function of."""

    name: str = "run"
    """Name of the run: its directory is <runs_dir>/<name>."""
    runs_dir: str = machine("runs")
    """Directory that holds run directories."""
    init: str = ""
    """A trained pair to start from, towers, projections and temperature: open_clip:MODEL or hf:MODEL (a directory or a
    name on the hub), or duet:RUN (a run, a checkpoint, or an export); empty: what both towers say themselves."""
    parent: ParentConfig = field(default_factory=ParentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
