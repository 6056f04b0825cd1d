"""Every test runs on one thread, off-line and without the libraries' chatter."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import torch
import transformers

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
datasets.disable_progress_bars()


def pytest_collection_finish() -> None:
    """What is imported by now stays: a collection, which each end of a training forces, need not walk through it."""
    gc.collect()
    gc.freeze()
