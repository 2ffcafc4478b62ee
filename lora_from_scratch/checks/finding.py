"""What a check says: the fault, the number that shows it, cause and cure.

Taught in: notebooks/16_pitfalls.ipynb
"""

from dataclasses import dataclass

# {fault: (what usually causes it, what to do)}
FAULTS = {
    "no adapter": (
        "target_modules matched nothing, or the adapter was never put in or "
        "was taken off again",
        "print the names of the layers, write target_modules from them, and "
        "count what trains",
    ),
    "a name matches nothing": (
        "target_modules mixes the names of two architectures; libraries pass "
        "over an entry without a layer as long as another one has some",
        "write the names that this model has",
    ),
    "few blocks": (
        "an entry or a pattern holds the number of a block, so it matched "
        "the same layer in some blocks and not in the others",
        "match the end of the name only, or say layers_to_transform if you "
        "mean it",
    ),
    "embedding only": (
        "no layer that computes is adapted",
        "adapt the linear layers",
    ),
    "untrained": (
        "B is as it was made: this adapter was never trained, or it was made "
        "anew (get_peft_model, add_lora) where a saved one should have been "
        "loaded",
        "load it: PeftModel.from_pretrained(base, folder), or "
        "load_adapter(base, folder)",
    ),
    "not in the optimizer": (
        "the optimizer was made before the adapter, or for another copy",
        "make the optimizer last, from the parameters that train",
    ),
    "base is the model": (
        "adapters are put in in place: the model that you compare with has "
        "the adapter as well",
        "load the base a second time, or switch the adapter off for the "
        "comparison",
    ),
    "other base": (
        "the weights under the adapter are not those that it was trained "
        "on: another version, another model of the same shape, or something "
        "else was trained or merged",
        "load the very checkpoint that the adapter was trained on",
    ),
    "dropout on": (
        "the model is in training mode, so two passes over one text differ",
        "model.eval() before you measure or generate",
    ),
    "wrong scale": (
        "the layer, or whoever merged it, does not multiply by alpha / r",
        "multiply B A by alpha / r (rsLoRA: by alpha / sqrt(r)), once",
    ),
    "in the weights already": (
        "the update was merged into these weights; loading the adapter on "
        "top adds it again",
        "serve the merged weights without the adapter, or load the base of "
        "before the merge",
    ),
    "applied twice": (
        "merged twice, or merged and still computed beside it",
        "load the base of before the merge, and apply the update once",
    ),
    "merged into four bits": (
        "the sum was rounded to sixteen values per block, and most of a "
        "small update is smaller than half a step between them",
        "merge into the 16-bit weights, then quantize again and measure, or "
        "serve the adapter unmerged",
    ),
    "tied weight": (
        "the adapted layer shares its weight with another one, mostly the "
        "head with the embedding: a merge changes both",
        "leave it out of target_modules, never merge it, or untie the two "
        "before training",
    ),
    "float16 adapter": (
        "A, B and their gradients are in float16; a gradient scaler refuses "
        "that, and without one small steps are rounded away",
        "keep A and B in float32 (PEFT: autocast_adapter_dtype=True) and let "
        "autocast choose float16 for the products, or take bfloat16",
    ),
    "not finite": (
        "NaN or infinity in the data, a batch in which no label counts, or "
        "an overflow",
        "drop the examples named here; a mean over no label is NaN",
    ),
    "rate too low": (
        "the rate is that of full fine-tuning, or the schedule has ended",
        "ten times the rate, and again as long as that is better",
    ),
    "loss rose": (
        "the rate is too high for this rank and alpha",
        "a third of the rate, with a warm-up",
    ),
    "rank too low": (
        "the update that lowers this loss needs more directions than it has",
        "a run at four times the rank with nothing else changed",
    ),
    "rank too high": (
        "the two factors hold at least as many numbers as the matrix",
        "a rank below d_in * d_out / (d_in + d_out), or train the matrix",
    ),
    "overfit": (
        "the held-out loss has turned: the run was too long, or its rate too "
        "high, for so little text",
        "keep the step with the lowest held-out loss; then a lower rate, "
        "then more text",
    ),
    "wrong prefix": (
        "the names in the file do not begin as the format says, so a lenient "
        "loader finds nothing and leaves B = 0",
        "rename the keys, or save the unwrapped model",
    ),
    "base weights in the file": (
        "a library saves the whole embedding or head when it is a target",
        "save without it (PEFT: save_embedding_layers=False) unless it was "
        "trained or resized",
    ),
    "file refused": (
        "see the message",
        "save the adapter again, or load it with the library that wrote it",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One fault that was found.

    Args:
        fault: a key of ``FAULTS``.
        measured: the numbers that show it, in words.
    """

    fault: str
    measured: str

    @property
    def cause(self) -> str:
        """What usually causes it."""
        return FAULTS[self.fault][0]

    @property
    def cure(self) -> str:
        """What to do."""
        return FAULTS[self.fault][1]
