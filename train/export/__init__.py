"""A trained model in the form that other libraries read: `python -m train.export --run RUN --to TARGET OUT`."""

TARGETS = {
    "torch": "train.export.torch.TorchTarget",
    "onnx": "train.export.onnx.OnnxTarget",
    "open_clip": "train.export.open_clip.OpenClipTarget",
    "hf": "train.export.hf.HfTarget",
}
"""Name -> dotted path of its class, a subclass of train.export.target.Target."""
