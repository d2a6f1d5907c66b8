"""Decoding: steps with a cache, cross attention, generate."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from numerics import assert_accurate
from packaging.version import Version
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
    refused = {"num_beam_groups": (2, "num_beam_groups is 2: only 1 is offered"), "beams": (4, "argument 'beams'")}
    for name, (value, words) in refused.items():
        with pytest.raises(TypeError, match=words):
            ours.generate(prompt, **{name: value})
    with pytest.raises(TypeError, match="input_ids is a list: give a tensor"):
        ours.generate(prompt.tolist())
    _, encoder = build("ForCausalLM")
    with pytest.raises(ValueError, match="is_decoder is False"):
        encoder.generate(prompt)


def searching(**settings: Any) -> tuple[Any, Any]:
    """transformers' decoder and ours; its searches, like ours, by its forward, which counts positions from pad + 1."""
    reference, ours = build("ForCausalLM", is_decoder=True, pad_token_id=1, vocab_size=31, **settings)
    reference.prepare_inputs_for_generation = lambda input_ids, attention_mask=None, **_: {
        "input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False
    }  # fmt: skip
    return reference, ours


PROMPTS, SEEN = (
    torch.tensor([[5, 9, 6, 5, 9], [1, 1, 8, 7, 8], [4, 20, 21, 20, 22]]),
    torch.ones(3, 5, dtype=torch.long),
)
SEEN[1, :2] = 0
SEVERAL = [2, *range(5, 14)]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 4, "eos_token_id": SEVERAL},
        {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": SEVERAL, "length_penalty": 2.0},
        {"num_beams": 3, "eos_token_id": SEVERAL, "early_stopping": True, "length_penalty": -1.0},
        {"num_beams": 2, "eos_token_id": SEVERAL, "early_stopping": "never"},
        {"num_beams": 2, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
        {"eos_token_id": SEVERAL, "repetition_penalty": 0.7, "min_length": 8},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3, "eos_token_id": 8, "max_new_tokens": 1},
    ],
)
def test_searches_as_transformers(settings: dict[str, Any]) -> None:
    reference, ours = searching()
    counts_padding = Version(transformers.__version__) < Version("5.23")  # as repeated words; 5.17 does
    seen = torch.ones_like(SEEN) if counts_padding and "repetition_penalty" in settings else SEEN
    asked = {"max_new_tokens": 9, **settings, "attention_mask": seen}
    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = reference.generate(PROMPTS, pad_token_id=1, use_cache=False, **asked, **kept)
    for use_cache in (True, False):
        found = ours.generate(PROMPTS, use_cache=use_cache, **asked, **kept)
        assert torch.equal(found.sequences, expected.sequences)
        if "num_beams" in settings:
            torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)
        for name in ("scores", "logits"):
            for mine, theirs in zip(found[name], expected[name], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.generate(PROMPTS.int(), **asked), expected.sequences)


def test_words_are_drawn_among_those_that_transformers_leaves() -> None:
    reference, ours = searching()
    asked = {"max_new_tokens": 1, "do_sample": True, "return_dict_in_generate": True, "output_scores": True}
    for settings in ({"temperature": 0.7, "top_k": 9, "top_p": 0.8}, {"top_k": 0, "min_p": 0.2}, {"top_p": 0.5}):
        expected = reference.generate(
            PROMPTS, attention_mask=SEEN, pad_token_id=1, use_cache=False, **asked, **settings
        )
        found = ours.generate(PROMPTS, SEEN, num_return_sequences=2, **asked, **settings)
        torch.testing.assert_close(found.scores[0][::2], expected.scores[0], rtol=1e-4, atol=1e-4)
        assert found.sequences.shape == (6, 6)
        assert found.scores[0].gather(1, found.sequences[:, -1:]).isfinite().all()


class Streamer:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.told.append(value.tolist())

    def end(self) -> None:
        self.told.append("end")


def test_the_callers_own_rules() -> None:
    """As transformers calls them; a list is what it takes there."""
    reference, ours = searching()
    rules = {
        "logits_processor": [lambda ids, scores: scores.index_fill(-1, ids[0, -1:], -torch.inf)],
        "stopping_criteria": [lambda ids, scores: ids[:, -1] % 5 == 0],
        "max_new_tokens": 9,
    }
    streamers = Streamer(), Streamer()
    found = ours.generate(PROMPTS[:1], streamer=streamers[0], **rules)
    expected = reference.generate(PROMPTS[:1], streamer=streamers[1], pad_token_id=1, use_cache=False, **rules)
    assert torch.equal(found, expected)
    assert streamers[0].told == streamers[1].told
    beams = ours.generate(PROMPTS, SEEN, num_beams=2, **rules)
    expected = reference.generate(PROMPTS, attention_mask=SEEN, num_beams=2, pad_token_id=1, use_cache=False, **rules)
    assert torch.equal(beams, expected)
    with pytest.raises(ValueError, match="beams change them later"):
        ours.generate(PROMPTS, num_beams=2, streamer=Streamer())


@pytest.mark.parametrize(
    "settings", [{"num_return_sequences": 2}, {"num_beams": 0}, {"num_beams": 2, "do_sample": True}, {"top_p": 0.0}]
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{list(settings)[-1]}.*: allowed are temperature"):
        searching()[1].generate(PROMPTS, **settings)


def test_a_checkpoint_tells_how_to_generate(tmp_path: Path) -> None:
    """generation_config.json, which both libraries write and read; what a caller gives goes before it."""
    reference, ours = searching()
    reference.generation_config.update(num_beams=3, max_new_tokens=4, no_repeat_ngram_size=2)
    reference.save_pretrained(tmp_path / "theirs")
    loaded = xlmr.XLMRobertaForCausalLM.from_pretrained(tmp_path / "theirs")
    found = loaded.generate(PROMPTS, SEEN)
    assert torch.equal(found, ours.generate(PROMPTS, SEEN, generation_config=reference.generation_config))
    assert torch.equal(found, ours.generate(PROMPTS, SEEN, num_beams=3, max_new_tokens=4, no_repeat_ngram_size=2))
    assert loaded.generate(PROMPTS, SEEN, max_new_tokens=7, generation_config={"max_new_tokens": 6}).shape == (3, 12)
    loaded.save_pretrained(tmp_path / "ours")
    again = transformers.XLMRobertaForCausalLM.from_pretrained(tmp_path / "ours").generation_config
    assert again.to_diff_dict() == reference.generation_config.to_diff_dict()
