"""What every test starts from: no network, fixed seeds, a deterministic hypothesis."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers and huggingface_hub are imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else the reference's tokenizer warns in forked children

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("xlmr", derandomize=True, deadline=None, database=None)
settings.load_profile("xlmr")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
