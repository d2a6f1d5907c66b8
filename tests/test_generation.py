"""Decoding: steps with a cache, cross attention, generate."""

import pytest
import torch
import transformers
from numerics import assert_accurate
from reference import RIGHT, B, S, build, double, ids, keep

import xlmr
from xlmr.cache import KeyValueCache


@pytest.mark.parametrize("watched", ["", ".encoder.layer.1", ".encoder.layer.2.attention.self"])
def test_decoder_steps_with_a_cache(watched: str) -> None:
    """Prompt, then one token, then two: as in one pass, and as transformers with its own cache; left padding too; with
    a hook on a layer, which is then called itself, as well."""
    reference, ours = build("ForCausalLM", is_decoder=True)
    ours.get_submodule(f"roberta{watched}").register_forward_hook(lambda *a: None)
    tokens, mask = ids(None), torch.ones(B, S, dtype=torch.long)
    mask[1, :3] = 0
    tokens[1, :3] = 1
    with torch.no_grad():
        for cache in (None, transformers.DynamicCache()):
            past, theirs, at = cache, None, 0
            for n in (9, 1, 2):
                part, seen = tokens[:, at : at + n], mask[:, : at + n]
                mine = ours(part, seen, past_key_values=past, use_cache=True)
                other = reference(part, seen, past_key_values=theirs, use_cache=True)
                past, theirs, at = mine.past_key_values, other.past_key_values, at + n
                real = seen[:, -n:].bool()
                torch.testing.assert_close(mine.logits[real], other.logits[real], atol=1e-5, rtol=1e-5)
        kept = ours(tokens, mask, logits_to_keep=2, use_cache=False).logits
        assert torch.allclose(kept, ours(tokens, mask, use_cache=False).logits[:, -2:], atol=1e-5)


def test_a_class_says_whether_it_generates() -> None:
    assert xlmr.XLMRobertaForCausalLM.can_generate()
    assert not xlmr.XLMRobertaForMaskedLM.can_generate()


def test_a_cache_is_reordered_as_the_references() -> None:
    ours, theirs, beams = KeyValueCache(), transformers.DynamicCache(), torch.tensor([2, 0, 0, 1])
    for layer in range(2):
        keys, values = torch.randn(2, 3, 4, 5, 8).unbind()
        ours.update(keys, values, layer)
        theirs.update(keys, values, layer)
    ours.reorder_cache(beams)
    theirs.reorder_cache(beams)
    new = torch.randn(4, 4, 1, 8)
    for layer in range(len(ours)):
        for mine, expected in zip(ours.update(new, new, layer), theirs.update(new, new, layer), strict=True):
            assert torch.equal(mine, expected)
    assert ours.get_seq_length() == theirs.get_seq_length() == 6


@pytest.mark.parametrize("watched", ["", ".encoder.layer.1", ".encoder.layer.0.crossattention.self"])
def test_cross_attention(watched: str) -> None:
    reference, ours = build("ForCausalLM", is_decoder=True, add_cross_attention=True)
    ours.get_submodule(f"roberta{watched}").register_forward_hook(lambda *a: None)
    truth = double(reference)
    states, seen = torch.randn(B, 7, 32), torch.ones(B, 7)
    seen[1, 4:] = seen[2, 2] = 0
    for asked in ({}, {"use_cache": True}, {"output_attentions": True}):
        given = {"input_ids": ids(), "attention_mask": RIGHT, "encoder_attention_mask": seen, "use_cache": False}
        with torch.no_grad():
            outs = [
                m(**given | asked, encoder_hidden_states=states.to(next(m.parameters()).dtype))
                for m in (ours, reference, truth)
            ]
        real = keep(RIGHT)
        assert_accurate(*(o.logits[real] for o in outs))
        if "output_attentions" in asked:
            assert len(outs[0].cross_attentions) == 3
            for layer in zip(*(o.cross_attentions for o in outs), strict=True):
                assert_accurate(*(w.transpose(1, 2)[real] for w in layer))
    _, encoder = build("ForCausalLM", is_decoder=True)
    with pytest.raises(ValueError, match="add_cross_attention=True"):
        encoder(ids(), encoder_hidden_states=states)


def test_generate() -> None:
    reference, ours = build("ForCausalLM", is_decoder=True, pad_token_id=1)
    prompt = torch.randint(4, 97, (3, 5))
    expected = prompt  # transformers 5's own generate counts positions from 0 instead of pad + 1: its forward is right
    for _ in range(9):
        expected = torch.cat([expected, reference(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ours.generate(prompt, max_new_tokens=9), expected)
    padded = torch.nn.functional.pad(prompt, (3, 0), value=1)
    assert torch.equal(ours.generate(padded, padded != 1, max_new_tokens=9)[:, 3:], expected)
    assert torch.equal(ours.generate(prompt, max_new_tokens=9, use_cache=False), expected)
    end = int(expected[0, 6])
    stopped = ours.generate(prompt, max_new_tokens=9, eos_token_id=end)
    assert (stopped[0, 7:] == 1).all()
    draw = [
        ours.generate(prompt, do_sample=True, top_p=0.9, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert torch.equal(ours.generate(prompt, max_new_tokens=9, do_sample=True, top_k=1), expected)
    assert torch.equal(ours.generate(prompt, max_length=14), expected)
    with pytest.raises(ValueError, match="45 tokens: this model takes at most 40"):
        ours.generate(prompt, max_new_tokens=40)
    assert torch.equal(ours.generate(prompt, max_new_tokens=9, num_beams=1, streamer=None), expected)
    for given, words in (({"num_beams": 4}, "num_beams is 4: only 1 is offered"), ({"beams": 4}, "argument 'beams'")):
        with pytest.raises(TypeError, match=words):
            ours.generate(prompt, **given)
    with pytest.raises(TypeError, match="input_ids is a list: give a tensor"):
        ours.generate(prompt.tolist())
    _, encoder = build("ForCausalLM")
    with pytest.raises(ValueError, match="is_decoder is False"):
        encoder.generate(prompt)
