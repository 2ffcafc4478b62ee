"""What leaves a run: the adapter's card, the merged model, a GGUF file.

The merged model is a folder that transformers loads and our server takes as
a base. GGUF is llama.cpp's format; its own converter reads transformers'
folders of most models. Here the layout of GPT-2 is written, in 32 bits:

    our c_attn.weight (d_in, 3 d_in), x W + b  ->  blk.N.attn_qkv.weight
    (3 d_in, d_in), W x + b; the same for the other three Conv1D of a block

Source: gguf 0.19, ``constants.py`` (names of tensors and keys); llama.cpp,
``convert_hf_to_gguf.py``, class GPT2Model.
Taught in: notebooks/19_pipeline.ipynb
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lora_from_scratch.adapters import load_adapter
from lora_from_scratch.inject import lora_layers, merge_lora, replace_module

TRANSPOSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")


def merged_model(model: nn.Module, folder: Path) -> nn.Module:
    """Return ``model`` with the adapter of ``folder`` folded in, plain again.

    Args:
        model: the plain base model, changed in place.
        folder: of the adapter.
    """
    load_adapter(model, folder)
    merge_lora(model)
    for name, layer in lora_layers(model).items():
        # not remove_lora: that would take the update out again
        replace_module(model, name, layer.base_layer)
    del model.lora_config, model.lora_originals
    return model


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Make ``folder`` whole or not at all: built beside it, then renamed."""
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(part)
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o777 & ~umask)  # mkdtemp's folders are private
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_gguf(model: nn.Module, tokenizer, path: Path, name: str) -> None:
    """Write a model of GPT-2's kind as GGUF, in 32 bits; path is replaced.

    Raises:
        ValueError: for another kind of model.
    """
    import gguf

    config = model.config
    if config.model_type != "gpt2":
        raise ValueError(
            f"GGUF is written for gpt2 only, this is {config.model_type}; "
            "run llama.cpp's convert_hf_to_gguf.py on the merged folder"
        )
    part = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(part, "gpt2")
    writer.add_name(name)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, tokenizer, gguf)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes token_embd.weight
        place = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise ValueError(f"GGUF has no name for {key}")
        if place.endswith(".weight") and any(t in place for t in TRANSPOSED):
            value = value.T
        writer.add_tensor(place, value.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(part, path)


def _add_tokenizer(writer, tokenizer, gguf):
    """Add a byte-level BPE: its tokens in order, and its merges."""
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_ids)
    kinds = [
        gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL
        for i in range(len(tokens))
    ]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)


def same_outputs(
    model: nn.Module, other: nn.Module, ids: torch.Tensor
) -> float:
    """Return the largest difference of two models' logits on ids (b, t)."""
    with torch.no_grad():
        return (
            (model.eval()(ids).logits - other.eval()(ids).logits).abs().max()
        ).item()


def card(facts: dict) -> str:
    """Return the README.md of an adapter: what the hub calls a model card.

    Args:
        facts: name, base, licence, labels, prompt, rows (by part), hashes,
            setting, train, result, versions, fingerprint.
    """
    result, setting = facts["result"], facts["setting"]

    def interval(key):
        found = result[key]
        return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"

    targets = setting["target_modules"]
    targets = targets if isinstance(targets, str) else ", ".join(targets)
    prompt = facts["prompt"].replace("\n", "\\n")
    lines = [
        "---",
        f"base_model: {facts['base']}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags: [lora, text-classification]",
        "---",
        "",
        f"# {facts['name']}",
        "",
        f"A LoRA adapter of {facts['base']} (licence: {facts['licence']}) "
        f"that writes one of {len(facts['labels'])} labels after a text: "
        + ", ".join(facts["labels"])
        + f". The prompt is `{prompt}`, the answer begins with a space.",
        "",
        "## Results",
        "",
        f"On {result['n']} test rows that no choice was made with; in "
        f"brackets {result['confidence']:.0%} bootstrap intervals over "
        f"{result['resamples']} resamples of the rows. They do not cover "
        "what another seed would change.",
        "",
        "| measured | value |",
        "|---|---|",
        f"| accuracy | {interval('accuracy')} |",
        f"| accuracy of the base model | {interval('base_accuracy')} |",
        f"| gain over it | {interval('gain_over_base')} |",
        f"| always the most frequent label | {result['most_frequent']:.3f} |",
        *(f"| recall of {k} | {v:.3f} |" for k, v in result["recall"].items()),
        "",
        "## Training",
        "",
        f"r = {setting['r']}, lora_alpha = {facts['train']['lora_alpha']:g}, "
        f"learning rate {setting['lr']:.3g}, target modules {targets}; "
        f"{facts['train']['steps']} steps of {facts['train']['batch_size']} "
        f"rows, AdamW. {facts['trials']} trials were made on the validation "
        "rows.",
        "",
        "| part | rows | SHA-256 |",
        "|---|---|---|",
        *(
            f"| {part} | {facts['rows'][part]} | `{facts['hashes'][part]}` |"
            for part in facts["rows"]
        ),
        "",
        "## Limits",
        "",
        "It answers with a label to every text, also to texts that have "
        "none. Duplicates and leaks were looked for by equal words; "
        "paraphrases were not. Nothing was measured on other text than that "
        "of the test file.",
        "",
        "## How to make it again",
        "",
        "`python -m lora_from_scratch train config.yaml` with the "
        "configuration of this run's folder makes every file again, byte for "
        "byte, with "
        + ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
        + ".",
        "",
        f"Fingerprint: `{facts['fingerprint']}`",
        "",
    ]
    return "\n".join(lines)
