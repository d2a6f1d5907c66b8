"""Seconds from `import` to the first answer, in a process of its own: `python -m bench.cold DIR PROVIDER DEVICE`.

DIR holds a checkpoint, PROVIDER is "transformers sdpa", "xlmr triton" and so on. The interpreter's own start does not
count; the files may be in the system's cache, and kernels compiled before.
"""

import sys
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
    print(main(*sys.argv[1:]))
