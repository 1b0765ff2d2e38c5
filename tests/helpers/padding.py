"""Padding of a batch."""


def pad(batch, padding, pad_token_id):
    """The batch, changed in place, with nine tokens of its second row hidden; padding is None, "left" or "right"."""
    if padding is not None:
        hidden = slice(0, 9) if padding == "left" else slice(-9, None)
        batch["attention_mask"] = batch["input_ids"].new_ones(batch["input_ids"].shape)
        batch["attention_mask"][1, hidden] = 0
        batch["labels"][1, hidden] = -100
        batch["input_ids"][1, hidden] = pad_token_id
    return batch
