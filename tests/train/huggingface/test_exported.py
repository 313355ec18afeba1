"""An export, loaded by the real transformers library, computes what training computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.train.huggingface.exports import Exported, load, make_export, module_of
from train.checkpoint.tensor_files import TensorSource, header
from train.use.generation import Decoder

TEXT = 'def main(argv):\n    """Returns it."""\n'
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def ids_of(exported: Exported, count: int = 24) -> list[int]:
    return exported.saved.tokenizer.encode(TEXT)[:count]


def padded(exported: Exported) -> tuple[Tensor, Tensor]:
    """Ten tokens after five of padding, beside fifteen: ids and mask. What stands for padding must not matter."""
    ids, pad = ids_of(exported), [7] * 5
    return torch.tensor([pad + ids[:10], ids[:15]]), torch.tensor([[0] * 5 + [1] * 10, [1] * 15])


def test_what_it_is(exported: Exported) -> None:
    model = exported.load()
    plain = exported.saved.job.model.engram is None
    assert model.config.model_type == ("deepseek_v3" if plain else "engram")
    assert type(model).__module__.startswith("transformers.models.deepseek_v3" if plain else "transformers_modules")
    ours = exported.saved.model()
    if not plain:
        assert {name: tuple(each.shape) for name, each in model.named_parameters() if ".experts." not in name} == {
            name: tuple(each.shape) for name, each in ours.named_parameters() if ".experts." not in name
        }
    assert sum(each.numel() for each in model.parameters()) == sum(each.numel() for each in ours.parameters())


@torch.no_grad()
def test_logits_of_a_prompt_of_padded_batches_and_of_packed_documents(exported: Exported) -> None:
    model, ids = exported.load(), ids_of(exported)
    wanted = exported.logits(ids)
    assert wanted.std() > 0.1
    torch.testing.assert_close(model(torch.tensor([ids])).logits[0], wanted, **CLOSE)
    tokens, mask = padded(exported)
    for positions in (None, torch.arange(15).expand(2, 15)):
        left = model(tokens, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(left[0, 5:], wanted[:10], **CLOSE)
        torch.testing.assert_close(left[1], wanted[:15], **CLOSE)
    right = model(tokens.roll(-5, 1), attention_mask=mask.roll(-5, 1)).logits
    torch.testing.assert_close(right[0, :10], wanted[:10], **CLOSE)
    documents = [*range(9), *range(8), *range(7)]
    packed = model(torch.tensor([ids]), position_ids=torch.tensor([documents]), use_cache=False).logits[0]
    torch.testing.assert_close(packed, exported.logits(ids, documents), **CLOSE)
    assert not torch.allclose(packed, wanted, **CLOSE)


@torch.no_grad()
def test_logits_token_by_token_with_a_cache(exported: Exported) -> None:
    model, wanted = exported.load(), exported.logits(ids_of(exported))
    tokens, mask = padded(exported)
    found, cache = [], None
    for start, end in ((0, 7), (7, 8), (8, 11), (11, 12), (12, 15)):
        step = model(tokens[:, start:end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
        cache = step.cache
        found.append(step.logits)
    logits = torch.cat(found, dim=1)
    torch.testing.assert_close(logits[0, 5:], wanted[:10], **CLOSE)
    torch.testing.assert_close(logits[1], wanted[:15], **CLOSE)


@torch.no_grad()
def test_rows_of_a_cache_are_repeated_and_selected_and_it_forgets(exported: Exported) -> None:
    model, wanted = exported.load(), exported.logits(ids_of(exported))
    tokens, mask = padded(exported)
    cache = model(tokens[:, :11], attention_mask=mask[:, :11], use_cache=True).cache
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    tokens, mask = tokens.flip(0), mask.flip(0)
    logits = model(tokens[:, 11:], attention_mask=mask, cache=cache, use_cache=True).logits
    torch.testing.assert_close(logits[0], wanted[11:15], **CLOSE)
    torch.testing.assert_close(logits[1], wanted[6:10], **CLOSE)
    cache.reset()
    again = model(tokens, attention_mask=mask, cache=cache, use_cache=True).logits
    torch.testing.assert_close(again[0], wanted[:15], **CLOSE)


@torch.no_grad()
def greedy(exported: Exported, prompt: list[int], count: int) -> list[int]:
    found: list[int] = []
    with Decoder(exported.saved.model(), exported.saved.tables(), 64) as decoder:
        new = prompt
        for _ in range(count):
            new = [int(decoder.append(new).argmax())]
            found += new
    return found


def test_generation_beams_and_lookahead(exported: Exported) -> None:
    model, (tokens, mask) = exported.load(), padded(exported)
    ids = ids_of(exported)
    asked: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    found = model.generate(tokens, **asked)[:, 15:].tolist()
    assert found == [greedy(exported, ids[:10], 8), greedy(exported, ids[:15], 8)]
    beams = {**asked, "num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 12}
    assert torch.equal(model.generate(tokens, **beams), model.generate(tokens, **beams, use_cache=False))
    if exported.saved.job.model.engram is not None:
        one = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
        looked_up = model.generate(tokens[1:], **one, prompt_lookup_num_tokens=3)
        assert torch.equal(looked_up, model.generate(tokens[1:], **one))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_the_library_saves_is_what_was_exported(exported: Exported, dtype: Any, tmp_path: Path) -> None:
    first = exported if dtype == "fp32" else make_export(exported.run, tmp_path / "narrow", dtype=dtype)
    model = first.load()
    model.save_pretrained(tmp_path / "again")
    before, after = tensors(first.folder), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, each in before.items():
        assert each.dtype == after[name].dtype, name
        assert torch.equal(each, after[name]), name
    tables = {file.relative_to(first.folder): file.read_bytes() for file in first.folder.glob("tables/*")}
    assert {
        file.relative_to(tmp_path / "again"): file.read_bytes() for file in (tmp_path / "again").glob("tables/*")
    } == tables
    wide = {name for name, each in before.items() if each.dtype == torch.float32}
    assert dtype == "fp32" or wide == {f"model.layers.1.mlp.gate.{x}" for x in ("weight", "e_score_correction_bias")}
    tokens = torch.tensor([ids_of(exported)])
    logits = model(tokens).logits
    assert torch.equal(load(tmp_path / "again")(tokens).logits, logits)
    near = {"rtol": 1e-5, "atol": 1e-5 if dtype == "fp32" else 0.05}
    torch.testing.assert_close(logits[0].float(), exported.logits(ids_of(exported)), **near)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["engram_pretrain"]["step"] == exported.saved.step


@torch.no_grad()
def test_where_tables_are(engram_export: Exported) -> None:
    ids = torch.tensor([ids_of(engram_export)])
    found = {place: engram_export.load(table_placement=place) for place in ("mapped", "cpu", "model")}
    logits = [model(ids).logits for model in found.values()]
    assert all(torch.equal(logits[0], each) for each in logits)
    parts = {place: [len(table.parts) for table in model.model.tables] for place, model in found.items()}
    assert parts["mapped"][0] > 2
    assert parts["cpu"] == parts["model"] == [1, 1]
    with pytest.raises(ValueError, match="table_placement is disk: set it to mapped, cpu or model"):
        engram_export.load(table_placement="disk")


def test_a_table_larger_than_memory(engram_export: Exported, tmp_path: Path) -> None:
    """The file is sparse: pages that are not read are on no disk and in no memory."""
    total = next(int(x.split()[1]) * 1024 for x in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in x)
    rows = 2 * total // 16
    source = TensorSource("rows", torch.float32, (rows, 4), list)
    with (tmp_path / "large").open("wb") as file:
        file.write(header([source]))
        start = file.tell()
        file.truncate(start + source.bytes)
        file.seek(start + (rows - 1) * 16)
        file.write(torch.arange(4.0).numpy().tobytes())
    table = module_of(engram_export.load()).Table([tmp_path / "large"], "mapped")
    assert table(torch.tensor([0, rows - 1, 5])).tolist() == [[0] * 4, [0, 1, 2, 3], [0] * 4]


def test_what_it_cannot_do_is_told(engram_export: Exported) -> None:
    from transformers import AutoModelForCausalLM, StaticCache

    model, ids = engram_export.load(), torch.tensor([ids_of(engram_export)])
    with pytest.raises(ValueError, match="give input_ids: n-grams are made of token ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match="the cache is a StaticCache, but this model needs a DynamicCache"):
        model(ids, cache=StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        model(ids, attention_mask=torch.ones(1, 1, 24, 24))
    cache = model(ids, use_cache=True).cache
    with pytest.raises(RuntimeError, match="call activate_past_recording on the cache before"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="hidden_act is gelu, but this model has silu alone"):
        type(model.config)(hidden_act="gelu")
    fresh = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"the model has no tables: load it with from_pretrained, or call open_tables"):
        fresh(ids)


def test_the_tokenizer_is_the_runs(exported: Exported) -> None:
    from transformers import AutoTokenizer

    tokenizer, own = AutoTokenizer.from_pretrained(exported.folder, trust_remote_code=True), exported.saved.tokenizer
    assert tokenizer(TEXT).input_ids == own.encode(TEXT)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (own.eos_id, own.pad_id)
