"""The code of a model card: a student's network in 20 lines of torch, for people who do not have this project.

Written for the student at hand: what it does not have is not there. Exact, not fast; `g` is the noise as the student sees it.
Medusa's heads, block students that predict one position ahead, and known tokens with noise need more than that: their lines load the tensors.
"""

from __future__ import annotations

from trainer.backbone import NORM_EPS, ROPE_BASE
from trainer.students.base import Base

_NOISE = {"gumbel": "Gumbel(0, 1)", "independent": "Gumbel(0, 1)", "gaussian": "standard normal", "uniform": "uniform on (0, 1)"}


def lines_of(student: Base) -> str:
    """Python source that defines `logits(ids, g)`, or only `tensors`; to be run in the exported folder."""
    config = student.config
    if config.kind == "medusa" or config.noise.known or (config.kind == "bd3lm" and config.shift):
        return 'import safetensors.torch\ntensors = safetensors.torch.load_file("model.safetensors")'
    return "\n".join([*_start(student), *_layer(student), *_logits(student)])


def _start(student: Base) -> list[str]:
    config = student.config
    norm = (
        'layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"]'
        if config.backbone == "dit"
        else 'rms_norm(x, x.shape[-1:], w[name + ".weight"]'
    )
    head = 'F.linear(norm(x, "model.norm"), ' + ("E[:V])" if config.tied else 'w["model.output.weight"][:V], w["model.output.bias"][:V])')
    scale = 'F.softplus(F.linear(x, w[name + ".scale.weight"], w[name + ".scale.bias"]))'
    return [
        "import safetensors.torch, torch, torch.nn.functional as F",
        f'w, V = safetensors.torch.load_file("model.safetensors"), {student.vocab_size}; E = w["model.embed_tokens.weight"]',
        f"def norm(x, name): return F.{norm}, eps={NORM_EPS})",
        "def turn(x, angle): return x * angle.cos() + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * angle.sin()",
        f"def read(x, g, name): return {head} + {scale} * g" if _reads(student) else f"def head(x): return {head}",
    ]


def _reads(student: Base) -> bool:
    return student.noise.readout or (student.noise.kind != "none" and bool(student.noise.drafts))


def _layer(student: Base) -> list[str]:
    heads = student.config.heads
    apart = f".unflatten(-1, ({heads}, -1)).transpose(1, 2) for"
    attended = "F.scaled_dot_product_attention(turn(q, angle), turn(k, angle), v, mask).transpose(1, 2).flatten(2)"
    if student.config.backbone == "dit":
        return [
            "def layer(x, angle, mask, p):",
            f'    q, k, v = (y{apart} y in F.linear(norm(x, p + "norm1"), w[p + "attn_qkv.weight"]).chunk(3, -1))',
            f'    x = x + F.linear({attended}, w[p + "attn_out.weight"])',
            '    y = F.gelu(F.linear(norm(x, p + "norm2"), w[p + "mlp.0.weight"], w[p + "mlp.0.bias"]), approximate="tanh")',
            '    return x + F.linear(y, w[p + "mlp.2.weight"], w[p + "mlp.2.bias"])',
        ]
    return [
        "def layer(x, angle, mask, p):",
        f'    q, k, v = (F.linear(norm(x, p + "input_layernorm"), w[f"{{p}}self_attn.{{n}}_proj.weight"]){apart} n in "qkv")',
        f'    x = x + F.linear({attended}, w[p + "self_attn.o_proj.weight"])',
        '    a, b = (F.linear(norm(x, p + "post_attention_layernorm"), w[f"{p}mlp.{n}_proj.weight"]) for n in ("gate", "up"))',
        '    return x + F.linear(F.silu(a) * b, w[p + "mlp.down_proj.weight"])',
    ]


def _logits(student: Base) -> list[str]:
    config, noise = student.config, student.noise
    width, noisy = config.hidden // config.heads, noise.kind != "none"
    if config.kind == "ar":
        says = "def logits(ids):  # int64 [B, L] -> [B, L, V], the next token's after each"
    else:
        masked = f"ids int64 [B, L], {student.vocab_size} where masked"
        says = f"def logits(ids, g):  # {masked}; g [N, V], {_NOISE[noise.kind]}, of the N masked positions in order -> [N, V]" if noisy else (
            f"def logits(ids):  # {masked} -> [N, V] of the N masked positions in order")  # fmt: skip
    lines = [
        says,
        f"    place, x, where = torch.arange(ids.shape[1]), E[ids], (ids.flatten() == {student.vocab_size}).nonzero()[:, 0]",
        f"    angle = torch.outer(place.float(), {ROPE_BASE} ** (-torch.arange(0, {width}, 2) / {width})).repeat(1, 2)",
    ]
    if noise.input != "none":
        lines.append(f"    x = x.flatten(0, 1).index_copy(0, where, {_seen(student)}).view_as(x)")
    lines += [f"    for i in range({config.layers}):", f'        x = layer(x, angle, {_mask(student)}, f"model.layers.{{i}}.")']
    at = "x.flatten(0, 1)[where - 1]" if config.shift else "x.flatten(0, 1)[where]"
    if noise.drafts:
        lines += _draft(student, at)
    if config.kind == "ar":
        return [*lines, "    return head(x)"]
    out = "head(y)"
    if _reads(student):  # without a readout nothing of the noise is read at the output
        out = 'read(y, g, "readout")' if noise.readout else f'read(y, 0 * g, "drafts.{noise.drafts[0]}.readout")'
    return [*lines, f"    y = {at}; return {out}"]


def _mask(student: Base) -> str:
    """Who sees whom: None, or bool [.., query, key]."""
    if student.config.kind == "ar":
        return "place <= place[:, None]"
    if student.config.kind == "bd3lm":
        size = student.config.block_size
        return f"place // {size} <= place[:, None] // {size}"
    if student.config.kind == "mtp":  # the masked positions are the row's last
        first = f"(ids == {student.vocab_size}).int().argmax(1)[:, None]" + (" - 1" if student.config.shift else "")
        return f"((place <= place[:, None]) | (place >= {first})[:, :, None])[:, None]"
    return "None"


def _seen(student: Base) -> str:
    """What stands at the masked positions."""
    noise = student.noise
    prior = ' + w["input.log_unigram_V"]' if noise.prior == "unigram" else ""
    projection = "E[:V]" if noise.projection == "tied" else 'w["input.projection.weight"].T'
    seen = f"(g{prior}).softmax(-1) @ {projection}"
    if noise.projection == "low_rank":
        seen += ' @ w["input.widen.weight"].T'
    return seen + (" + E[V]" if noise.input == "add" else "")


def _draft(student: Base, at: str) -> list[str]:
    noisy, restart = student.noise.kind != "none", student.noise.draft_restart
    drafted = 'read(y, g, f"drafts.{i + 1}.readout")' if noisy else "head(y)"
    into = "E[ids]" if restart else "x"
    how = "index_copy" if restart else "index_add"
    carry = ' + w[f"drafts.{i + 1}.carry"] * x' if restart else ""
    return [
        f"        if i + 1 in {sorted(student.noise.drafts)}:",
        f'            y = {at}; y = F.linear({drafted}.softmax(-1) @ E[:V], w[f"drafts.{{i + 1}}.embed.weight"])',
        f"            x = {into}.flatten(0, 1).{how}(0, where, y).view_as(x){carry}",
    ]
