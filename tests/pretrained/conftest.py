"""The reference: transformers and torch, which only these tests import, and only when one of them runs."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def hf():
    """The module ``transformers``, silent; ``hf.torch`` is torch."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.torch = torch
    torch.set_num_threads(1)
    return transformers


@pytest.fixture(scope="session")
def random_model(hf):
    """``(name of a class, words of its config) -> model`` with random weights of a size at which nothing vanishes."""

    def make(name, **words):
        torch = hf.torch
        torch.manual_seed(0)
        kind = getattr(hf, name)
        model = kind(kind.config_class(**words)).eval()
        with torch.no_grad():
            for path, p in model.named_parameters():
                fan_in = p[0].numel() if p.ndim > 1 else 1
                scale = 0.2 if p.ndim == 1 else max(fan_in, 4) ** -0.5
                p.copy_(torch.randn_like(p) * scale + float(p.ndim == 1 and path.endswith("weight")))
            for path, b in model.named_buffers():
                if path.endswith("running_mean"):
                    b.copy_(0.3 * torch.randn_like(b))
                elif path.endswith("running_var"):
                    b.copy_(0.5 + torch.rand_like(b))
        return model

    return make


@pytest.fixture(scope="session")
def tokens_BL():
    """i32[2, 23] below 61."""
    return np.random.RandomState(0).randint(0, 61, (2, 23)).astype(np.int32)


@pytest.fixture
def gpt2_folder(random_model, tmp_path):
    """A folder with a random GPT-2 of 61 tokens and 23 positions."""
    folder = tmp_path / "gpt2"
    random_model("GPT2LMHeadModel", **GPT2).save_pretrained(folder)
    return folder


GPT2 = {"vocab_size": 61, "n_positions": 23, "n_embd": 12, "n_layer": 2, "n_head": 3}
