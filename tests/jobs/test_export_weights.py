"""`blt export`: what transformers loads offline gives our logits and text, and the card says what is known."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from blt.checkpoint import LanguageModel, language_model_fingerprint, load, save_language_model
from blt.entropy_model import document_entropies
from blt.generation import generate
from blt.patching import PatchRule, patch_lengths
from blt.vocabulary import BOS, encode
from jobs.command_line import main
from jobs.record import JobResult, write_record
from pipelines.evaluate.evaluation import Evaluation, write_evaluation
from pipelines.train.told_sources import ToldSource, write_sources
from tests.small_language_model import small_language_model

TEXT = "We hold these truths to be self-evident, é 1776.\n漢字 🙂"
IDS = torch.cat((torch.tensor([BOS]), encode(TEXT.encode())))[None]


def rule_in_a_gap(lm: LanguageModel) -> PatchRule:
    """A plain threshold in the middle of the widest gap of the text's entropies: no rounding decides a patch."""
    assert lm.entropy_model is not None
    (entropies,) = document_entropies(lm.entropy_model, [TEXT.encode()])
    ordered = entropies.sort().values
    widest = 10 + int((ordered[11:-10] - ordered[10:-11]).argmax())
    return PatchRule(threshold=float(ordered[widest : widest + 2].mean()), max_patch_length=512)


def saved(directory: Path, **changes: Any) -> LanguageModel:
    lm = small_language_model()
    lm = replace(lm, provenance={"data": "ab12", "step": "7"}, **({"patch_rule": rule_in_a_gap(lm)} | changes))
    save_language_model(lm, directory)
    return lm


def export(model: Path, output: Path, *more: str) -> int:
    return main(["export", "--model", str(model), "--to", "transformers", str(output), *more])


def loaded(directory: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def test_transformers_gives_our_logits_patches_and_text(tmp_path: Path) -> None:
    lm = saved(tmp_path / "model")
    assert export(tmp_path / "model", tmp_path / "theirs") == 0
    theirs, tokenizer = loaded(tmp_path / "theirs")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert torch.equal(ids, IDS)
    assert lm.entropy_model is not None
    entropies = document_entropies(lm.entropy_model, [TEXT.encode()])[0][None]
    lengths = patch_lengths(IDS, entropies, lm.patch_rule, include_next=True)
    with torch.no_grad():
        ours = lm.model(IDS, lengths)
        assert torch.allclose(ours, theirs(ids, patch_lengths=lengths).logits, rtol=0, atol=3e-5)
        assert torch.allclose(ours, theirs(ids).logits, rtol=0, atol=3e-5)
        assert theirs.generation_config.use_cache is False
        continued = theirs.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    wanted = generate(lm, TEXT.encode(), max_new_bytes=6)
    assert isinstance(wanted, bytes)
    kept = [int(i) - 4 for i in continued if i >= 4]
    assert bytes(kept)[: len(wanted)] == wanted


def test_the_tokenizer_gives_any_text_back(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    assert export(tmp_path / "model", tmp_path / "theirs") == 0
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    planes = [chr(c) for c in range(0x800)] + [chr(c) for c in range(0x800, 0x110000, 97) if not 0xD800 <= c < 0xE000]
    specials = "<boe><s></s><bpe> </s>\n<s>  ##  .  ' s \r\n\x00\ufeff"
    for text in ("", "a", " a ", specials, "".join(planes), "".join(planes[::-1]) + specials):
        ids = tokenizer(text).input_ids
        assert ids == [BOS, *(byte + 4 for byte in text.encode())]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (1, 2, 0, 260)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_to_transformers_to_ours_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    first, third = tmp_path / "first", tmp_path / "third"
    lm = saved(first)
    if dtype == torch.bfloat16:
        assert lm.entropy_model is not None
        lm.model.to(dtype)
        lm.entropy_model.to(dtype)
        save_language_model(replace(lm, entropy_fingerprint=None), first)
    assert export(first, tmp_path / "second") == 0
    name = str(dtype).removeprefix("torch.")
    assert main(["import", "--from", "transformers", "--dtype", name, str(tmp_path / "second"), str(third)]) == 0
    for file in ("model.safetensors", "entropy_model/model.safetensors"):
        assert (first / file).read_bytes() == (third / file).read_bytes()
    before, after = (json.loads((directory / "config.json").read_text()) for directory in (first, third))
    assert after.pop("provenance") == before.pop("provenance") | {"imported_from": "transformers", "source": "second"}
    assert before == after


def test_other_patching_needs_leave_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "model", patch_rule=PatchRule(threshold=3.0, monotonic=True, max_patch_length=6))
    assert export(tmp_path / "model", tmp_path / "theirs") == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert "patch_rule must be kind byte, or entropy with a threshold alone (--lossy-patching exports all" in error
    assert not (tmp_path / "theirs").exists()
    assert export(tmp_path / "model", tmp_path / "theirs", "--lossy-patching") == 0
    card = (tmp_path / "theirs/README.md").read_text()
    assert "**Lossy**: transformers' patcher does not follow this rule (patch_rule must be kind byte" in card
    assert "more than 6 bytes are cut in training" in card
    assert load(tmp_path / "model").patch_rule.monotonic


def evaluation(model: str) -> Evaluation:
    return Evaluation(
        documents=3,
        bytes=12345,
        patches=2000,
        mean_patch_bytes=6.1,
        nats=1.0,
        bpb=2.3456,
        bpb_low=2.2,
        bpb_high=2.5,
        seconds=1.0,
        bytes_per_second=1.0,
        baselines={"xz -9": 2.75},
        entropy_model_bpb=None,
        per_source=(),
        split="valid",
        sequence_patches=8,
        sequence_bytes=64,
        model=model,
        data="ab12",
    )


def test_the_card_is_filled_from_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "run/model"
    saved(model)
    figures: dict[str, float | str] = {"model": str(model), "steps": 7}
    config = {"steps": 7, "output": "/secret/path", "optimizer": {"lr": 0.01}}
    write_record(tmp_path / "run", config, "", JobResult(bytes=54321, bpb=2.5, figures=figures))
    write_evaluation(str(tmp_path / "eval"), evaluation(language_model_fingerprint(model)))
    more = ("--license", "apache-2.0", f"evaluation={tmp_path / 'eval'}")
    assert export(model, tmp_path / "theirs", *more) == 0
    _, front, card = (tmp_path / "theirs/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["blt", "byte-level"],
    }
    for told in ("`ab12`", "54,321", "2.3456 bits per byte", "12,345 bytes", "| xz -9 | 2.7500 |", "lr: 0.01"):
        assert told in card
    assert "/secret/path" not in card
    assert "Lossy" not in card
    assert "(2.2000 to 2.5000, 95 % interval by documents)" in card
    single = replace(evaluation(language_model_fingerprint(model)), documents=1, bpb_low=2.3456, bpb_high=2.3456)
    write_evaluation(str(tmp_path / "eval"), single)
    assert export(model, tmp_path / "single", "--evaluation", str(tmp_path / "eval")) == 0
    assert "2.3456 bits per byte (one document: no interval)" in (tmp_path / "single/README.md").read_text()
    write_evaluation(str(tmp_path / "eval"), evaluation("0" * 64))
    assert export(model, tmp_path / "again", *more) == 2
    assert "fingerprint 000000000000" in capsys.readouterr().err


def card_of(model: Path, output: Path, **provenance: str) -> str:
    lm = small_language_model()
    save_language_model(replace(lm, provenance=provenance), model)
    assert export(model, output) == 0
    return (output / "README.md").read_text()


def test_a_card_without_a_run_says_so(tmp_path: Path) -> None:
    card = card_of(tmp_path / "model", tmp_path / "theirs")
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "unknown"
    for told in (
        "What it was trained on is not recorded.",
        "How it was trained is not recorded.",
        "None was given when it was exported.",
        "None was named for these weights",
        "the settings of the run that made it are not at hand",
    ):
        assert told in card


def test_a_card_of_imported_weights_says_what_is_not_known(tmp_path: Path) -> None:
    card = card_of(tmp_path / "model", tmp_path / "theirs", imported_from="reference", source="blt-1b")
    told = (
        "These weights were imported (format: reference, directory: `blt-1b`). How they were trained is not recorded."
    )
    assert told in card
    assert "What it was trained on is not recorded." in card


def test_a_card_tells_what_the_model_carries_of_its_run(tmp_path: Path) -> None:
    """The run and its data may be gone."""
    sources = [
        ToldSource(name="books|old", documents=1200, bytes=3_000_000, license="public domain"),
        ToldSource(name="web", documents=34, bytes=5_000, license=None),
    ]
    told = {"run": "cd34", "step": "1500", "data": "ab12", "bytes": "123456789", "valid_bpb": "1.2345"}
    started = {"init_latent_from": "Llama-3-8B (ef56)", "sources": write_sources(sources)}
    card = card_of(tmp_path / "model", tmp_path / "theirs", **told, **started)
    fingerprint = small_language_model().entropy_fingerprint
    for row in (
        "- Rule: kind entropy, threshold 3.0, max patch length 6.",
        f"- Entropy model: fingerprint `{fingerprint}`.",
        "The training split of the data with manifest `ab12`:",
        "| books\\|old | 1,200 | 3,000,000 | public domain |",
        "| web | 34 | 5,000 | not recorded |",
        "| all | 1,234 | 3,005,000 | |",
        "| updates | 1,500 |",
        "| bytes trained on, repeats counted | 123,456,789 |",
        "| bits per byte of the held-out split, in training's sequences | 1.2345 |",
        "| run | `cd34` |",
        "| latent transformer started from | `Llama-3-8B (ef56)` |",
        "threshold: 3.0",
    ):
        assert row in card


def test_a_card_of_a_run_whose_figures_were_not_recorded(tmp_path: Path) -> None:
    card = card_of(tmp_path / "model", tmp_path / "theirs", step="7", data="ab12")
    assert "Data with manifest `ab12`; its sources, their size and licences are not recorded." in card
    assert "| bytes trained on, repeats counted | not recorded |" in card
