"""What the tests of the model share."""

import signal
from collections.abc import Iterator

import pytest
import torch

from tests.support.bert import write_bert
from train.run.signals import SIGNALS


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory) -> str:
    """A directory with the configuration of a BERT of two layers, 16 wide, for 50 words and 32 positions."""
    return write_bert(tmp_path_factory.mktemp("bert"), width=16, vocab_size=50, max_position_embeddings=32)


@pytest.fixture(scope="module")
def runs_in_this_process() -> Iterator[None]:
    """Have one thread, as those in other processes; the signal handlers that they replace are put back."""
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for name, handler in handlers.items():
        signal.signal(getattr(signal, name), handler)
