"""Seconds from `import` to the first answer, in a process of its own, for bench.bench_model.

The interpreter's own start does not count; the files may be in the system's cache, and kernels compiled before.
"""

import argparse
import time


def main(directory: str, provider: str, device: str) -> float:
    """Imports only what the provider needs, so that no other library's import counts."""
    start = time.perf_counter()
    library, way = provider.split()
    import torch

    if library == "transformers":
        from transformers import XLMRobertaModel as Theirs

        model = Theirs.from_pretrained(directory, attn_implementation=way, add_pooling_layer=False).to(device)
    else:
        from xlmr import XLMRobertaModel as Ours

        model = Ours.from_pretrained(directory, backend=way, device=device, add_pooling_layer=False)
    ids = torch.tensor([[0, 5, 6, 7, 8, 9, 10, 2]], device=device)
    with torch.inference_mode():
        model.eval()(ids, attention_mask=torch.ones_like(ids)).last_hidden_state.sum().item()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.cold", description=__doc__)
    parser.add_argument("directory", help="of a checkpoint")
    parser.add_argument("provider", help="'transformers sdpa', 'xlmr triton' and so on")
    parser.add_argument("device")
    print(main(**vars(parser.parse_args())))
