"""Runs that begin with a folder of Hugging Face's: an export, a DeepSeek-V3, or DeepSeek-V4.1's tables."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ModelConfig
from tests.command_line import JOB, engram, losses, train, write_job
from tests.train.huggingface.exports import KINDS, Exported
from train.checkpoint.checked import Damaged
from train.checkpoint.huggingface_image import HuggingFaceImage
from train.checkpoint.identity import Identity
from train.tables import addresses_of, compressed_vocabulary
from train.use.saved_run import RunTokens, SavedRun

STILL = {"learning_rate": 1e-30}


def begin(folder: Path, corpus: Path, source: Path, *arguments: str, **sections: Any) -> Path:
    """A run of one step that begins with `source`."""
    wide = {"window_rows": 4000}
    folder.mkdir(exist_ok=True)
    job = write_job(folder, corpus, checkpoint={"init_from": str(source)}, offload=wide, **sections)
    train(job, "train.steps=1", "eval.every=1", *arguments)
    return folder / "runs" / "small"


def weights(run: Path) -> dict[str, Tensor]:
    return dict(SavedRun.open(run).weights())


def rows(run: Path) -> Tensor:
    tables = SavedRun.open(run).tables()
    assert tables is not None
    return torch.cat([tables.rows(module, torch.arange(count)) for module, count in enumerate(tables.num_rows)])


def test_weights_and_rows_of_an_export_are_taken_over_by_any_ranks(
    engram_export: Exported, corpus: Path, tmp_path: Path
) -> None:
    """With next to no learning rate, nothing moves that was taken over."""
    run = begin(
        tmp_path, corpus, engram_export.folder, "deepspeed.zero_optimization.stage=3", "--nproc", "2", optimizer=STILL
    )
    before, after = weights(engram_export.run), weights(run)
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) != name.endswith("e_score_correction_bias"), name
    assert torch.equal(rows(run), rows(engram_export.run))
    # The same batch as the run's own checkpoint gives: optimizers begin anew, the function does not.
    manifest = SavedRun.open(run).image.manifest
    assert manifest.steps_applied == 1
    assert manifest.tables is not None
    assert manifest.tables["learning_rates"][0] == 0
    assert losses(run)[0][1] == pytest.approx(losses(engram_export.run)[-1][1], rel=1e-6)


def test_memory_and_branches_that_are_added_change_nothing_at_first(
    plain_export: Exported, corpus: Path, tmp_path: Path
) -> None:
    plain = KINDS["plain"]
    added = plain | {"engram": JOB["model"]["engram"], "hyper_connections": {"expansion": 2}}
    run = begin(tmp_path / "still", corpus, plain_export.folder, "--nproc", "1", model=added, optimizer=STILL)
    assert losses(run)[0][1] == pytest.approx(losses(plain_export.run)[-1][1], rel=2e-5)
    learned = begin(
        tmp_path / "learns", corpus, plain_export.folder, "train.steps=3", "--nproc", "2", model=added,
        optimizer={"learning_rate": 0.01},
    )  # fmt: skip
    for before, after in zip(weights(run).items(), weights(learned).items(), strict=True):
        if ".engram.value_proj" in before[0]:
            assert before[1].abs().max() < 1e-20
            assert after[1].abs().max() > 1e-3
    assert not torch.equal(rows(run), rows(learned))


def deepseek_v41(folder: Path, addresses: dict[str, Any], dim: int) -> Tensor:
    """Writes the tables as the released model has them; returns the values of all rows."""
    generator, values = torch.Generator().manual_seed(0), []
    folder.mkdir()
    counts = [sum(primes) for primes in addresses["primes"]]
    for number, (layer, count) in enumerate(zip(addresses["layers"], counts, strict=True)):
        bits = torch.randint(1, 0x78, (count, dim), dtype=torch.uint8, generator=generator)
        signs = torch.randint(0, 2, (count, dim), dtype=torch.uint8, generator=generator) << 7
        exponents = torch.randint(110, 130, (count, dim // 4), dtype=torch.uint8, generator=generator)
        weight = (bits | signs).view(torch.float8_e4m3fn)
        name = f"layers.{layer}.engram.embed"
        entries = {f"{name}.weight": weight, f"{name}.scale": exponents.view(torch.float8_e8m0fnu)}
        save_file(entries, folder / f"model-0000{number + 1}-of-00002.safetensors")
        scale = torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127).repeat_interleave(4, dim=1)
        values.append(weight.float() * scale)
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    weight_map = {name: file for file, entries in files.items() for name in entries}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    text = {
        "engram_layer_ids": addresses["layers"],
        "engram_num_embeddings": counts,
        "engram_head_dim": dim,
        "engram_n_heads": addresses["heads"],
        "engram_max_ngram_size": max(addresses["orders"]),
        "engram_vocab_size": addresses["rows_per_head"][0],
        "engram_compressed_vocab_size": addresses["compressed_vocabulary"],
        "engram_pad_id": 1,
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v41", "text_config": text}))
    return torch.cat(values)


def fp8(*block: int) -> dict[str, Any]:
    """What DeepSeek-V3's config says of its weights."""
    return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [*block]}


def in_fp8(source: Path, folder: Path, rows: int, columns: int) -> dict[str, Tensor]:
    """Writes a copy whose projections are 8-bit values with a scale for each block; returns what they stand for."""
    shutil.copytree(source, folder)
    change(quantization_config=fp8(rows, columns))(folder)
    generator, meant = torch.Generator().manual_seed(0), {}
    for file in folder.glob("*.safetensors"):
        entries = load_file(file)
        for name, weight in list(entries.items()):
            meant[name] = weight.float()
            if not name.endswith("_proj.weight"):
                continue
            entries[name] = (weight * 100).to(torch.float8_e4m3fn)
            meant[name] = entries[name].float()
            down, across = math.ceil(weight.shape[0] / rows), math.ceil(weight.shape[1] / columns)
            scales = torch.rand(down, across, generator=generator) / 50
            for i in range(down):
                for j in range(across):
                    meant[name][i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] *= scales[i, j]
            entries[f"{name}_scale_inv"] = scales
        save_file(entries, file)
    return meant


def taken(folder: Path) -> dict[str, Tensor]:
    """Each tensor that an image of the folder has, by its name there."""
    image = HuggingFaceImage(folder)
    found: dict[str, list[Tensor]] = {}
    for place in image.ranges:
        found.setdefault(place.file, []).append(image.piece(place).values)
    return {name: torch.cat(pieces) for name, pieces in found.items()}


@pytest.mark.parametrize("block", [(128, 128), (16, 24)])
def test_8_bit_weights_with_a_scale_a_block_stand_for_their_products(
    block: tuple[int, int], plain_export: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.checkpoint.huggingface_image.PIECE_BYTES", 4 * 100)  # pieces begin within rows
    meant = in_fp8(plain_export.folder, tmp_path / "fp8", *block)
    found = taken(tmp_path / "fp8")
    assert found.keys() == meant.keys()
    for name, values in found.items():
        assert torch.equal(values, meant[name].flatten()), name


def test_a_run_begins_with_8_bit_weights(plain_export: Exported, corpus: Path, tmp_path: Path) -> None:
    meant = in_fp8(plain_export.folder, tmp_path / "fp8", 16, 24)
    run = begin(tmp_path, corpus, tmp_path / "fp8", "--nproc", "1", model=KINDS["plain"], optimizer=STILL)
    after, close = weights(run), {"rtol": 0, "atol": 1e-20}  # some are zero, which any learning rate moves
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    torch.testing.assert_close(after[name], meant[name], **close)
    up = next(name for name in meant if name.endswith("experts.0.up_proj.weight"))
    stacked = after[up.replace("0.up_proj.weight", "gate_up_proj")]
    torch.testing.assert_close(stacked[0, stacked.shape[1] // 2 :], meant[up], **close)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda entries, name: entries.pop(f"{name}_scale_inv"), "is F8_E4M3, without "),
        (lambda entries, name: entries.update({f"{name}_scale_inv": torch.ones(1, 9)}), "_scale_inv has shape [1, 9]"),
        (lambda entries, name: entries.update({name: torch.ones(entries[name].shape)}), "has a tensor "),
    ],
)  # fmt: skip
def test_8_bit_weights_without_their_scales_are_refused(
    spoil: Callable[[dict[str, Tensor], str], None], told: str, plain_export: Exported, tmp_path: Path
) -> None:
    in_fp8(plain_export.folder, tmp_path / "fp8", 128, 128)
    file = min((tmp_path / "fp8").glob("*.safetensors"))
    entries = load_file(file)
    spoil(entries, next(name for name in entries if name.endswith("_proj.weight")))
    save_file(entries, file)
    with pytest.raises(Damaged, match=re.escape(told)):
        HuggingFaceImage(tmp_path / "fp8")


def test_the_tables_of_deepseek_v41(trained: Path, corpus: Path, tmp_path: Path) -> None:
    """Two layers, and n-grams of 2 to 4 tokens."""
    model = JOB["model"] | {"engram": JOB["model"]["engram"] | {"orders": [2, 3, 4], "row_dim": 8, "pad_id": 1}}
    config = ModelConfig.model_validate(model)
    assert config.engram is not None
    vocabulary = compressed_vocabulary(config, RunTokens(SavedRun.open(trained).tokenizer))
    values = deepseek_v41(tmp_path / "v41", addresses_of(config.engram, vocabulary).fingerprint(), dim=8)
    image = HuggingFaceImage(tmp_path / "v41")
    found = [image.rows(span) for span in image.spans]
    assert torch.equal(torch.cat([each.ids_N for each in found]), torch.arange(len(values)))
    assert torch.equal(torch.cat([each.records_NW for each in found]), values)
    run = begin(tmp_path, corpus, tmp_path / "v41", "--nproc", "2", model=model, optimizer=STILL)
    assert torch.equal(rows(run), values)
    assert weights(run)["model.layers.0.engram.value_proj.weight"].std() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            lambda entries: entries.pop("layers.0.engram.embed.scale"),
            "has no layers.0.engram.embed.weight with its .scale",
        ),
        (
            lambda entries: entries.update({"layers.0.engram.embed.weight": torch.ones(6, 8)}),
            "layers.0.engram.embed is F32 [6, 8] with F8_E8M0 [6, 2], but F8_E4M3 [6, 8] with F8_E8M0 scales of its ",
        ),
        (
            lambda entries: entries.update({"layers.0.engram.embed.scale": torch.ones(5, 2).to(torch.float8_e8m0fnu)}),
            "layers.0.engram.embed is F8_E4M3 [6, 8] with F8_E8M0 [5, 2], but",
        ),
    ],
)
def test_tables_of_deepseek_v41_that_are_not_what_their_config_says_are_refused(
    changed: Callable[[dict[str, Tensor]], object], told: str, tmp_path: Path
) -> None:
    addresses = {"layers": [0, 3], "primes": [[6], [5]], "heads": 1, "orders": [2], "rows_per_head": [5]}
    deepseek_v41(tmp_path / "v41", addresses | {"compressed_vocabulary": 9}, dim=8)
    HuggingFaceImage(tmp_path / "v41")
    redo("*.safetensors", changed)(tmp_path / "v41")
    with pytest.raises(Damaged, match=re.escape(told)) as refused:
        HuggingFaceImage(tmp_path / "v41")
    assert "\n" not in str(refused.value)


@pytest.fixture
def copy(engram_export: Exported, tmp_path: Path) -> Path:
    shutil.copytree(engram_export.folder, tmp_path / "copy")
    return tmp_path / "copy"


def change(**values: Any) -> Callable[[Path], None]:
    def change_config(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))

    return change_config


def cut(pattern: str) -> Callable[[Path], None]:
    def cut_first(folder: Path) -> None:
        file = min(folder.glob(pattern))
        file.write_bytes(file.read_bytes()[:-8])

    return cut_first


def redo(pattern: str, changed: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def redo_first(folder: Path) -> None:
        file = min(folder.glob(pattern))
        entries = load_file(file)
        changed(entries)
        save_file(entries, file)

    return redo_first


def forget(name: str) -> Callable[[Path], None]:
    def forget_setting(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.pop(name)
        (folder / "config.json").write_text(json.dumps(config))

    return forget_setting


def without_weights(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()


def drop(name: str) -> Callable[[Path], None]:
    def drop_tensor(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            entries = load_file(file)
            if entries.pop(name, None) is not None:
                save_file(entries, file)

    return drop_tensor


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (change(model_type="llama"), "model_type is llama; models of deepseek_v3 and engram, and tables of "),
        (change(n_group=8), "n_group is 8, but this model has 1 alone"),
        (change(quantization_config={"quant_method": "gptq"}), "its weights are quantized (gptq); convert them to "),
        (change(quantization_config=fp8(128, 128) | {"fmt": "e5m2"}), "its weights are quantized (fp8); convert them"),
        (change(model_type="deepseek_v3", rms_norm_eps=1e-5), "rms_norm_eps is 1e-05, but 1e-06 under the latents'"),
        (change(num_hidden_layers=3), "model.layers.2.input_layernorm.weight is not there, but config.json "),
        (change(kv_lora_rank=8), "has shape [24, 32], but config.json asks for [16, 32]"),
        (change(engram=None), "has a tensor model.layers.0.engram.convolution.norm_weight, which this model does not"),
        (change(hidden_size="wide"), "config.json: hidden_size: Input should be a valid integer"),
        (change(engram={}), "config.json is none of a model that is known here"),
        (drop("model.norm.weight"), "model.norm.weight is not there, but config.json asks for [32]"),
        (cut("model-*"), "is cut short within"),
        (cut("tables/*"), "is cut short within rows; copy it anew"),
        (lambda folder: min(folder.glob("tables/*")).unlink(), "cannot be read (No such file or directory)"),
        (lambda folder: (folder / "config.json").write_text("["), "config.json: no JSON ("),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: no JSON object"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read (No such file"),
        (without_weights, "has no safetensors file; give a folder with a model's weights"),
        (redo("model-*", lambda entries: entries.update(x=torch.ones(1).short())), "x is I16; convert it to "),
        (forget("kv_lora_rank"), "has no kv_lora_rank"),
        (change(hidden_act="gelu"), "hidden_act is gelu, but this model has silu alone"),
        (redo("tables/*", lambda entries: entries.update(rows=torch.ones(3, 5))), "has no tensor rows with 4 columns"),
        (redo("tables/*", lambda entries: entries.update(x=entries.pop("rows"))), "has no tensor rows with 4 columns"),
        (redo("tables/*", lambda entries: entries.update(rows=entries["rows"][1:])), "the files of layer 0 have "),
        (lambda folder: min(folder.glob("model-*")).write_text("no"), "no safetensors file, or cut short; copy "),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_model_of_ours_is_refused(spoil: Callable[[Path], None], told: str, copy: Path) -> None:
    HuggingFaceImage(copy)
    spoil(copy)
    with pytest.raises(Damaged, match=re.escape(told)) as refused:
        HuggingFaceImage(copy)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (lambda model, _: model.update(hidden_size=48), "has another model.hidden_size (32, now 48); take over that"),
        (lambda model, _: model.update(engram=None), "has another model.engram ("),
        (lambda model, _: model["engram"].update(layers=[0]), "has another model.engram.layers ([0, 1], now [0])"),
        (lambda model, _: model["moe"].update(norm_topk=False), "has another model.moe.norm_topk (true, now false)"),
        (lambda _, addresses: addresses.update(seed=1), "has another addresses.seed (0, now 1)"),
    ],
)
def test_another_model_is_refused_with_the_key(
    changed: Callable[[dict[str, Any], dict[str, Any]], None], told: str, engram_export: Exported
) -> None:
    manifest, settings = engram_export.saved.image.manifest, HuggingFaceImage(engram_export.folder).settings
    assert manifest.addresses is not None
    model, addresses = (json.loads(json.dumps(each)) for each in (manifest.model, manifest.addresses))
    identity = Identity(model, addresses, {}, "")
    model["attention"]["rope_scaling"] = {"factor": 2.0}
    model["moe"]["balance_rate"] = 0.5
    identity.fits(settings.model, settings.addresses)
    changed(model, addresses)
    with pytest.raises(ValueError, match=re.escape(told)):
        identity.fits(settings.model, settings.addresses)


def test_what_the_library_saved_again_is_the_same_model(exported: Exported, tmp_path: Path) -> None:
    exported.load().save_pretrained(tmp_path / "again")
    first, again = HuggingFaceImage(exported.folder), HuggingFaceImage(tmp_path / "again")
    assert first.settings == again.settings
    assert first.tensors == again.tensors
    for image in (first, again):
        sizes = dict.fromkeys(image.tensors, 0)
        for place in image.ranges:
            sizes[place.tensor] += place.count
        assert sizes == {name: math.prod(info.shape) for name, info in image.tensors.items()}
    for one, other in zip(first.pieces(lambda *_: True), again.pieces(lambda *_: True), strict=True):
        assert one[:2] == other[:2]
        assert torch.equal(one.values, other.values)


def test_another_tokenizer_and_what_is_no_model_are_told_in_one_line(copy: Path, corpus: Path, tmp_path: Path) -> None:
    change(engram_pretrain={})(copy)
    path = copy / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace("<|pad|>", "<|filler|>"))
    job = write_job(tmp_path, corpus, checkpoint={"init_from": str(copy)})
    result = engram("train", job, "--nproc", "1")
    assert result.returncode == 2
    assert f"{copy} has another tokenizer than the text; prepare the text with --tokenizer" in result.stderr
    path.write_text(text)
    change(n_group=8)(copy)
    result = engram("train", job, "--nproc", "2")
    assert result.returncode == 2
    assert f"checkpoint.init_from: {copy}: n_group is 8, but this model has 1 alone; give another" in result.stderr
