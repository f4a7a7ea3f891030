"""Learned words as the papers' code has them: new rows in the table, a prompt for every layer."""

import copy

import torch
from torch.nn import functional as F

ORDER = ("down_blocks", "mid_block", "up_blocks")


def hidden_states(encoder, ids, skip):
    """Last hidden states of one prompt, or the last but one."""
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[-2] if skip else output.last_hidden_state


def grown(encoder, rows):
    """A copy of a text encoder whose table has more rows."""
    encoder = copy.deepcopy(encoder)
    table = encoder.get_input_embeddings()
    whole = torch.cat([table.weight.detach(), rows])
    encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(whole))
    return encoder


def layerwise_states(encoder, tokenizer, prompt, words, layers, skip=False):
    """States (layers, tokens, width), one prompt and one pass of the encoder for each layer.

    `words` maps a word, which stands between spaces, to its vectors (layers or 1, n, width).
    """
    states = []
    first = len(encoder.get_input_embeddings().weight)
    for layer in range(layers):
        own = {word: rows[min(layer, len(rows) - 1)] for word, rows in words.items()}
        big = grown(encoder, torch.cat(list(own.values())))
        ids, start = [], {}
        for word in own:
            start[word] = first + sum(len(own[other]) for other in start)
        for piece in prompt.split(" "):
            if piece in own:
                ids += range(start[piece], start[piece] + len(own[piece]))
            else:
                ids += tokenizer(piece).input_ids[1:-1]
        length = tokenizer.model_max_length
        ids = [tokenizer.bos_token_id, *ids[: length - 2], tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (length - len(ids))
        states.append(hidden_states(big, torch.tensor([ids]), skip)[0])
    return torch.stack(states)


class LiteralAttention:
    """A cross-attention by its formula, over the states that its number picks."""

    def __init__(self, number):
        self.number = number

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **others):
        states = encoder_hidden_states[:, self.number]
        query, key, value = (
            layer(each).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, each in (
                (attn.to_q, hidden_states), (attn.to_k, states), (attn.to_v, states),
            )
        )  # fmt: skip
        shares = F.softmax(query @ key.mT / query.shape[-1] ** 0.5, -1)
        return attn.to_out[0]((shares @ value).transpose(1, 2).flatten(2))


def literal_cross_attentions(unet):
    """A copy of a UNet whose cross-attentions are literal, numbered down, middle, up."""
    unet = copy.deepcopy(unet)
    names = [name for name in unet.attn_processors if ".attn2." in name]
    number = 0
    for stage in ORDER:
        for name in names:
            if name.startswith(stage):
                module = unet.get_submodule(name.removesuffix(".processor"))
                module._forward_pre_hooks.clear()
                module.set_processor(LiteralAttention(number))
                number += 1
    return unet, number
